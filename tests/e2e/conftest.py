"""Runs of verl's trainer that several files of tests read. One takes a minute or two to start."""

import signal
import time

import pytest
from trainer_run import RAY_STARTED, SHORT, Run, link

from cppo_verl.launch.trainer_process import SAME_SIGNAL_SECONDS


@pytest.fixture(scope="session")
def interrupted(tmp_path_factory):
    """The quickstart in an empty folder, ended by two signals as Ray starts: it leaves data and a warmed-up model."""
    run = Run(tmp_path_factory.mktemp("interrupted"), *SHORT).read_until("starting Ray")
    run.wait_for(run.output / "logs" / "train-0.log", RAY_STARTED)
    run.ask_to_stop()
    time.sleep(SAME_SIGNAL_SECONDS)
    run.ended_by_the_first = run.process.poll() is not None
    run.process.send_signal(signal.SIGTERM)
    return run.finish()


@pytest.fixture(scope="session")
def quickstart(interrupted, tmp_path_factory):
    """The quickstart in short, six steps on one rank: eight updates a rollout batch."""
    output = tmp_path_factory.mktemp("quickstart")
    link(interrupted, output)
    return Run(output, *SHORT).finish()
