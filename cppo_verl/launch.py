"""verl's trainer as a child process that a person may interrupt."""

import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def trainer(arguments: Sequence[str], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen]:
    """Start ``verl.trainer.main_ppo`` with its output in ``log``; at the end of the body wait for its end.

    A body that raises, as Ctrl-C does, interrupts the trainer, which then ends Ray and all that Ray started.
    """
    with log.open("w") as file:
        # A session of its own: Ctrl-C reaches the trainer once, from here, and not Ray's processes past it.
        process = subprocess.Popen(
            [sys.executable, "-m", "verl.trainer.main_ppo", *arguments],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
        process.wait()
    finally:
        if process.poll() is None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # an impatient second Ctrl-C would leave Ray behind
            process.send_signal(signal.SIGINT)
            process.wait()


def last_lines(log: Path, count: int = 30) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:])
