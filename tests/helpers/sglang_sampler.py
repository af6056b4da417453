"""Print, as JSON, from which distribution SGLang samples and what it records of it.

    python tests/helpers/sglang_sampler.py SOURCES TEMPERATURE

SGLang's engine needs a GPU. Its sampler is plain torch, and runs here on the CPU from SOURCES, its unpacked wheel.
Printed are, beside the softmax at that temperature in fp64, the largest errors of the shares of the tokens sampled, of
the sampled tokens' log-probabilities and of the likeliest tokens' (`top_logprobs_num`).
"""

import json
import sys
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import torch

SAMPLES, TOP_K = 100_000, 3
LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.0, -3.0, 1.0, -0.5, 1.5])


def sampler(sources):
    """SGLang's module of that name."""
    # Its own __init__ imports the client's language; notebooks and GGUF files have no part in sampling.
    package = ModuleType("sglang")
    package.__path__ = [f"{sources}/sglang"]
    sys.modules |= dict.fromkeys(("IPython", "IPython.display", "gguf"), MagicMock()) | {"sglang": package}
    import sglang.srt.layers.sampler as module

    # Of a running engine: its arguments, as verl leaves them, and its ranks.
    arguments = SimpleNamespace(
        enable_nan_detection=False,
        rl_on_policy_target=None,
        enable_deterministic_inference=False,
        sampling_backend="flashinfer",
    )
    module.get_global_server_args = lambda: arguments
    module.get_tp_group = lambda: SimpleNamespace(device_group=None)
    module.is_dp_attention_enabled = lambda: False
    return module


def main():
    sources, temperature = sys.argv[1], float(sys.argv[2])
    torch.manual_seed(0)
    request = SimpleNamespace(
        is_all_greedy=False,
        need_top_p_sampling=False,
        need_top_k_sampling=False,
        need_min_p_sampling=False,
        has_custom_logit_processor=False,
        temperatures=torch.full((SAMPLES, 1), temperature),
        sampling_seed=None,
        grammars=None,
        device="cpu",
    )
    answer = SimpleNamespace(next_token_logits=LOGITS.repeat(SAMPLES, 1))
    nothing, positions = [None] * SAMPLES, torch.zeros(SAMPLES, dtype=torch.long)
    ids = sampler(sources).Sampler()(answer, request, True, [TOP_K] * SAMPLES, nothing, positions).long()
    exact = (LOGITS.double() / temperature).log_softmax(-1)
    likeliest = exact.topk(TOP_K)
    assert (torch.stack(list(answer.next_token_top_logprobs_idx)) == likeliest.indices).all()
    found = {
        "shares": ids.bincount(minlength=len(LOGITS)) / SAMPLES - exact.exp(),
        "sampled": answer.next_token_logprobs - exact[ids],
        "likeliest": torch.stack(list(answer.next_token_top_logprobs_val)) - likeliest.values,
    }
    print(json.dumps({name: error.abs().max().item() for name, error in found.items()}))


if __name__ == "__main__":
    main()
