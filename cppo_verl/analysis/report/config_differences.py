"""What hydra saved with a run: its settings and overrides."""

import json
import re

from cppo_verl.artifacts.run_reader import Run
from cppo_verl.artifacts.saved_config import select

OWN_FOLDER = "<run>"


def settings(run: Run) -> dict[str, str]:
    """{key: its value as text}, with `OWN_FOLDER` for the run's own folder; empty without a readable config."""
    config = run.saved("config.yaml")
    values = {key: select(config, key) for key in config}
    flat = {key: value if isinstance(value, str) else json.dumps(value) for key, value in values.items()}
    root = run.path if run.path.is_dir() else run.path.parent
    folder = run.saved("hydra.yaml").get("hydra.runtime.output_dir")
    own = {str(path) for path in (folder, root, root.resolve())} - {"None", "", ".", "/"}
    for name in sorted(own, key=len, reverse=True):
        # Whole names only, as a run beside one called outputs/a may be outputs/ab. One part alone, such as the 0 of
        # hydra's sweeps, may be any value, and is a folder only where a path begins with it.
        before, after = (r"(?<![\w.-])", r"(?![\w.-])") if "/" in name else (r"(?<![\w./-])", "(?=/)")
        place = re.compile(before + re.escape(name) + after)
        flat = {key: place.sub(OWN_FOLDER, value) for key, value in flat.items()}
    return flat


def overrides(run: Run) -> list[str]:
    """The overrides of the command that started the run."""
    given = run.saved("overrides.yaml").get("")
    return list(map(str, given)) if isinstance(given, list) else []
