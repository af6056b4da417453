"""What mu's most likely tokens cost in TransferQueue, beside the fields that verl's agent loop puts there anyway.

    python tests/benchmarks/transport.py [--tokens 65536] [--length 1024] [--top-k 20] [--rounds 5]

Puts responses into a queue of one storage unit, each by itself as verl's agent loops do, and gets them back in one
batch as the trainer does: at 1, 4 and 16 times --tokens response tokens, with and without the candidates in turn.
"""

import argparse
import time
from statistics import median

import ray
import torch
import transfer_queue as tq
import verl  # noqa: F401  loads the plug-in
from omegaconf import OmegaConf
from verl.utils.tensordict_utils import list_of_dict_to_tensordict

from cppo_verl.plugin.topk.codec import CODES_FIELD, IDS_FIELD, pack

PARTITION = "benchmark"


def response(length, top_k):
    """The tensors of one response as an agent loop puts them, without a prompt."""
    ids = torch.randint(0, 150_000, (length,))
    fields = {
        "prompts": ids[:1],
        "responses": ids,
        "input_ids": ids,
        "position_ids": torch.arange(length),
        "response_mask": torch.ones(length, dtype=torch.int64),
        "loss_mask": torch.ones(length, dtype=torch.int64),
        "rollout_log_probs": -torch.rand(length),
    }
    if top_k:
        candidates = torch.randint(0, 150_000, (length, top_k)), -20 * torch.rand(length, top_k)
        fields |= dict(zip((IDS_FIELD, CODES_FIELD), pack(*candidates), strict=True))
    return fields


def transport(responses):
    """Seconds to put the responses one by one, and to get all of them."""
    keys = [f"response_{i}" for i in range(len(responses))]
    begin = time.perf_counter()
    for key, fields in zip(keys, responses, strict=True):
        tq.kv_batch_put(
            keys=[key],
            fields=list_of_dict_to_tensordict([fields]),
            tags=[{"status": "success"}],
            partition_id=PARTITION,
        )
    put = time.perf_counter()
    tq.kv_batch_get(keys=keys, partition_id=PARTITION, select_fields=list(responses[0]))
    got = time.perf_counter()
    tq.kv_clear(keys=keys, partition_id=PARTITION)
    return put - begin, got - put


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65536)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--top-k", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        tq.init(OmegaConf.create({"backend": {"SimpleStorage": {"num_data_storage_units": 1}}}))
        print(f"torch {torch.__version__}, K = {args.top_k}, {args.length} tokens a response, median of {args.rounds}")
        print("   tokens  bytes a token: verl   ours   put s: verl  with ours   ratio   get s: verl  with ours   ratio")
        for factor in (1, 4, 16):
            tokens = factor * args.tokens
            batches = [[response(args.length, k)] * (tokens // args.length) for k in (0, args.top_k)]
            plain, ours = (sum(x.nbytes for x in batch[0].values()) / args.length for batch in batches)
            rounds = [[transport(batch) for batch in batches] for _ in range(args.rounds + 1)][1:]
            print(f"{tokens:9d}{plain:21.0f}{ours - plain:7.0f}", end="")
            for phase in (0, 1):
                pairs = [(without[phase], with_candidates[phase]) for without, with_candidates in rounds]
                seconds = (median(side) for side in zip(*pairs, strict=True))
                print("{:14.2f}{:12.2f}".format(*seconds) + f"{median(b / a for a, b in pairs):8.2f}", end="")
            print(flush=True)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
