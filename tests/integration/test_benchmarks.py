"""The benchmarks that end within seconds run, and the page has what they print."""

import runpy
import subprocess
import sys
from pathlib import Path

from cppo_verl.evaluation import paper_results

ROOT = Path(__file__).parents[2]


def printed(script, *arguments):
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / script), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_pages_table_of_the_papers_scales_is_that_of_the_recipes():
    table = [line for line in printed("scale.py").splitlines() if line.startswith("|")]
    assert len(table) == 2 + len(paper_results.MODELS)
    assert "\n".join(table) in (ROOT / "docs" / "benchmarks.md").read_text()


def test_the_page_has_the_numbers_of_operations_that_the_losses_take():
    operations = runpy.run_path(str(ROOT / "tests" / "benchmarks" / "loss.py"))["operations"]
    line = f"tensor operations: dppo_tv {operations('dppo_tv')}, cppo {operations('cppo')}"
    assert line in (ROOT / "docs" / "benchmarks.md").read_text().splitlines()


def test_the_time_to_read_a_run_is_printed_at_three_sizes():
    lines = printed("reading.py", "--steps", "31", "--files", "6").splitlines()
    assert [line.split()[0] for line in lines] == ["steps", "31", "124", "496", "files", "6", "24", "96"]
