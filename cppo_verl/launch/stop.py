"""Ask a run to end after its current step, with a checkpoint of that step."""

import argparse
import sys
from pathlib import Path

from cppo_verl.artifacts.run_lock import LOCK
from cppo_verl.artifacts.stop_request import request_stop


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="trainer.default_local_dir of the run")
    parser.add_argument("--reason", default="cppo-verl stop", help="for the run's log (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    if not args.folder.is_dir():
        print(f"no folder {args.folder}: expected the run's trainer.default_local_dir", file=sys.stderr)
        return 1
    try:
        request_stop(args.folder, args.reason)
    except OSError as error:
        print(f"the run was not asked to stop: {error}", file=sys.stderr)
        return 1
    if not (args.folder / LOCK).exists():  # one that is only starting has none yet
        where = f"unless one is starting there, {args.folder} is not its trainer.default_local_dir"
        print(f"no run has begun in {args.folder}: {where}", file=sys.stderr)
    print(f"asked the run in {args.folder} to end after its step, with a checkpoint")
    return 0
