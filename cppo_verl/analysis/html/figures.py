"""Figures with one set of axes each, for a page in both colour schemes and as PNG and SVG files."""

import errno
import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib import rc_context, rc_params_from_file
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

from cppo_verl.artifacts.atomic import replacing

SERIES = ("#3b7fc4", "#d9822b", "#3a9d6c", "#a864b8", "#cf5b56", "#8f7355", "#2f9fae", "#878d97")
"""Legible on white and on near black."""
BLUE, ORANGE, GREEN, PURPLE, RED, _, _, GREY = SERIES
GENERATOR = "cppo_verl figure"
"""Stands in the files, so that only they are overwritten."""
INK = "#010203"
"""Colour of text and axes, which a page replaces by that of its text; no series has it."""
STYLE: Any = rc_params_from_file(Path(__file__).parent / "templates/figures.mplstyle", use_default_template=False)


@dataclass
class Figure:
    """Axes to draw on, with a title and a caption."""

    name: str
    """The name of its files and its anchor in the page."""
    title: str
    text: str
    """The caption: what is seen and how to read it."""
    width: float = 5.6
    """Inches."""
    height: float = 3.4

    def __post_init__(self) -> None:
        with rc_context(STYLE):
            self.canvas = Canvas(figsize=(self.width, self.height), layout="constrained")
            self.axes: Axes = self.canvas.add_subplot(title=self.title)

    def legend(self, **kwargs: Any) -> None:
        """Add a legend of the labelled artists, if any; ``loc="outside ..."`` puts it beside the axes."""
        handles, labels = self.axes.get_legend_handles_labels()
        if handles:
            outside = kwargs.get("loc", "").startswith("outside")
            with rc_context(STYLE):
                (self.canvas if outside else self.axes).legend(handles, labels, **kwargs)

    def _lay_out(self) -> None:
        """Lay out once for all formats, because it takes as long as drawing."""
        if self.canvas.get_layout_engine() is not None:
            self.canvas.draw_without_rendering()
            self.canvas.set_layout_engine(None)

    def svg(self) -> Markup:
        """The figure for a page: without a background, as wide as there is room, text in the page's colour."""
        sink = io.StringIO()
        # Without the salt, equal ids in two pictures of a page would both refer to the first picture.
        with rc_context(STYLE | {"svg.hashsalt": self.name}):
            self._lay_out()
            self.canvas.savefig(sink, format="svg", transparent=True, metadata={"Date": None})
        text = sink.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        head, body = text.split(">", 1)
        text = re.sub(r' (width|height)="[^"]*"', "", head) + ">" + body
        # Drop ids that nothing refers to: two pictures of a page would share them.
        text = re.sub(r' id="[a-z0-9.]+_\d+"', "", text)
        return Markup(text.replace(INK, "currentColor").replace("<svg ", '<svg role="img" ', 1))

    def files(self, folder: Path) -> tuple[Path, Path]:
        """The PNG and the SVG file of this figure in ``folder``."""
        return folder / f"{self.name}.png", folder / f"{self.name}.svg"

    def save(self, folder: Path) -> None:
        """Write both `files`, whole: a part of one would not be known as ours, and never be replaced."""
        with rc_context(STYLE | {"svg.hashsalt": self.name}), replacing(*self.files(folder)) as (png, svg):
            self._lay_out()
            self.canvas.savefig(png, format="png", dpi=150, metadata={"Software": GENERATOR})
            self.canvas.savefig(svg, format="svg", metadata={"Date": None, "Creator": GENERATOR})


def save_all(figures: Iterable[Figure], folder: Path) -> None:
    """Write the files of all figures to ``folder``, which is made if need be.

    Raises:
        OSError: a file cannot be written. Nothing is written, and a FileExistsError raised, where one would take the
            place of a file that is no earlier figure of ours.
    """
    chosen = list(figures)
    for file in chain.from_iterable(figure.files(folder) for figure in chosen):
        if file.exists() and GENERATOR.encode() not in file.read_bytes():
            raise FileExistsError(errno.EEXIST, "is no figure of cppo_verl and would be overwritten", str(file))
    for figure in chosen:
        folder.mkdir(parents=True, exist_ok=True)
        figure.save(folder)


def plain(text: str) -> str:
    """Escape text from data, in which a dollar would begin a formula for matplotlib."""
    return text.replace("$", r"\$")
