"""docs/seams.md lists every private or overridden upstream name that the package touches, as it is installed."""

import inspect
import re

import pytest
import verl  # noqa: F401  loads the plug-in
from seams import ROOT, imported, overridden, patched, private_names, resolve, signature, table

TABLE = table()


def last(path: str) -> str:
    return path.rpartition(".")[2]


def test_every_seam_of_the_code_is_in_the_table():
    assert overridden() - TABLE.keys() == set()
    listed = TABLE.keys() | {last(path) for path in TABLE}
    assert private_names() - listed == set()
    assert patched() - listed == set()


def test_every_row_of_the_table_is_a_seam_of_the_code():
    names = private_names() | patched()
    used = overridden() | imported() | names
    assert [path for path in TABLE if path not in used and last(path) not in names] == []


@pytest.mark.parametrize("path", TABLE)
def test_a_hook_is_where_the_table_says_with_these_parameters(path):
    found = resolve(path)
    if inspect.isroutine(found):
        assert TABLE[path][0] == signature(inspect.unwrap(getattr(found, "func", found)))


def test_a_hook_that_moved_is_noticed():
    with pytest.raises(AttributeError, match="_update_actr"):
        resolve("verl.trainer.ppo.v1.trainer_base.PPOTrainer._update_actr")


@pytest.mark.parametrize("path", TABLE)
def test_the_tests_that_the_table_names_exist(path):
    tests = re.findall(r"tests/[\w/.]+", TABLE[path][1])
    assert tests and all((ROOT / test).exists() for test in tests)
