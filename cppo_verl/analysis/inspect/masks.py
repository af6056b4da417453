"""What several methods mask of the same tokens, counted: by reason, sign, position and update, and their overlap."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from cppo_verl.analysis.positions import position_bins
from cppo_verl.artifacts.token_dump import CODE, REASONS, REJECTING, Decisions, Response


@dataclass(eq=False)
class Masks:
    """Arrays [methods, tokens] or [tokens], over the generated tokens of all responses."""

    rejected: np.ndarray
    """1 - M_t [methods, tokens]."""
    reason: np.ndarray
    """Positions in `REASONS` [methods, tokens]."""
    sign: np.ndarray
    """Sign of A_t [tokens]."""
    bin: np.ndarray
    """Position in the response [tokens], see `position_bins`."""
    update: np.ndarray
    """Update of the step [tokens]."""

    @classmethod
    def of(cls, responses: Sequence[Response], decisions: Sequence[Sequence[Decisions]]) -> "Masks":
        """
        Args:
            responses: each with at least one generated token.
            decisions: for each method, one entry per response.
        """

        def per_token(arrays: Iterable[np.ndarray]) -> np.ndarray:
            return np.concatenate([array[r.mask] for array, r in zip(arrays, responses, strict=True)])

        return cls(
            rejected=np.stack([per_token(d.rejected for d in of_method) for of_method in decisions]),
            reason=np.stack([per_token(np.asarray(d.reason) for d in of_method) for of_method in decisions]),
            sign=np.sign(per_token(r.advantage for r in responses)).astype(np.int8),
            bin=np.concatenate([position_bins(r) for r in responses]),
            update=np.repeat([r.update for r in responses], [r.mask.sum() for r in responses]),
        )

    def share(self) -> list[float]:
        """Mean of 1 - M_t, per method."""
        return self.rejected.mean(1).tolist()

    def share_by_reason(self) -> list[dict[str, float]]:
        """What each reason rejects, per method, as a share of all tokens.

        "kept" is what a smooth gate takes from tokens that violate nothing. "towards_one" is the share of tokens that
        violate a constraint and are kept.
        """
        shares = []
        for rejected, reason in zip(self.rejected, self.reason, strict=True):
            by_reason = np.bincount(reason, weights=rejected, minlength=len(REASONS)) / len(reason)
            share = {name: float(by_reason[CODE[name]]) for name in ("kept", *REJECTING)}
            shares.append(share | {"towards_one": float((reason == CODE["towards_one"]).mean())})
        return shares

    def share_within(self, group: np.ndarray) -> dict[int, list[float]]:
        """{each value of ``group``: mean of 1 - M_t over its tokens, per method}."""
        return {int(g): self.rejected[:, group == g].mean(1).tolist() for g in np.unique(group)}

    def overlap(self) -> list[list[float | None]]:
        """Of what the row's method rejects, the share that the column's method rejects too; None if it rejects nothing.

        Where both reject a part of a token, the smaller part is common to both.
        """
        table: list[list[float | None]] = []
        for row in self.rejected:
            both = np.minimum(self.rejected, row).sum(1, dtype=np.float64)
            table.append((both / row.sum(dtype=np.float64)).tolist() if row.any() else [None] * len(both))
        return table
