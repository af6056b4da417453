"""Two cells of the study from beginning to end, and what their sweep does a second time."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from studies.trust_regions import measures, report, results

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


def module(*arguments):
    command = [sys.executable, "-m", *map(str, arguments)]
    environment = os.environ | {"VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def sweep(folder, name):
    cell = ["rule=dppo,cppo", "horizon=16", "updates=4", "learning_rate=3e-4", "steps=4", "limit=2"]
    places = [f"output={folder}/{name}", f"inputs={folder}/shared", f"results_folder={folder}/results"]
    return module("studies.trust_regions.run", "-m", *places, *cell)


@pytest.fixture(scope="module")
def study(folder):
    done = sweep(folder, "cells")
    assert done.returncode == 0, done.stdout + done.stderr
    return measures.Study.load(folder / "results")


def test_a_cell_masks_about_the_wanted_share(study):
    assert [cell.about["method"] for cell in study.evaluation] == ["cppo", "dppo"]
    for cell in study.evaluation:
        assert sorted(cell.rows["seed"].unique()) == [201, 202]
        assert cell.rows["accuracy"].between(0.05, 0.95).all()
        # Of two seeds in four steps; the paper's thresholds would mask nothing here.
        assert 0.05 / 3 < measures.masked_share(cell) < 0.05 * 3
    cppo, dppo = study.evaluation
    assert cppo.about["thresholds"].keys() == {"delta", "delta_b"} and dppo.about["thresholds"].keys() == {"delta"}
    assert cppo.rows["by_budget"].sum() > 0 and dppo.rows["by_budget"].sum() == 0


def test_all_methods_start_from_the_same_policies_and_samples(study):
    cppo, dppo = (cell.rows.query("step == 1").set_index("seed")["accuracy"] for cell in study.evaluation)
    assert cppo.equals(dppo)


def test_a_result_that_is_there_is_not_made_again(folder, study):
    files = {file: file.stat().st_mtime_ns for file in (folder / "results").rglob("*.parquet")}
    again = sweep(folder, "on-another-machine")
    assert again.returncode == 0, again.stdout + again.stderr
    assert {file: file.stat().st_mtime_ns for file in (folder / "results").rglob("*.parquet")} == files


def test_the_report_is_made_from_the_results(folder, study):
    page = shutil.copy(ROOT / "docs/evidence.md", folder / "page.md")
    done = module("studies.trust_regions.report", "--results", folder / "results", "--page", page)
    assert done.returncode == 0, done.stderr
    got = f"{100 * results.final_accuracy(study.evaluation[0].rows).mean():.1f}"
    assert any(line.startswith("| CPPO ") and f"| {got} " in line for line in Path(page).read_text().splitlines())


def test_the_page_holds_what_the_committed_results_give():
    page = report.PAGE.read_text()
    assert report.rewrite(page, measures.Study.load(ROOT / "studies/trust_regions/results")) == page
