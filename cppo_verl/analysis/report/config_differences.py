"""What hydra saved with a run: its settings, method and overrides."""

import json
import re

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cppo_verl.analysis.text import MISSING, flattened
from cppo_verl.artifacts.run_reader import Run

OWN_FOLDER = "<run>"
# Do not resolve `${oc.env:...}`, `${now:...}` and the like: they would show the reader's environment and date, not the
# run's, and an environment may hold secrets.
_RESOLVER = re.compile(r"\$(?=\{\s*(?!oc\.select:)[\w.]+:)")
_UNRESOLVED = "\ue000"
"""Stands for the dollar sign of an interpolation that is not to be resolved."""


def settings(run: Run) -> dict[str, str]:
    """{key: resolved value}, with the run's own folder shortened to `OWN_FOLDER`; empty without a readable config."""
    config = _saved(run, "config.yaml")
    folder = _saved(run, "hydra.yaml", "hydra.runtime.output_dir")
    if not isinstance(config, DictConfig):
        return {}
    flat = _resolved(OmegaConf.create(_RESOLVER.sub(_UNRESOLVED, OmegaConf.to_yaml(config))))
    root = run.path if run.path.is_dir() else run.path.parent
    own = {str(path) for path in (folder, root, root.resolve())} - {"None", ".", "/"}
    for name in sorted(own, key=len, reverse=True):
        flat = {key: value.replace(name, OWN_FOLDER) for key, value in flat.items()}
    return flat


def method(run: Run) -> str:
    """The shipped method that the run was started with."""
    return str(_saved(run, "hydra.yaml", "hydra.runtime.choices.method") or MISSING)


def overrides(run: Run) -> list[str]:
    """The overrides of the command that started the run."""
    return list(map(str, _saved(run, "overrides.yaml") or []))


def _saved(run: Run, name: str, key: str | None = None):
    """What hydra saved with the run in a file, or one value of it; None if the file is not readable."""
    if run.config is None:
        return None
    try:
        saved = OmegaConf.load(run.config.with_name(name))
        return OmegaConf.select(saved, key) if key else saved
    except Exception:  # a file cut off in the middle, which `read_run` has noted
        return None


def _resolved(config) -> dict[str, str]:
    """{key: its value as text}; an interpolation that cannot be resolved, or to a group of keys, stays as it is."""
    flat = {}
    for key, text in flattened(OmegaConf.to_container(config, resolve=False)).items():
        try:
            value = OmegaConf.select(config, key, default=text)
            if OmegaConf.is_dict(value):
                value = text
            elif OmegaConf.is_list(value):
                value = OmegaConf.to_container(value, resolve=True)
        except (OmegaConfBaseException, ValueError, RecursionError):
            value = text
        flat[key] = (value if isinstance(value, str) else json.dumps(value, default=str)).replace(_UNRESOLVED, "$")
    return flat
