"""verl's trainer as a child process that a person may interrupt and a cluster may preempt."""

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from hydra.core.override_parser.types import Quote, QuotedString

from cppo_verl.artifacts import stop_request

EXIT_CODE_STOPPED = 128 + signal.SIGTERM
"""For a program that passes `Stopped` on: not finished, and the same command continues."""


class Stopped(Exception):
    """The trainer has ended early with a checkpoint, as it was asked to; the message is what it says of it."""


@contextmanager
def trainer(
    arguments: Sequence[str],
    log: Path,
    environment: dict[str, str],
    checkpoints: Path | None = None,
    module: str = "verl.trainer.main_ppo",
    pass_fds: Sequence[int] = (),
) -> Iterator[subprocess.Popen]:
    """Start verl's trainer with its output in ``log``; at the end of the body wait for its end.

    SIGTERM asks a run to end after its step with a checkpoint (`cppo_verl.artifacts.stop_request`). A second one, or
    the first where there is nothing to save, raises KeyboardInterrupt as Ctrl-C does; a body that raises ends the
    trainer at once, and with it Ray and all that Ray started. To be called in the main thread, as Python's signal
    handlers are.

    Args:
        checkpoints: the run's ``trainer.default_local_dir``, or None for a run that saves nothing.
        module: what ``python -m`` is to run.
        pass_fds: file descriptors that the trainer, and none of its own children, is to hold open.

    Raises:
        Stopped: the run ended early, for SIGTERM or for any other request.
    """
    signalled, asked, ended = threading.Event(), threading.Event(), threading.Event()

    def on_sigterm(*_):
        # `timeout` and others signal a process and its group: two at once are one.
        if checkpoints is None or asked.is_set():
            raise KeyboardInterrupt
        signalled.set()

    def keep_asking():
        # A run that is just starting takes a request for one from before its start.
        while not ended.wait(1):
            if signalled.is_set():
                stop_request.request_stop(checkpoints, "SIGTERM")
                asked.set()

    asking = threading.Thread(target=keep_asking, daemon=True)
    handlers = {signal.SIGTERM: signal.signal(signal.SIGTERM, on_sigterm)}
    try:
        asking.start()
        # exec keeps an ignored SIGINT, which a shell script's background jobs have: the trainer's must end it.
        handlers[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
        with log.open("w") as file:
            # A session of its own: Ctrl-C reaches the trainer once, from here, and not Ray's processes past it.
            process = subprocess.Popen(
                [sys.executable, "-m", module, *arguments],
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=pass_fds,
            )
        try:
            signal.signal(signal.SIGINT, handlers[signal.SIGINT])
            yield process
            process.wait()
        finally:
            # impatient further signals would leave Ray behind
            for number in handlers:
                signal.signal(number, signal.SIG_IGN)
            if process.poll() is None:
                process.send_signal(signal.SIGINT)
                process.wait()
    finally:
        ended.set()
        asking.join()
        if signalled.is_set():
            stop_request.withdraw(checkpoints)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if checkpoints is not None and process.returncode == 0 and (what := stop_request.stopped(checkpoints)):
        raise Stopped(what)


def show_failure(trainer: subprocess.Popen, log: Path) -> None:
    """Print the exit code of a trainer that failed, and the end of its log."""
    print(f"\nverl's trainer failed with exit code {trainer.returncode}; the end of {log}:", file=sys.stderr)
    print(last_lines(log), file=sys.stderr)


def last_lines(log: Path, count: int = 30) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:])


def quoted(text: str | Path) -> str:
    """The value of a hydra override, whatever characters it has: a sweep's folders are called method=cppo,seed=1."""
    return QuotedString(str(text), Quote.single).with_quotes()
