"""One of four gloo ranks that hold parts of the same logits: top-K D_t from the parts, for one, two and four ranks.

`measure` is spawned; each rank appends what it found to the list that it is given.
"""

import torch
import torch.distributed as dist

from cppo_verl.core.divergence import Kind, candidate_divergence, gather_logits, log_probs_beside

RANKS, ROWS, TOKENS, K = 4, 8, 40, 5
SPLITS = ("rows", "columns")


def problem() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [ROWS, TOKENS], log mu [ROWS, TOKENS], sampled ids [ROWS]."""
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(ROWS, TOKENS, generator=g)
    log_mu = (logits + torch.randn(ROWS, TOKENS, generator=g)).double().log_softmax(-1)
    sampled = torch.randint(0, TOKENS, (ROWS,), generator=g)
    sampled[:2] = torch.tensor([0, TOKENS - 1])
    return logits, log_mu, sampled


def measure(rank: int, store: str, kinds: list[Kind], found: list) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    logits, log_mu, sampled = problem()
    log_pi = logits.log_softmax(-1).gather(-1, sampled.unsqueeze(-1)).squeeze(-1)
    top = log_mu.topk(K).indices
    ids = torch.cat([top, sampled.unsqueeze(-1)], dim=-1)
    is_top = (top == sampled.unsqueeze(-1)).any(-1)
    # In another order than the logits, as the responses' rows are only some of them.
    rows = torch.arange(ROWS).flip(0)
    for size in (1, 2, 4):
        group = dist.new_group(range(size))
        if rank >= size:
            continue
        for split in SPLITS:
            part = logits.chunk(size, dim=SPLITS.index(split))[rank].contiguous()
            first_row, first_column = (rank * len(part), 0) if split == "rows" else (0, rank * part.shape[-1])
            gathered = gather_logits(part, ids[rows], rows - first_row, group, first_column).flip(0)
            log_pis = log_probs_beside(gathered, log_pi)
            for kind in kinds:
                divergence = candidate_divergence(log_pis, log_mu.gather(-1, ids), is_top, kind)
                found.append((size, split, kind, divergence.tolist()))
            none = gather_logits(part, ids[:0], rows[:0], group, first_column)
            strange = gather_logits(part, torch.tensor([[0, TOKENS, -1]]), rows[:1] - first_row, group, first_column)
            found.append((size, "no rows", "", [*none.shape]))
            found.append((size, "ids that are no tokens", "", strange.isnan().flatten().tolist()))
    dist.destroy_process_group()
