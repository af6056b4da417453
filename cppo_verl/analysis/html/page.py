"""Pages of one file: templates of ``templates/`` with styles, pictures and scripts inside."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cppo_verl.artifacts.atomic import replacing

# Everything that is put in is escaped but for `Markup`.
environment = Environment(
    loader=PackageLoader("cppo_verl.analysis.html"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
environment.filters["percent"] = lambda share: "–" if share is None else f"{share:.1%}"


def refuse_foreign(path: Path, command: str) -> None:
    """Raise ValueError where ``path`` holds something else than a page of that command, which may be replaced."""
    if path.is_dir():
        raise ValueError(f"--output {path} is a folder: name a file in it")
    if path.exists() and _generator(command).encode() not in path.read_bytes():
        raise ValueError(f"--output {path} exists and is no page of this command: name another")


def _generator(command: str) -> str:
    return f'<meta name="generator" content="cppo_verl {command}">'


def write_page(path: Path, command: str, **values) -> None:
    """Render the command's template to ``path``, which a failure leaves as it was."""
    text = environment.get_template(f"{command}.html").render(generator=Markup(_generator(command)), **values)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as (temporary,):
        temporary.write_text(text, encoding="utf-8")
