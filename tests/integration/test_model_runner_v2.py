"""vLLM's Model Runner V2, by which vLLM 0.24 runs Qwen3 on a GPU; `make test-gpu-pins` runs this."""

import json
import os
import subprocess
import sys
from importlib.metadata import version

import pytest
from documented import ROOT

pytestmark = pytest.mark.skipif(not version("vllm").startswith("0.24."), reason="the GPU's vLLM is 0.24")


def test_the_top_k_path_takes_the_log_probabilities_of_its_kernels():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "model_runner_v2.py")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["candidates"] < 2e-6 and found["sampled"] < 2e-6
    assert found["outside"] > 0  # both kinds of token are there
    assert found["aligned"] is None
    assert "do not belong to the sampled tokens" in found["shifted"]
