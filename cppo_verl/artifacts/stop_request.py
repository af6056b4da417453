"""Asks a running trainer to end after the step it is at, with a checkpoint of that step.

A request is a file ``stop`` in the run's ``trainer.default_local_dir``. Anything that writes to that folder can make
one: ``cppo-verl stop``, the signal handlers of `cppo_verl.launch`, a Slurm script's trap, ``touch``. It needs neither
the address nor the token of the run's Ray cluster. The plug-in's trainers look for it before their first step and at
the end of each step; one that ends because of it puts a file ``stopped`` in its place.
"""

from pathlib import Path

from cppo_verl.artifacts.atomic import replacing

REQUEST, ANSWER = "stop", "stopped"


def request_stop(folder: str | Path, reason: str) -> None:
    """Ask the run whose ``trainer.default_local_dir`` is ``folder`` to end after its step."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with replacing(Path(folder) / REQUEST) as (file,):
        file.write_text(reason)


def requested(folder: str | Path) -> str | None:
    """The reason of a request that waits in ``folder``, or None where there is none."""
    return _read(folder, REQUEST)


def answer(folder: str | Path, what: str) -> None:
    """Say what the run has done about the request, in its place."""
    with replacing(Path(folder) / ANSWER) as (file,):
        file.write_text(what)
    withdraw(folder)


def stopped(folder: str | Path) -> str | None:
    """What the last run in ``folder`` said if it ended for a request, None if it did not or another has started."""
    return _read(folder, ANSWER)


def withdraw(folder: str | Path) -> None:
    (Path(folder) / REQUEST).unlink(missing_ok=True)


def start_over(folder: str | Path) -> str | None:
    """Remove what earlier runs have left; return the reason of a request that none has answered."""
    (Path(folder) / ANSWER).unlink(missing_ok=True)
    left_over = requested(folder)
    withdraw(folder)
    return left_over


def _read(folder: str | Path, name: str) -> str | None:
    try:
        return (Path(folder) / name).read_text().strip() or "no reason given"
    except FileNotFoundError:
        return None
