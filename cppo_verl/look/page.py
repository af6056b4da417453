"""Pages of one file: templates of ``templates/`` with styles, pictures and scripts inside."""

from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from cppo_verl.atomic import replacing

# Everything that is put in is escaped but for `Markup`.
environment = Environment(
    loader=PackageLoader("cppo_verl.look"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
environment.filters["percent"] = lambda share: "–" if share is None else f"{share:.1%}"


def write_page(path: Path, template: str, **values) -> None:
    """Render a template to ``path``, which a failure leaves as it was."""
    text = environment.get_template(template).render(**values)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as (temporary,):
        temporary.write_text(text, encoding="utf-8")
