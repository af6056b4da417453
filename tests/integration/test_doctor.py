"""The doctor where it starts processes: a library that does not load, a Ray worker."""

import os
import subprocess
import sys

from cppo_verl.cli import main


def test_a_system_library_that_vllm_lacks_is_named(tmp_path):
    (tmp_path / "libnuma.so.1").touch()  # the loader finds this one first, and cannot use it
    command = [sys.executable, "-m", "cppo_verl", "doctor", "--no-ray"]
    result = subprocess.run(
        command, env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert result.returncode == 1
    (failure,) = [line for line in result.stdout.splitlines() if line.startswith("FAIL")]
    assert f"{tmp_path}/libnuma.so.1: file too short: install the system library libnuma1" in failure


def test_a_ray_worker_is_asked_too(capsys):
    assert main(["doctor"]) == 0
    assert "a Ray worker" in capsys.readouterr().out
