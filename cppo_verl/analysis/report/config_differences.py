"""The settings that hydra saved with a run, and those in which runs differ."""

import json
import re
from collections.abc import Sequence

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from cppo_verl.analysis.text import MISSING
from cppo_verl.artifacts.run_reader import Run

OWN_FOLDER = "<run>"
# Do not resolve `${oc.env:...}`, `${now:...}` and the like: they would show the reader's environment and date, not the
# run's, and an environment may hold secrets.
_RESOLVER = re.compile(r"\$\{(?!oc\.select:)[\w.]+:")


def settings(run: Run) -> dict[str, str]:
    """{key: resolved value}, with the run's own folder shortened to `OWN_FOLDER`; empty without a readable config."""
    config = _saved(run, "config.yaml")
    folder = _saved(run, "hydra.yaml", "hydra.runtime.output_dir")
    if not isinstance(config, DictConfig):
        return {}
    try:
        config = OmegaConf.create(_unresolved(OmegaConf.to_container(config, resolve=False)))
    except OmegaConfBaseException:  # a resolver within a key, which cannot be left unresolved
        return {}
    flat: dict[str, str] = {}
    _flatten(config, "", flat)
    root = run.path if run.path.is_dir() else run.path.parent
    own = sorted({str(x) for x in (folder, root, root.resolve()) if x and str(x) not in (".", "/")}, key=len)
    for key, value in flat.items():
        for name in reversed(own):
            value = value.replace(name, OWN_FOLDER)
        flat[key] = value
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


def differences(runs: Sequence[dict[str, str]]) -> dict[str, list[str]]:
    """{key: its value in each run}, for the keys whose values differ."""
    keys = sorted(set().union(*runs))
    columns = {key: [run.get(key, MISSING) for run in runs] for key in keys}
    return {key: values for key, values in columns.items() if len(set(values)) > 1}


def _flatten(config: DictConfig, prefix: str, flat: dict[str, str]) -> None:
    for key in map(str, config):
        text = OmegaConf.to_container(config, resolve=False)[key]  # type: ignore[index, call-overload]  # a dict
        name = f"{prefix}{key}"
        try:
            value = config[key]
            if isinstance(value, DictConfig):
                if OmegaConf.is_interpolation(config, key):  # shown where it points to, which may contain this key
                    value = text
                elif value:
                    _flatten(value, f"{name}.", flat)
                    continue
            if OmegaConf.is_config(value):
                value = OmegaConf.to_container(value, resolve=True)
        except (OmegaConfBaseException, ValueError, RecursionError):
            value = text
        flat[name] = value if isinstance(value, str) else json.dumps(value, default=str)


def _unresolved(value):
    if isinstance(value, dict):
        return {key: _unresolved(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_unresolved(x) for x in value]
    return _RESOLVER.sub(lambda match: "\\" + match[0], value) if isinstance(value, str) else value
