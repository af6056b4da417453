"""The tables of `inspect`: what each method masks, and why, as shares of the same tokens."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from cppo_verl.analysis.inspect.methods import Method
from cppo_verl.analysis.positions import position_bins
from cppo_verl.analysis.text import Cell, Table
from cppo_verl.artifacts.token_dump import CODE, REJECTING, Decisions, Response
from cppo_verl.core.metrics import POSITION_BINS

TOKENS_AT_ONCE = 100_000


@dataclass(eq=False)
class Masks:
    """Frames with a row per generated token of all responses, and with a column per method."""

    rejected: pd.DataFrame
    """1 - M_t."""
    reason: pd.DataFrame
    """Positions in `REASONS`."""
    groups: pd.DataFrame
    """Columns "sign" of A_t, "bin" (see `position_bins`) and "update"."""

    @classmethod
    def of(cls, responses: Sequence[Response], decisions: Iterable[Iterable[Decisions]]) -> "Masks":
        """
        Args:
            responses: each with at least one generated token.
            decisions: for each method, one entry per response; each is read once and let go, as all of a large dump
                would take several times its memory.
        """
        groups = {
            "sign": np.concatenate([np.sign(r.advantage[r.mask]) for r in responses]).astype(int),
            "bin": np.concatenate([position_bins(r) for r in responses]),
            "update": np.repeat([r.update for r in responses], [r.mask.sum() for r in responses]),
        }
        rejected, reason = {}, {}
        for n, of_method in enumerate(decisions):
            pairs = zip(of_method, responses, strict=True)
            parts = [(d.rejected[r.mask], np.asarray(d.reason)[r.mask]) for d, r in pairs]
            rejected[n], reason[n] = map(np.concatenate, zip(*parts, strict=True))
        return cls(*map(pd.DataFrame, (rejected, reason, groups)))

    def share_by_reason(self) -> pd.DataFrame:
        """What each reason rejects, as a share of all tokens [methods, reasons].

        "kept" is what a smooth gate takes from tokens that violate nothing. "towards_one" is the share of tokens that
        violate a constraint and are kept.
        """
        shares = {name: self.rejected.where(self.reason == CODE[name], 0).mean() for name in ("kept", *REJECTING)}
        return pd.DataFrame(shares | {"towards_one": (self.reason == CODE["towards_one"]).mean()})

    def share_within(self, group: str) -> pd.DataFrame:
        """Mean of 1 - M_t over the tokens of each value of the column ``group`` [methods, values]."""
        return self.rejected.groupby(self.groups[group]).mean().T

    def overlap(self) -> list[list[float | None]]:
        """Of what the row's method rejects, the share that the column's method rejects too; None if it rejects nothing.

        Where both reject a part of a token, the smaller part is common to both.
        """
        rejected = self.rejected.to_numpy()
        both = np.zeros((rejected.shape[1], rejected.shape[1]))
        for begin in range(0, len(rejected), TOKENS_AT_ONCE):
            part = rejected[begin : begin + TOKENS_AT_ONCE].astype(np.float64)
            both += [np.minimum(part, column[:, None]).sum(0) for column in part.T]
        return [(x / x[n]).tolist() if x[n] else [None] * len(x) for n, x in enumerate(both)]


def tables(methods: Sequence[Method], masks: Masks) -> list[Table]:
    """One row per method in each; the rows are numbered, as the overlap's columns are."""
    names = [f"{n} {method.label}" for n, method in enumerate(methods, start=1)]

    def table(name: str, title: str, columns: Sequence[str], rows: Iterable[Sequence[Cell]], **kwargs: Any) -> Table:
        labelled = [[label, *row] for label, row in zip(names, rows, strict=True)]
        largest = max([cell for row in labelled for cell in row if isinstance(cell, float)] + [1e-9])
        return Table(name, title, ["method", *columns], labelled, **{"shaded_up_to": largest} | kwargs)

    by_bin, by_update = masks.share_within("bin"), masks.share_within("update")
    eighths = [f"{b}/{POSITION_BINS}–{b + 1}/{POSITION_BINS}" for b in by_bin]
    updates = [f"update {u}" for u in by_update]
    numbers = [str(n) for n in range(1, len(methods) + 1)]
    why = _shares_by_reason(masks)
    rows = [[*shares, method.about] for shares, method in zip(why.to_numpy().tolist(), methods, strict=True)]
    return [
        table("share", "Masked share and why", [*why, "D_t and thresholds"], rows),
        table("position", "By position in the response", eighths, by_bin.to_numpy().tolist()),
        table("update", "By update of the step", updates, by_update.to_numpy().tolist()),
        table("overlap", "Overlap", numbers, masks.overlap(), digits=0, shaded_up_to=1.0, full_names=["", *names]),
    ]


def _shares_by_reason(masks: Masks) -> pd.DataFrame:
    """By reason and by sign of the advantage, as the table shows them."""
    by_reason = masks.share_by_reason()
    smooth = (by_reason["kept"] > 5e-5).any()
    reasons = by_reason[[*REJECTING, *(["kept"] if smooth else []), "towards_one"]]
    signs = masks.share_within("sign").reindex(columns=[1, -1, 0]).dropna(axis=1)
    shown = {"kept": "inside", "towards_one": "towards one", 1: "A > 0", -1: "A < 0", 0: "A = 0"}
    return pd.concat([masks.rejected.mean().rename("masked"), reasons, signs], axis=1).rename(columns=shown)
