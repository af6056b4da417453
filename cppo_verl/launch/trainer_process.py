"""verl's trainer as a child process that a person may interrupt and a cluster may preempt."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

from hydra.core.override_parser.types import Quote, QuotedString

from cppo_verl.artifacts import run_lock, stop_request
from cppo_verl.artifacts.log_lines import LINE, RUN_ENDS

EXIT_CODE_STOPPED = 128 + signal.SIGTERM
"""Exit code of a program whose trainer was `Stopped`: not finished, and the same command continues."""
SAME_SIGNAL_SECONDS = 1.0
"""``timeout`` and others signal a process and then its group: signals that come this close count as one."""
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CRASH = re.compile(r"\*\*\* SIG(SEGV|ABRT|BUS|FPE|ILL) received")
"""What a process of Ray's prints that crashes; its next line names the function."""
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1
"""The option of prctl(2) that names the signal for a process whose parent has ended."""


class Stopped(Exception):
    """The trainer has ended early with a checkpoint because it was asked to; the message is its own account."""


@dataclass
class Child:
    """A trainer that `Trainers.start` has started."""

    process: subprocess.Popen
    log: Path
    checkpoints: Path | None
    job: Any
    lock: TextIO | None

    def exit_code(self) -> int:
        """Return the exit code of a trainer that has ended: EXIT_CODE_STOPPED if it was asked to."""
        stopped = self.checkpoints is not None and stop_request.stopped(self.checkpoints) is not None
        return EXIT_CODE_STOPPED if stopped and self.process.returncode == 0 else self.process.returncode


class Trainers:
    """verl's trainers as child processes of the ``with`` statement's body, which starts them and waits for their end.

    SIGTERM, and SIGHUP of a terminal that closes, ask them to end after their step with a checkpoint
    (`cppo_verl.artifacts.stop_request`). A second signal raises KeyboardInterrupt as Ctrl-C does. So does the first if
    nothing can be asked: no trainer runs, it saves nothing, or the request cannot be written. What the shell has told
    to ignore stays ignored. A body that raises ends the trainers at once, and with them Ray and all that Ray started.
    On Linux that also happens when this process is killed.

    To be entered in the main thread, as Python's signal handlers need it.
    """

    def __init__(self) -> None:
        self.running: list[Child] = []
        self.received: int | None = None  # the last signal that has come
        self._received_at = 0.0
        self._folders: list[Path] = []
        self._asked: list[Path] = []
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Trainers":
        self._handlers = {number: signal.getsignal(number) for number in ENDING}
        for number in (signal.SIGTERM, signal.SIGHUP):
            if self._handlers[number] != signal.SIG_IGN:
                signal.signal(number, self._on_signal)
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is KeyboardInterrupt and self.received is None:
            self.received = signal.SIGINT
        for number in ENDING:  # impatient further signals would leave Ray behind
            signal.signal(number, signal.SIG_IGN)
        processes = [child.process for child in self.running]
        for process in processes:
            process.send_signal(signal.SIGINT)  # nothing happens to one that has ended
        for process in processes:
            # Popen.wait would hang if the KeyboardInterrupt came while Popen.poll held its lock.
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        for folder in self._asked:
            stop_request.withdraw(folder)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def start(
        self,
        arguments: Sequence[str],
        log: Path,
        environment: dict[str, str],
        checkpoints: Path | None = None,
        module: str = "verl.trainer.main_ppo",
        job: Any = None,
        lock: TextIO | None = None,
    ) -> subprocess.Popen:
        """Start ``python -m module`` with its output in ``log``.

        ``checkpoints`` is the run's ``trainer.default_local_dir``, or None for a run that saves nothing. The `Child`
        keeps ``job``. ``lock`` is a file that the trainer, and none of its own children, holds open as well.

        Raises:
            BlockingIOError: another run's trainer works in ``checkpoints``.
            OSError: ``checkpoints`` cannot be written to.
        """
        if checkpoints is not None:
            run_lock.hold(checkpoints).close()  # the trainer itself does so a minute later
            if (left_over := stop_request.start_over(checkpoints)) is not None:
                print(f"a request to stop from before this start is removed: {left_over}", file=sys.stderr)
            self._folders.append(checkpoints)
            if self.received is not None:  # before the folder was known
                self._ask(checkpoints, self.received)
        with log.open("w") as file:
            # A session of its own: Ctrl-C reaches the trainer once, from here, and not Ray's processes past it.
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=[lock.fileno()] if lock else [],
                preexec_fn=partial(_in_the_child, os.getpid()),
            )
        self.running.append(Child(process, log, checkpoints, job, lock))
        return process

    def ended(self) -> Iterator[Child]:
        """Yield and forget the trainers that have ended; a lock is closed when the next one is asked for."""
        for child in [child for child in self.running if child.process.poll() is not None]:
            self.running.remove(child)
            if child.checkpoints is not None:
                self._folders.remove(child.checkpoints)
            yield child
            if child.lock is not None:
                child.lock.close()

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        if self.received is not None and time.monotonic() - self._received_at < SAME_SIGNAL_SECONDS:
            return
        first, self.received, self._received_at = self.received is None, number, time.monotonic()
        if not first or not self._folders:
            raise KeyboardInterrupt
        for folder in self._folders:
            self._ask(folder, number)

    def _ask(self, folder: Path, number: int) -> None:
        name = signal.Signals(number).name
        self._asked.append(folder)
        try:
            stop_request.request_stop(folder, name)
        except OSError as error:
            self._asked.remove(folder)
            print(f"{name}: the run cannot be asked to stop, ending it at once: {error}", file=sys.stderr)
            raise KeyboardInterrupt from error


def _in_the_child(parent: int) -> None:
    # exec keeps an ignored SIGINT, which a shell script's background jobs have: the trainer's must end it.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGINT)
        if os.getppid() != parent:  # it has ended before the option was set
            os._exit(1)


@contextmanager
def trainer(
    arguments: Sequence[str], log: Path, environment: dict[str, str], checkpoints: Path | None = None
) -> Iterator[subprocess.Popen]:
    """Start verl's trainer as `Trainers.start` does; at the end of the body wait for its end.

    Raises `Stopped` if the run ended early, for a signal (`Trainers` says which) or for any other request.
    """
    with Trainers() as trainers:
        process = trainers.start(arguments, log, environment, checkpoints)
        yield process
        process.wait()
    if checkpoints is not None and process.returncode == 0 and (what := stop_request.stopped(checkpoints)):
        raise Stopped(what)


def run_to_end(arguments: Sequence[str], log: Path, environment: dict[str, str]) -> int:
    """Run verl's trainer, which saves nothing; show why if it fails. Return its exit code, 130 after Ctrl-C."""
    try:
        with trainer(arguments, log, environment) as process:
            pass
    except KeyboardInterrupt:
        print("\ninterrupted; the same command starts over", flush=True)
        return 130
    if process.returncode:
        show_failure(process, log)
    return process.returncode


def show_failure(trainer: subprocess.Popen, log: Path) -> None:
    """Print the exit code of a trainer that failed, the end of its log, and what may stand far above that end.

    That is the first crash of one of Ray's processes, with the function that it happened in, and why the trainer has
    ended itself, if it has.
    """
    print(f"\nverl's trainer failed with exit code {trainer.returncode}; the end of {log}:", file=sys.stderr)
    lines = log.read_text(errors="replace").splitlines()
    crash = next((lines[i : i + 2] for i, line in enumerate(lines) if CRASH.search(line)), [])
    why = [line.partition(LINE)[2] for line in lines if LINE in line and RUN_ENDS in line]
    print("\n".join([*lines[-30:], *crash, *why[-1:]]), file=sys.stderr)


def quoted(text: str | Path) -> str:
    """Quote the value of a hydra override, because a sweep's folders have names like method=cppo,seed=1."""
    return QuotedString(str(text), Quote.single).with_quotes()
