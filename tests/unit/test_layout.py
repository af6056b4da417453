"""What a test may do is told by its folder."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILES = sorted(TESTS.rglob("test_*.py"))
PROCESSES = {"subprocess", "multiprocessing", "browser", "playwright", "trainer_run"}


def imported(file):
    """The first part of each module's name that ``file`` imports."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(TESTS)))
def test_a_test_module_imports_no_other(file):
    assert not {file.stem for file in FILES} & set(imported(file))


FLOORS = (
    {"core", "artifacts", "config", "testing", "rewards"},
    {"cpu", "data"},
    {"plugin"},
    {"doctor"},
    {"launch"},
    {"evaluation"},
    {"analysis"},
)
"""The rooms of the package, lowest first. `config` holds no code."""


@pytest.mark.parametrize("floor", range(len(FLOORS)))
def test_a_room_imports_no_room_above_it(floor):
    above = {f"cppo_verl.{room}" for rooms in FLOORS[floor + 1 :] for room in rooms}
    for room in FLOORS[floor]:
        for file in (TESTS.parent / "cppo_verl" / room).rglob("*.py"):
            modules = {
                node.module or "" for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.ImportFrom)
            }
            upward = {module for module in modules for name in above if f"{module}.".startswith(f"{name}.")}
            assert not upward, file


def test_every_room_has_a_floor():
    rooms = {folder.name for folder in (TESTS.parent / "cppo_verl").iterdir() if (folder / "__init__.py").exists()}
    assert rooms == set().union(*FLOORS)


def test_no_duration_is_measured_by_a_clock_that_may_jump():
    """The age of a request is told by its file's time, which nothing else can be compared with."""
    found = {file.name for file in (TESTS.parent / "cppo_verl").rglob("*.py") if "time.time()" in file.read_text()}
    assert found == {"stop_request.py"}


@pytest.mark.parametrize("file", sorted((TESTS / "unit").rglob("test_*.py")), ids=lambda file: file.name)
def test_a_unit_test_starts_no_process_and_no_browser(file):
    assert not PROCESSES & set(imported(file))
    arguments = {node.arg for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.arg)}
    assert "browser" not in arguments  # the fixture
