"""Asks a running trainer to end after its current step, with a checkpoint of that step.

A request is a file ``stop`` in the run's ``trainer.default_local_dir``. Anything that writes to that folder can make
one, such as ``cppo-verl stop``, a signal handler or ``touch``, without access to the run's Ray cluster. The plug-in's
trainers look for it before their first step and after each step; one that ends because of it replaces it by a file
``stopped``. No trainer removes a request that it has not obeyed. Only who starts a trainer knows that a request is
older than the run: launchers call `start_over` first.
"""

import os
import time
from datetime import timedelta
from pathlib import Path

from cppo_verl.artifacts.atomic import replacing

REQUEST, ANSWER = "stop", "stopped"


def request_stop(folder: str | Path, reason: str) -> None:
    """Ask the run whose ``trainer.default_local_dir`` is ``folder`` to end after its step.

    Raises:
        OSError: the request cannot be written.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with replacing(Path(folder) / REQUEST) as (file,):
        file.write_text(reason)


def requested(folder: str | Path) -> str | None:
    """Return the reason of the request that waits in ``folder``, or None without one."""
    return _read(folder, REQUEST)


def waits(folder: str | Path) -> bool:
    """Return whether a request waits; False where that cannot be seen."""
    return os.path.isfile(Path(folder) / REQUEST)


def age(folder: str | Path) -> timedelta:
    """Return how long the request in ``folder`` has waited, in whole seconds; zero without one."""
    try:
        seconds = time.time() - (Path(folder) / REQUEST).stat().st_mtime
    except FileNotFoundError:
        return timedelta(0)
    return timedelta(seconds=max(0, round(seconds)))  # the file server's clock may be ahead


def withdraw(folder: str | Path) -> None:
    """Take back a request that no run has obeyed."""
    (Path(folder) / REQUEST).unlink(missing_ok=True)


def answer(folder: str | Path, what: str) -> None:
    """Replace the request by what the run has done about it."""
    with replacing(Path(folder) / ANSWER) as (file,):
        file.write_text(what)
    withdraw(folder)


def stopped(folder: str | Path) -> str | None:
    """Return the answer of the last run in ``folder``, or None if no request ended it."""
    return _read(folder, ANSWER)


def forget_answer(folder: str | Path) -> None:
    """Remove an earlier run's answer."""
    (Path(folder) / ANSWER).unlink(missing_ok=True)


def start_over(folder: str | Path) -> str | None:
    """Remove request and answer before a trainer is started; return the reason of a request that was there."""
    forget_answer(folder)
    left_over = requested(folder)
    withdraw(folder)
    return left_over


def _read(folder: str | Path, name: str) -> str | None:
    try:
        return (Path(folder) / name).read_text().strip() or "no reason given"
    except FileNotFoundError:
        return None
