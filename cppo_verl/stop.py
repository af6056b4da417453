"""``python -m cppo_verl stop``: ask a run to end after the step it is at, with a checkpoint of that step.

A request is a file ``stop`` in the run's ``trainer.default_local_dir``, so that whatever writes to that folder can make
one (this command, `cppo_verl.launch` at SIGTERM, a Slurm script's trap, ``touch``), from any machine that shares it and
with neither the address nor the token of the run's Ray cluster. The plug-in's trainers look for it before their first
step and at the end of each; one that ends for it puts ``stopped`` in its place. Both files go when the next run starts
in the folder: a request from before that stops nothing.
"""

import argparse
import sys
from pathlib import Path

from cppo_verl.atomic import replacing

REQUEST, ANSWER = "stop", "stopped"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="trainer.default_local_dir of the run")
    parser.add_argument("--reason", default="python -m cppo_verl stop", help="for the run's log (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    if not args.folder.is_dir():
        print(f"no folder {args.folder}: expected the run's trainer.default_local_dir", file=sys.stderr)
        return 1
    request_stop(args.folder, args.reason)
    print(f"asked the run in {args.folder} to end after its step, with a checkpoint")
    return 0


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
