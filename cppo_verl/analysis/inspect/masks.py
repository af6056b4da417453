"""What several settings make of the same tokens, counted: by reason, sign, position and update, and their overlap."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cppo_verl.analysis.replay import Verdict
from cppo_verl.artifacts.token_dump import REASONS, Response
from cppo_verl.core.metrics import POSITION_BINS

REJECTING = ("token", "budget", "response", "clipped")


def rejected(verdict: Verdict) -> np.ndarray:
    """1 - M_t: 1 where a token is masked, a fraction under a smooth gate; 0 where the verdict's reason is ""."""
    return np.where(verdict.reason == 0, 0, 1 - verdict.update_mask).astype(np.float32)


@dataclass(eq=False)
class Masks:
    """[settings, tokens] or [tokens]; the tokens are the generated ones of all responses."""

    rejected: np.ndarray
    """1 - M_t."""
    reason: np.ndarray
    """Positions in `REASONS`."""
    sign: np.ndarray
    """Of A_t."""
    bin: np.ndarray
    """Of the position; bin b holds t = 1..T with b / POSITION_BINS < t / T <= (b + 1) / POSITION_BINS."""
    update: np.ndarray

    @classmethod
    def of(cls, responses: Sequence[Response], verdicts: Sequence[Sequence[Verdict]]) -> "Masks":
        """Args:
        responses: with a generated token each.
        verdicts: of each setting, one a response.
        """
        masks = [response.mask for response in responses]

        def flat(arrays):
            return np.concatenate([array[mask] for array, mask in zip(arrays, masks, strict=True)])

        return cls(
            rejected=np.stack([flat([rejected(v) for v in of_setting]) for of_setting in verdicts]),
            reason=np.stack([flat([v.reason for v in of_setting]) for of_setting in verdicts]),
            sign=flat([np.sign(r.advantage) for r in responses]).astype(np.int8),
            bin=flat([(r.position * POSITION_BINS - 1) // r.mask.sum() for r in responses]),
            update=flat([np.full(len(r.mask), r.update) for r in responses]),
        )

    def share(self) -> list[float]:
        """Mean of 1 - M_t, of each setting."""
        return self.rejected.mean(1).tolist()

    def share_by_reason(self) -> list[dict[str, float]]:
        """Of all tokens: what each reason rejects; "kept" is what a smooth gate takes of tokens that violate nothing;
        "towards_one" the tokens that violate a constraint and are kept."""
        shares = []
        for rejected, reason in zip(self.rejected, self.reason, strict=True):
            by_reason = np.bincount(reason, weights=rejected, minlength=len(REASONS)) / len(reason)
            share = {name: by_reason[REASONS.index(name)] for name in ("kept", *REJECTING)}
            share["towards_one"] = (reason == REASONS.index("towards_one")).mean()
            shares.append({name: float(value) for name, value in share.items()})
        return shares

    def share_within(self, group: np.ndarray) -> dict[int, list[float]]:
        """{value of ``group`` that occurs: mean of 1 - M_t of its tokens, of each setting}."""
        return {int(g): self.rejected[:, group == g].mean(1).tolist() for g in np.unique(group)}

    def overlap(self) -> list[list[float | None]]:
        """Of what the row's setting rejects, the share that the column's rejects too; None where it rejects nothing.

        Of fractions, the smaller one is common to both.
        """
        table = []
        for row in self.rejected:
            where = row > 0
            if not where.any():
                table.append([None] * len(self.rejected))
                continue
            both = np.minimum(self.rejected[:, where], row[where]).sum(1, dtype=np.float64)
            table.append((both / row.sum(dtype=np.float64)).tolist())
        return table
