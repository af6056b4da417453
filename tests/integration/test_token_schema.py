"""A per-token quantity that is added to the schema alone reaches the file, the replay and the page."""

import os
import shutil
import subprocess
import sys

from documented import ROOT

ADDED = "    weights: Floats | None = None\n"
SCRIPT = """
import json, re, sys
from pathlib import Path
import numpy as np
import oracle
from token_dumps import METHODS, STATED, dumped, save
from cppo_verl.analysis import replay
from cppo_verl.cli import main

folder = Path(sys.argv[1])
_, _, by_row = dumped(folder / "recorded", METHODS["cppo"])
responses = [response for of_row in by_row.values() for response in of_row]
for response in responses:  # read back from the file
    weights = oracle.position_weights(response.mask.tolist(), 0.8)
    np.testing.assert_allclose(response.weights, np.where(response.mask, weights, 0), atol=1e-6)
for response, decided in zip(responses, replay.decisions(replay.run_setting(STATED), responses), strict=True):
    np.testing.assert_allclose(decided.weights, response.weights, atol=1e-6)
save(folder, 3, responses, **STATED)
assert main(["inspect", str(folder), "--method", "run", "--output", str(folder / "page.html")]) == 0
(text,) = re.findall(r'id="data">(.*?)</script>', (folder / "page.html").read_text(), re.DOTALL)
data = json.loads(text)
assert "weights" in data["columns"]
assert all(response["decisions"][0]["weights"] is not None for response in data["responses"])
"""


def test_a_quantity_added_to_the_schema_is_recorded_replayed_and_sent_to_the_page(tmp_path):
    shutil.copytree(ROOT / "cppo_verl", tmp_path / "cppo_verl", ignore=shutil.ignore_patterns("__pycache__"))
    schema = tmp_path / "cppo_verl" / "artifacts" / "token_dump.py"
    before = "    update_mask: RepeatedFloats | None = None\n"
    text = schema.read_text()
    assert text.count(before) == 1
    schema.write_text(text.replace(before, ADDED + before))
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT / 'tests' / 'helpers'}"}
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "work")]
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
