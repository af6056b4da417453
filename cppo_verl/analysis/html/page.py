"""Pages in one file each: the templates in ``templates/``, with styles, pictures and scripts inside."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cppo_verl.analysis.text import percent
from cppo_verl.artifacts.atomic import replacing

# Everything put into a page is escaped unless it is `Markup`; texts for the terminal are not.
environment = Environment(
    loader=PackageLoader("cppo_verl.analysis.html"),
    autoescape=lambda name: name is None or not name.endswith(".txt"),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
environment.filters["percent"] = percent


_captions = environment.overlay(trim_blocks=False)  # a line's end separates words


def caption(name: str, **values: object) -> str:
    """The text ``name`` of ``templates/captions.txt`` in one line, with ``values`` filled in."""
    texts = _captions.get_template("captions.txt")
    return " ".join("".join(texts.blocks[name](texts.new_context(values))).split())


environment.globals["caption"] = caption


def refuse_foreign(path: Path, command: str) -> None:
    """Raise ValueError if ``path`` holds anything but an earlier page of this command, which may be replaced."""
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder: name a file in it")
    if path.exists() and _generator(command).encode() not in path.read_bytes():
        raise ValueError(f"--output {path} exists and is not a page of this command: name another file")


def _generator(command: str) -> str:
    return f'<meta name="generator" content="cppo_verl {command}">'


def write_page(path: Path, command: str, **values: object) -> None:
    """Render the command's template to ``path``; a failure leaves the file as it was."""
    text = environment.get_template(f"{command}.html").render(generator=Markup(_generator(command)), **values)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as (temporary,):
        temporary.write_text(text, encoding="utf-8", errors="replace")  # a path may hold a lone surrogate
