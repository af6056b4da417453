"""Figures of one panel each, for a page in both colour schemes and as PNG and SVG files."""

import io
import re
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas

BLUE, ORANGE, GREEN, PURPLE, RED, BROWN, TEAL, GREY = SERIES = (
    "#3b7fc4",
    "#d9822b",
    "#3a9d6c",
    "#a864b8",
    "#cf5b56",
    "#8f7355",
    "#2f9fae",
    "#878d97",
)
"""Legible on white and on near black."""
# What the page draws in its own text colour; no series has it.
INK = "#010203"
_STYLE = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "legend.fontsize": "small",
    "lines.markersize": 4,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.family": "sans-serif",
    # Text stays text: a page's is read aloud, found and set in the reader's own font.
    "svg.fonttype": "none",
}


@dataclass
class Figure:
    """A panel to draw on."""

    name: str
    """Of its files, and of the place in the page."""
    title: str
    caption: str
    """What is seen and how to read it; the page's text below."""
    width: float = 5.6
    """Inches."""
    height: float = 3.4

    def __post_init__(self):
        with rc_context(_STYLE):
            self.canvas = Canvas(figsize=(self.width, self.height), layout="constrained")
            self.axes: Axes = self.canvas.add_subplot(title=self.title)

    def legend(self, **kwargs) -> None:
        """Of the labelled artists, if there are any; ``loc="outside ..."`` puts it beside the panel."""
        handles, labels = self.axes.get_legend_handles_labels()
        if handles:
            outside = kwargs.get("loc", "").startswith("outside")
            with rc_context(_STYLE):
                (self.canvas if outside else self.axes).legend(handles, labels, **kwargs)

    def _lay_out(self) -> None:
        """Once for all formats: it takes as long as drawing does."""
        if self.canvas.get_layout_engine() is not None:
            self.canvas.draw_without_rendering()
            self.canvas.set_layout_engine(None)

    def svg(self) -> Markup:
        """For a page: without a background, as wide as there is room, its text in the page's colour."""
        sink = io.StringIO()
        # Equal ids in two pictures of one page would point to the first one's parts.
        with rc_context(_STYLE | {"svg.hashsalt": self.name}):
            self._lay_out()
            self.canvas.savefig(sink, format="svg", transparent=True, metadata={"Date": None})
        text = sink.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        head, body = text.split(">", 1)
        text = re.sub(r' (width|height)="[^"]*"', "", head) + ">" + body
        # Ids that nothing refers to would stand twice in a page of two pictures.
        text = re.sub(r' id="[a-z0-9.]+_\d+"', "", text)
        return Markup(text.replace(INK, "currentColor").replace("<svg ", '<svg role="img" ', 1))

    def save(self, folder: Path) -> None:
        """Write NAME.png and NAME.svg to ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        with rc_context(_STYLE | {"svg.hashsalt": self.name}):
            self._lay_out()
            self.canvas.savefig(folder / f"{self.name}.png", dpi=150)
            self.canvas.savefig(folder / f"{self.name}.svg", metadata={"Date": None})


def plain(text: str) -> str:
    """Text from data as matplotlib draws it literally: a dollar would begin a formula."""
    return text.replace("$", r"\$")
