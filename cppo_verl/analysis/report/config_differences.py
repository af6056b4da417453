"""What hydra saved with a run: its settings, method and overrides."""

import json

from cppo_verl.analysis.text import MISSING
from cppo_verl.artifacts.run_reader import METHOD, Run
from cppo_verl.artifacts.saved_config import flattened, load, select

OWN_FOLDER = "<run>"


def settings(run: Run) -> dict[str, str]:
    """{key: its value as text}, with `OWN_FOLDER` for the run's own folder; empty without a readable config."""
    config = _saved(run, "config.yaml")
    values = {key: select(config, key) for key in config}
    flat = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    root = run.path if run.path.is_dir() else run.path.parent
    folder = _saved(run, "hydra.yaml").get("hydra.runtime.output_dir")
    own = {str(path) for path in (folder, root, root.resolve())} - {"None", "", ".", "/"}
    for name in sorted(own, key=len, reverse=True):
        flat = {key: value.replace(name, OWN_FOLDER) for key, value in flat.items()}
    return flat


def method(run: Run) -> str:
    """The shipped method that the run was started with."""
    return str(select(_saved(run, "hydra.yaml"), METHOD) or MISSING)


def overrides(run: Run) -> list[str]:
    """The overrides of the command that started the run."""
    given = _saved(run, "overrides.yaml").get("")
    return list(map(str, given)) if isinstance(given, list) else []


def _saved(run: Run, name: str) -> dict[str, object]:
    """What hydra saved with the run in a file, flattened; a list under no key."""
    if run.config is None:
        return {}
    try:
        return flattened(load(run.config.with_name(name)))
    except ValueError:  # which `read_run` has noted
        return {}
