"""The command line as a process."""

import os
import subprocess
import sys

from run_folders import validation, write


def test_a_reader_that_ends_early_is_no_error_of_the_command(tmp_path):
    """As in ``cppo-verl table RUNS | head``."""
    run = write(tmp_path / "m.jsonl", validation(0, aime24=0.1))
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "cppo_verl", "table", str(run)]
    with os.fdopen(writing) as closed:
        result = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True)
    assert (result.returncode, result.stderr) == (1, "")
