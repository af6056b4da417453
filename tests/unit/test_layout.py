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


@pytest.mark.parametrize("file", sorted((TESTS / "unit").rglob("test_*.py")), ids=lambda file: file.name)
def test_a_unit_test_starts_no_process_and_no_browser(file):
    assert not PROCESSES & set(imported(file))
    arguments = {node.arg for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.arg)}
    assert "browser" not in arguments  # the fixture
