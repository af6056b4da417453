"""Print, as JSON, what the top-K path makes of the log-probabilities of vLLM's Model Runner V2.

    TRITON_INTERPRET=1 python tests/helpers/model_runner_v2.py

On a GPU vLLM 0.24 runs Qwen3 by that runner; its CPU build never does, so its kernels run in Triton's interpreter.
Printed are the largest errors beside fp64 of the candidates' and of the sampled tokens' log-probabilities, how many
sampled tokens are no candidates, and what the check of the alignment says of the answer and of one shifted by a token.
"""

import json

import torch
import triton
import vllm.triton_utils as utils

# vLLM takes Triton for missing where it finds no driver.
utils.triton, utils.tl, utils.HAS_TRITON = triton, triton.language, True

from vllm.logprobs import create_sample_logprobs  # noqa: E402
from vllm.v1.engine.logprobs import LogprobsProcessor  # noqa: E402
from vllm.v1.worker.gpu.sample.logprob import compute_topk_logprobs  # noqa: E402

from cppo_verl.plugin.topk.codec import decode, unpack  # noqa: E402
from cppo_verl.plugin.topk.loss import check_alignment  # noqa: E402
from cppo_verl.plugin.topk.vllm_server import captured  # noqa: E402

POSITIONS, VOCABULARY, TOP_K = 24, 3000, 20


def refusal(ids, codes, sampled, log_mu):
    """The alignment check's message, or None if it has none."""
    try:
        check_alignment(ids, codes, ids == sampled.unsqueeze(-1), log_mu, torch.arange(len(ids)))
    except ValueError as error:
        return str(error)
    return None


def main():
    torch.manual_seed(0)
    logits = 4 * torch.randn(POSITIONS, VOCABULARY)
    sampled = torch.multinomial(logits.softmax(-1), 1).squeeze(-1)
    answer = create_sample_logprobs(flat_logprobs=True)
    processor = LogprobsProcessor(None, answer, None, 0.0, num_logprobs=TOP_K, num_prompt_logprobs=None)
    processor._update_sample_logprobs(compute_topk_logprobs(logits, TOP_K, sampled).tolists())

    capture = captured(answer, TOP_K)
    ids, codes = unpack(torch.from_numpy(capture.ids), torch.from_numpy(capture.codes))
    log_mu = torch.from_numpy(capture.sampled_log_prob).float()
    exact = logits.double().log_softmax(-1)
    found = {
        "candidates": (decode(codes) - exact.gather(-1, ids)).abs().max().item(),
        "sampled": (log_mu - exact.gather(-1, sampled.unsqueeze(-1)).squeeze(-1)).abs().max().item(),
        "outside": int((ids != sampled.unsqueeze(-1)).all(-1).sum()),
        "aligned": refusal(ids, codes, sampled, log_mu),
        "shifted": refusal(ids, codes, sampled.roll(1), log_mu.roll(1)),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
