"""The engines' mismatch of the quickstart, measured before it trains."""

import re
import subprocess
import sys

import pytest
from trainer_run import QUICKSTART

from cppo_verl.artifacts.token_dump import read_tokens


@pytest.mark.nightly
def test_a_rollout_in_half_precision_spends_a_part_of_the_budget(interrupted, tmp_path):
    command = [sys.executable, "-m", "cppo_verl", "mismatch", "--output", str(tmp_path / "m"), "--"]
    command += ["--config-dir", str(QUICKSTART.parent), "--config-name", "quickstart", f"output={interrupted.output}"]
    command += ["divergence=topk_tv", "actor_rollout_ref.rollout.dtype=bfloat16"]
    before = sorted(path for path in interrupted.output.rglob("*"))
    ended = subprocess.run(command, capture_output=True, text=True)
    assert re.search(r"^(warn|FAIL): the mismatch alone takes \d+\.\d% of the prefix budget", ended.stdout, re.M), ended
    assert ended.returncode == ("FAIL: " in ended.stdout)
    assert "the rollout computes in bfloat16, the actor in fp32" in ended.stdout
    dump = read_tokens(tmp_path / "m")
    # A mini-batch of four prompts, eight responses each, seen once.
    assert len({response.key for response in dump.responses}) == len(dump.responses) == 32
    assert dump.header["divergence"] == "topk_tv"
    assert sorted(path for path in interrupted.output.rglob("*")) == before
