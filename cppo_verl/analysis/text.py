"""Percentages, numbers, tables and notes, written the same way in the terminal and in the pages."""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from textwrap import fill

from cppo_verl.evaluation.table import markdown

MISSING = "–"
"""Stands for a value that does not exist, such as a share of nothing."""
Cell = str | float | None
"""Text, or a share in [0, 1] that is shown as a percentage, or None where there is no such share."""


def percent(share: float | None, digits: int = 1) -> str:
    return MISSING if share is None else f"{share:.{digits}%}"


def number(value: float | None, digits: int = 6) -> str:
    return MISSING if value is None else f"{value:.{digits}g}"


def listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) if len(numbers) < 10 else f"{numbers[0]} to {numbers[-1]}"


def counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}" + ("s" if count != 1 else "")


def flattened(value: object, name: str = "") -> dict[str, object]:
    """{"a.b.c": value} of dicts in dicts."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    parts = (flattened(part, f"{name}.{key}" if name else str(key)) for key, part in value.items())
    return {key: x for part in parts for key, x in part.items()}


@dataclass(frozen=True)
class Table:
    """A table; its caption is the text of the same name in ``templates/captions.txt``."""

    name: str
    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    digits: int = 1
    """Decimals of the percentages."""
    shaded_up_to: float | None = None
    """In the page, shares have a background that is darkest from this share on; None for no background."""
    full_names: Sequence[str] = ()
    """What the header's cells abbreviate, shown when pointed at."""

    def cells(self) -> list[list[str]]:
        return [[cell if isinstance(cell, str) else percent(cell, self.digits) for cell in row] for row in self.rows]

    def shade(self, cell: Cell) -> float | None:
        """How dark the cell's background is, in [0, 1]; None for none."""
        if self.shaded_up_to is None or not isinstance(cell, float):
            return None
        return min(1.0, cell / self.shaded_up_to)

    def terminal(self, caption: str, limit: int | None = None) -> str:
        """Title, caption and table in Markdown; of a longer table the first ``limit`` rows."""
        rows = self.cells()
        more = len(rows) - limit if limit is not None else 0
        text = f"{self.title}\n{fill(caption, 100)}\n\n{markdown(list(self.header), rows[:limit])}"
        return f"{text}\nand {more} more in the page" if more > 0 else text


def print_notes(notes: Iterable[str]) -> None:
    """Print what the readers skipped, and why, to stderr."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
