"""What is parsed once a process: hydra reads the same thirty YAML files for each composition, which takes half of its
time, and OmegaConf parses the same interpolations for each config that is resolved. A file that has changed is another
text."""

import functools
import io
import os
import pickle
from contextlib import contextmanager
from unittest import mock

import omegaconf.base
from omegaconf import OmegaConf

ORIGINAL = OmegaConf.load
parsed_interpolation = functools.cache(omegaconf.base.parse)  # a tree that OmegaConf only reads


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


@contextmanager
def each_text_parsed_once():
    with mock.patch.object(OmegaConf, "load", load), mock.patch.object(omegaconf.base, "parse", parsed_interpolation):
        yield
