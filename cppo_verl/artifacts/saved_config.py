"""What hydra saved with a run, read as plain data: no tag makes an object, and no resolver is asked.

A resolver would show the reader's environment and date, not the run's, and an environment may hold secrets.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

_REFERENCE = re.compile(r"\$\{(?:oc\.select:)?([\w.]+)(?:,[^{}]*)?\}")

LONGEST = 1000
"""Characters of a value that is put into another one, so that what is read stays in proportion to the file."""


class _Loader(yaml.SafeLoader):
    """Refuses aliases, which hydra never writes: a few of them can stand for more values than memory holds."""

    def compose_node(self, parent: yaml.Node | None, index: yaml.Node | int | None) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def load(file: Path) -> Any:
    """The content of a YAML file as JSON has it: other values are text.

    Raises:
        ValueError: the file is not readable.
    """
    try:
        return json.loads(json.dumps(yaml.load(file.read_text(encoding="utf-8"), _Loader), default=str))
    except (OSError, yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: not readable ({type(error).__name__})") from error


def flattened(value: object, name: str = "") -> dict[str, object]:
    """{"a.b.c": value} of dicts in dicts."""
    if not isinstance(value, dict) or not value:
        return {name: value}
    parts = (flattened(part, f"{name}.{key}" if name else str(key)) for key, part in value.items())
    return {key: x for part in parts for key, x in part.items()}


def select(config: Mapping[str, object], key: str) -> object:
    """The value of a key of a flattened config, None without it.

    References to other keys, "${a.b}", are followed, within a text if they lead to something short. Every other
    interpolation is text.
    """

    def filled(match: re.Match) -> str:
        text = str(_followed(config, match[0]))
        return text if len(text) <= LONGEST and "${" not in text else match[0]

    value = _followed(config, config.get(key))
    return _REFERENCE.sub(filled, value) if isinstance(value, str) else value


def _followed(config: Mapping[str, object], value: object) -> object:
    """What a value that is nothing but a reference leads to; the value itself if it leads nowhere, or in a circle."""
    seen: set[str] = set()
    while isinstance(value, str) and (match := _REFERENCE.fullmatch(value)):
        if match[1] in seen or match[1] not in config:
            break
        seen.add(match[1])
        value = config[match[1]]
    return value
