"""One of four gloo ranks that hold a vocabulary's logits in shards: top-K D_t from the shards, for one, two and four.

`measure` is spawned; each rank appends what it found to the list that it is given.
"""

import torch
import torch.distributed as dist

from cppo_verl.core.divergence import Kind, candidate_divergence, gather_sharded_log_probs

RANKS, ROWS, K = 4, 9, 5
CASES = {
    "no padding": (40, 40),
    "padding in the last shard": (37, 40),
    "a shard of padding alone": (26, 40),
}
"""{name: (tokens, columns)}"""


def problem(tokens: int, columns: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [ROWS, columns] with padding that would outweigh all tokens, log mu [ROWS, tokens], sampled ids [ROWS]."""
    g = torch.Generator().manual_seed(tokens)
    logits = torch.cat([3 * torch.randn(ROWS, tokens, generator=g), torch.full((ROWS, columns - tokens), 60.0)], dim=-1)
    log_mu = (logits[:, :tokens] + torch.randn(ROWS, tokens, generator=g)).double().log_softmax(-1)
    sampled = torch.randint(0, tokens, (ROWS,), generator=g)
    sampled[:2] = torch.tensor([0, tokens - 1])
    return logits, log_mu, sampled


def measure(rank: int, store: str, kinds: list[Kind], found: list) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    for size in (1, 2, 4):
        group = dist.new_group(range(size))
        if rank >= size:
            continue
        for case, (tokens, columns) in CASES.items():
            logits, log_mu, sampled = problem(tokens, columns)
            top = log_mu.topk(K).indices
            ids = torch.cat([top, sampled.unsqueeze(-1)], dim=-1)
            rows = torch.arange(ROWS).flip(0)
            shard = logits.chunk(size, dim=-1)[rank].contiguous()
            # Rows in another order than the logits, as the responses' rows are only some of them.
            log_pi = gather_sharded_log_probs(shard, ids[rows], rows, group, tokens).flip(0)
            is_top = (top == sampled.unsqueeze(-1)).any(-1)
            for kind in kinds:
                divergence = candidate_divergence(log_pi, log_mu.gather(-1, ids), is_top, kind)
                found.append((size, case, kind, divergence.tolist()))
        none = gather_sharded_log_probs(shard, ids[:0], rows[:0], group, tokens)
        strange = gather_sharded_log_probs(shard, torch.tensor([[0, tokens, -1]]), rows[:1], group, tokens)
        found.append((size, "no rows", "", [*none.shape]))
        found.append((size, "ids that are no tokens", "", strange.isnan().flatten().tolist()))
    dist.destroy_process_group()
