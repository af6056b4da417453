"""Log-probabilities as vLLM answers with them."""

from vllm.logprobs import create_sample_logprobs


def answer(positions):
    """vLLM's flat log-probabilities of [(sampled id, its log-probability, {id: log-probability}), ...]."""
    flat = create_sample_logprobs(flat_logprobs=True)
    for sampled, log_prob, top in positions:
        ids, log_probs = [sampled, *top], [log_prob, *top.values()]
        flat.append_fast(ids, log_probs, iter(range(len(ids))), iter([None] * len(ids)))
    return flat
