"""Signals to a program that runs a trainer by `cppo_verl.launch.trainer_process`, with tests/helpers/sweep_app.py in
the place of verl's trainer."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from trainer_run import default_signals

from cppo_verl.artifacts import run_lock
from cppo_verl.launch.trainer_process import SAME_SIGNAL_SECONDS, Trainers, show_failure

HELPERS = Path(__file__).parents[1] / "helpers"
LAUNCHER = """
import os, sys, time
from pathlib import Path
from cppo_verl.launch import trainer_process
folder, trainer_process.SAME_SIGNAL_SECONDS = Path(sys.argv[1]), float(sys.argv[2])
try:
    with trainer_process.Trainers() as trainers:
        arguments = [f"output={folder}", f"plans={folder}"]
        trainers.start(arguments, folder / "log", dict(os.environ), folder / "checkpoints", module="sweep_app")
        print("started", flush=True)
        while trainers.running:
            time.sleep(0.1)
            codes = [child.exit_code() for child in trainers.ended()]
except KeyboardInterrupt:
    sys.exit(130)
sys.exit(codes[0])
"""


class Launcher:
    """The program, started and with its trainer at work unless ``ready`` is false."""

    def __init__(self, folder, ready=True, told="wait", start_signals=default_signals, same=SAME_SIGNAL_SECONDS):
        (folder / "plain").write_text(told)
        self.folder, self.checkpoints = folder, folder / "checkpoints"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HELPERS), os.environ.get("PYTHONPATH", "")])}
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCHER, str(folder), str(same)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=start_signals,
        )
        assert self.process.stdout.readline() == "started\n"
        (self.trainer,) = psutil.Process(self.process.pid).children()
        if ready:
            self.wait_for("notes.jsonl")

    def wait_for(self, name):
        while not (self.checkpoints / name).exists():
            assert self.process.poll() is None, self.process.stderr.read()
            time.sleep(0.05)

    def send(self, number):
        self.process.send_signal(number)
        return self

    def send_another(self, number):
        """Send a signal that comes too late to count as one with the first, which has asked the trainer."""
        self.wait_for("stop")
        time.sleep(SAME_SIGNAL_SECONDS)
        assert self.left() == {"stop"}
        return self.send(number)

    def finish(self):
        self.err = self.process.communicate(timeout=300)[1]
        self.trainer.wait(300)
        return self.process.returncode

    def left(self):
        return {path.name for path in self.checkpoints.iterdir()} & {"stop", "stopped"}


@pytest.mark.parametrize("ready", [True, False])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_one_signal_stops_a_run_at_work_and_one_that_is_starting(tmp_path, number, ready):
    launcher = Launcher(tmp_path, ready)
    assert launcher.send(number).finish() == 143
    assert launcher.left() == {"stopped"}
    assert (launcher.checkpoints / "stopped").read_text() == signal.Signals(number).name


def test_a_second_signal_ends_the_run_at_once_and_takes_the_request_back(tmp_path):
    launcher = Launcher(tmp_path, told="deaf").send(signal.SIGTERM)
    assert launcher.send_another(signal.SIGTERM).finish() == 130
    assert launcher.left() == set()


def test_signals_that_come_together_count_as_one(tmp_path):
    # `timeout` signals its child, and then its own process group
    launcher = Launcher(tmp_path, same=300 * SAME_SIGNAL_SECONDS).send(signal.SIGTERM).send(signal.SIGTERM)
    assert launcher.finish() == 143
    assert launcher.left() == {"stopped"}


def test_a_request_that_cannot_be_written_is_told_and_ends_the_run_at_once(tmp_path):
    launcher = Launcher(tmp_path)
    (launcher.checkpoints / "stop").mkdir()  # fails as a full disk does, for root as well
    assert launcher.send(signal.SIGTERM).finish() == 130
    assert "SIGTERM: the run cannot be asked to stop, ending it at once: [Errno 21] Is a directory" in launcher.err
    assert "Traceback" not in launcher.err


def test_ctrl_c_ends_the_run_at_once(tmp_path):
    assert Launcher(tmp_path).send(signal.SIGINT).finish() == 130


def test_a_killed_launcher_takes_its_trainer_along(tmp_path):
    assert Launcher(tmp_path).send(signal.SIGKILL).finish() == -signal.SIGKILL


KILLED_EARLY = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from cppo_verl.launch import trainer_process

def prctl(*arguments):
    os.kill(launcher, 9)
    while os.getppid() == launcher:
        time.sleep(0.01)
    return libc.prctl(*arguments)

launcher, libc, trainer_process.LIBC = os.getpid(), trainer_process.LIBC, SimpleNamespace(prctl=prctl)
with trainer_process.Trainers() as trainers:
    trainers.start([], Path(sys.argv[1]), dict(os.environ), module="this")
"""


def test_a_launcher_that_is_killed_as_its_trainer_starts_leaves_none(tmp_path):
    ended, held = os.pipe()
    killed = subprocess.run([sys.executable, "-c", KILLED_EARLY, str(tmp_path / "log")], stdin=held)
    os.close(held)
    assert killed.returncode == -signal.SIGKILL
    with open(ended, "rb") as until_both_have_ended:
        until_both_have_ended.read()
    assert (tmp_path / "log").read_text() == ""


def test_a_job_of_a_shells_background_can_be_ended_at_once_by_two_sigterms(tmp_path):
    def background():
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    launcher = Launcher(tmp_path, told="deaf", start_signals=background).send(signal.SIGTERM)
    assert launcher.send_another(signal.SIGTERM).finish() == 130


def test_under_nohup_a_closing_terminal_stops_nothing(tmp_path):
    def nohup():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)

    launcher = Launcher(tmp_path, start_signals=nohup).send(signal.SIGHUP)
    time.sleep(1)
    assert launcher.process.poll() is None
    assert launcher.left() == set()
    assert launcher.send(signal.SIGTERM).finish() == 143


def test_a_request_from_before_the_start_is_removed_and_told(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "stop").write_text("yesterday's")
    launcher = Launcher(tmp_path)
    time.sleep(0.5)
    assert launcher.process.poll() is None
    assert launcher.send(signal.SIGTERM).finish() == 143
    assert "a request to stop from before this start is removed: yesterday's" in launcher.err


def test_a_folder_that_another_run_trains_in_is_refused_and_that_runs_request_stays(tmp_path):
    checkpoints = tmp_path / "checkpoints"
    with run_lock.hold(checkpoints), Trainers() as trainers:
        (checkpoints / "stop").write_text("for the run that has begun")
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on .* trains in {checkpoints} already"):
            trainers.start([], tmp_path / "log", {}, checkpoints)
    assert (checkpoints / "stop").exists()
    assert not (tmp_path / "log").exists()


def test_the_reason_of_a_run_that_ended_itself_comes_last(tmp_path, capsys):
    log = tmp_path / "log"
    why = "storage has died; the run ends; the same command continues from the checkpoint of step 3"
    log.write_text("\n".join([f"(TaskRunner pid=7) cppo_verl  {why}", *(["another process complains"] * 99)]))
    with pytest.raises(subprocess.CalledProcessError) as failed:
        subprocess.run([sys.executable, "-c", "exit(5)"], check=True)
    show_failure(failed.value, log)
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == f"verl's trainer failed with exit code 5; the end of {log}:"
    assert lines[-2:] == ["another process complains", why]


def test_a_crash_far_above_the_end_of_the_log_is_shown(tmp_path, capsys):
    # As Ray printed it of a worker that crashed in its own metrics.
    crash = [
        "(pid=3946) *** SIGSEGV received at time=1796006661 on cpu 0 ***",
        "(pid=3946) PC: @ 0x7fac9619ad90  (unknown)  opentelemetry::TemporalMetricStorage::buildMetrics()",
    ]
    asked_to_end = "(pid=11) *** SIGTERM received at time=1796006660 on cpu 0 ***"
    log = tmp_path / "log"
    log.write_text("\n".join([asked_to_end, *crash, *(["the end"] * 99)]))
    with pytest.raises(subprocess.CalledProcessError) as failed:
        subprocess.run([sys.executable, "-c", "exit(1)"], check=True)
    show_failure(failed.value, log)
    assert capsys.readouterr().err.splitlines()[-3:] == ["the end", *crash]
