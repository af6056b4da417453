"""A script that runs verl's trainer, as a test starts it, and what it leaves behind."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil

from cppo_verl.launch.trainer_process import LIBC, PR_SET_PDEATHSIG

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "run.py"
MARK = "CPPO_VERL_TEST_RUN"
SHORT = [
    "trainer.total_training_steps=6",
    "trainer.test_freq=3",
    "trainer.save_freq=3",
    "actor_rollout_ref.rollout.val_kwargs.n=16",
    "data.val_max_samples=16",
    # The tokens of every response, at every other step.
    "trust_region.dump.every=2",
    "trust_region.dump.responses=256",
]
BRIEF = [
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
    "trainer.save_freq=-1",
    "trainer.logger=[console,file]",
    "data.train_batch_size=16",
]
RAY_STARTED = "Started a local Ray instance"


def default_signals():
    """Undo, in the child, what a shell does to its background jobs: they ignore these signals, and exec keeps that."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def ends_with_the_test(number):
    """Let the kernel send a signal to this child when the test session ends, however it does: a trainer or a cluster
    that is left behind takes the memory of other tests."""
    LIBC.prctl(PR_SET_PDEATHSIG, number)


class Program:
    """A command that a test starts, every process of which is findable by an environment variable."""

    def __init__(self, command, environment, ended_by, **settings):
        self.mark = uuid.uuid4().hex
        self.process = subprocess.Popen(
            command,
            env=os.environ | {MARK: self.mark} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=partial(self._in_the_child, ended_by),
            **settings,
        )
        self.text = ""

    @staticmethod
    def _in_the_child(ended_by):
        default_signals()
        ends_with_the_test(ended_by)

    def read_until(self, pattern):
        for line in self.process.stdout:
            self.text += line
            if re.search(pattern, line):
                return self
        self.give_up(f"{pattern!r} never came:\n{self.text}")

    def wait_for(self, file, text):
        """Wait until a file that the command writes holds ``text``."""
        deadline = time.monotonic() + 480  # another trainer and other tests may run beside this one
        while text not in (held := file.read_text(errors="replace") if file.exists() else ""):
            if time.monotonic() > deadline or self.process.poll() is not None:
                self.give_up(f"{file} never held {text!r}; its end is:\n{held[-5000:]}")
            time.sleep(0.1)
        return self

    def give_up(self, why):
        """Fail the test, without leaving its processes to take the memory and the time of the tests after it."""
        for process in processes(self.mark):
            with suppress(psutil.Error):
                process.kill()
        raise AssertionError(why)

    def finish(self):
        self.text += self.process.stdout.read()
        self.code = self.process.wait()
        return self

    def survivors(self):
        return survivors(self.mark)


class Run(Program):
    """One attempt of the quickstart, of another script that trains to ``--output``, or of a program as Python's
    arguments name it."""

    def __init__(self, output, *overrides, script=QUICKSTART, program=(), probe=""):
        environment = {"PYTHONUNBUFFERED": "1"}
        self.go = output / f"go-{uuid.uuid4().hex}" if probe else None
        if probe:
            paths = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
            environment |= {"CPPO_VERL_PROBE": probe, "VERL_USE_EXTERNAL_MODULES": "probe"}
            environment["CPPO_VERL_PROBE_GO"] = str(self.go)
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        if not program:
            environment["RAY_ADDRESS"] = "127.0.0.1:1"  # of a cluster: these scripts start a Ray of their own
        self.output = output
        program = program or [str(script), "--output", str(output)]
        super().__init__([sys.executable, *program, *overrides], environment, signal.SIGINT)

    def until(self, phase):
        """Wait until the log of the quickstart's trainer tells the part of a step that ``probe`` names.

        The trainer stays in that part until `finish`.
        """
        self.read_until("starting Ray")
        log = re.search(r"^training; the full log is (.*)$", self.text, re.M)[1]
        return self.wait_for(Path(log), f"the {phase} of step")

    def ask_to_stop(self):
        """Send SIGTERM, and wait until the trainer is asked."""
        self.process.send_signal(signal.SIGTERM)
        return self.wait_for(self.output / "checkpoints" / "stop", "SIGTERM")

    def finish(self):
        if self.go is not None:
            self.go.touch()
        return super().finish()

    def kill(self, title, number=signal.SIGKILL):
        """Send a signal to the processes whose command or title matches."""
        victims = [process for process, command in processes(self.mark).items() if re.search(title, command)]
        if not victims:
            self.give_up(f"no process {title!r}")
        for victim in victims:
            victim.send_signal(number)
        return self


def processes(mark):
    """{process: its command or title} of those whose environment holds ``mark``."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found[process] = " ".join(process.cmdline())
    return found


def survivors(mark, patience=90):  # a Ray process was seen to take half a minute, on a machine with other work
    """Processes whose environment holds ``mark`` that are still alive after ``patience`` seconds."""
    deadline = time.monotonic() + patience
    while (alive := processes(mark)) and time.monotonic() < deadline:
        time.sleep(0.5)
    return list(alive.values())


def metrics(output, attempt):
    lines = (output / "logs" / f"metrics-{attempt}.jsonl").read_text().splitlines()
    return {record["step"]: record["data"] for record in map(json.loads, lines)}


def link(run, folder):
    """Give ``folder`` the data and the model of another run of the quickstart."""
    for name in ("data", "model"):
        (folder / name).symlink_to(run.output / name)
