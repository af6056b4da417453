"""The tables of `inspect`: what each method masks, and why, as shares of the same tokens."""

from collections.abc import Sequence

from cppo_verl.analysis.inspect.masks import Masks
from cppo_verl.analysis.inspect.methods import Method
from cppo_verl.analysis.text import Cell, Table
from cppo_verl.artifacts.token_dump import REJECTING
from cppo_verl.core.metrics import POSITION_BINS

Rows = Sequence[Sequence[Cell]]


def tables(methods: Sequence[Method], masks: Masks) -> list[Table]:
    """One row per method in each; the rows are numbered, as the overlap's columns are."""
    names = [f"{n} {method.label}" for n, method in enumerate(methods, start=1)]

    def table(name: str, title: str, columns: Sequence[str], rows: Rows, **kwargs) -> Table:
        rows = [[label, *row] for label, row in zip(names, rows, strict=True)]
        largest = max([cell for row in rows for cell in row if isinstance(cell, float)] + [1e-9])
        return Table(name, title, ["method", *columns], rows, **{"shaded_up_to": largest} | kwargs)

    by_bin, by_update = masks.share_within(masks.bin), masks.share_within(masks.update)
    eighths = [f"{b}/{POSITION_BINS}–{b + 1}/{POSITION_BINS}" for b in by_bin]
    updates = [f"update {u}" for u in by_update]
    numbers = [str(n) for n in range(1, len(methods) + 1)]
    return [
        table("share", "Masked share and why", *_shares_by_reason(methods, masks)),
        table("position", "By position in the response", eighths, list(zip(*by_bin.values(), strict=True))),
        table("update", "By update of the step", updates, list(zip(*by_update.values(), strict=True))),
        table("overlap", "Overlap", numbers, masks.overlap(), digits=0, shaded_up_to=1.0, full_names=["", *names]),
    ]


def _shares_by_reason(methods: Sequence[Method], masks: Masks) -> tuple[list[str], Rows]:
    by_reason, by_sign = masks.share_by_reason(), masks.share_within(masks.sign)
    smooth = any(shares["kept"] > 5e-5 for shares in by_reason)
    reasons = [*REJECTING, *(["kept"] if smooth else [])]
    signs = {f"A {sign} 0": by_sign[value] for sign, value in ((">", 1), ("<", -1), ("=", 0)) if value in by_sign}
    header = ["masked", *("inside" if r == "kept" else r for r in reasons), "towards one", *signs, "D_t and thresholds"]
    rows: list[list[Cell]] = [
        [share, *(shares[r] for r in reasons), shares["towards_one"], *(x[i] for x in signs.values()), methods[i].about]
        for i, (share, shares) in enumerate(zip(masks.share(), by_reason, strict=True))
    ]
    return header, rows
