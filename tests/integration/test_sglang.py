"""SGLang's sampler, of the version that verl's extra pins, run on the CPU; `make test-gpu-pins` downloads its wheel."""

import ast
import json
import os
import subprocess
import sys
import zipfile
from importlib.metadata import requires
from pathlib import Path

import pytest
from documented import ROOT

from cppo_verl.plugin.preflight import MU_KEEPING

PINNED = next(line.split(";")[0] for line in requires("verl") if line.startswith("sglang=="))
WHEELS = list(Path(sys.prefix, "wheels").glob(PINNED.replace("==", "-") + "-*.whl"))
pytestmark = pytest.mark.skipif(not WHEELS, reason=f"no wheel of {PINNED}: make test-gpu-pins downloads one")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sglang")
    zipfile.ZipFile(WHEELS[0]).extractall(folder)
    return folder


def errors(sources, original):
    environment = os.environ | {"SGLANG_RETURN_ORIGINAL_LOGPROB": original, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, ROOT / "tests" / "helpers" / "sglang_sampler.py", sources, "0.7"]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return json.loads(ended.stdout.splitlines()[-1])


def test_sglang_records_the_distribution_that_it_samples_from_at_another_temperature(sources):
    found = errors(sources, "false")
    assert found["shares"] < 0.007  # four standard errors
    assert found["sampled"] < 2e-6 and found["likeliest"] < 2e-6


def test_the_environment_variable_that_is_refused_makes_it_record_another_distribution(sources):
    found = errors(sources, "true")
    assert found["shares"] < 0.007
    assert found["sampled"] > 0.1


def test_every_permitted_argument_of_sglang_is_one(sources):
    tree = ast.parse((sources / "sglang" / "srt" / "server_args.py").read_text())
    (arguments,) = (node for node in tree.body if getattr(node, "name", None) == "ServerArgs")
    fields = {node.target.id for node in arguments.body if isinstance(node, ast.AnnAssign)}
    assert len(fields) > 100
    assert set(MU_KEEPING["sglang"].split()) <= fields
