"""YAML that is parsed once a process: hydra reads the same thirty files for each composition, and takes half of its
time to parse them. A file that has changed is another text."""

import functools
import io
import os
import pickle
from unittest import mock

from omegaconf import OmegaConf

ORIGINAL = OmegaConf.load


@functools.cache
def parsed(name, text):
    stream = io.StringIO(text)
    stream.name = name  # which errors show
    return pickle.dumps(ORIGINAL(stream))


def load(file):
    """What OmegaConf.load gives, a copy each time."""
    if isinstance(file, str | os.PathLike):
        with open(file, encoding="utf-8") as stream:
            return load(stream)
    return pickle.loads(parsed(getattr(file, "name", "<file>"), file.read()))


def each_text_parsed_once():
    """The context in which `load` stands for OmegaConf.load."""
    return mock.patch.object(OmegaConf, "load", load)
