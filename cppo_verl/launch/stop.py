"""Ask a run to end after its current step, with a checkpoint of that step."""

import argparse
import sys
from pathlib import Path

from cppo_verl.artifacts.stop_request import request_stop, start_over


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="trainer.default_local_dir of the run")
    parser.add_argument("--reason", default="cppo-verl stop", help="for the run's log (default: %(default)s)")
    clear = "instead remove a request or an answer that an earlier run has left"
    parser.add_argument("--clear", action="store_true", help=clear)


def run(args: argparse.Namespace) -> int:
    if args.clear:  # for scripts that start a trainer, whose folder the first time is not there yet
        if (left_over := start_over(args.folder)) is not None:
            print(f"removed a request to stop that no run has obeyed: {left_over}")
        return 0
    if not args.folder.is_dir():
        print(f"no folder {args.folder}: expected the run's trainer.default_local_dir", file=sys.stderr)
        return 1
    try:
        request_stop(args.folder, args.reason)
    except OSError as error:
        print(f"the run was not asked to stop: {error}", file=sys.stderr)
        return 1
    print(f"asked the run in {args.folder} to end after its step, with a checkpoint")
    return 0
