"""Tools for CPPO runs in verl: check an environment, prepare data, evaluate checkpoints, analyse runs."""

import argparse
import importlib
import io
import os
import re
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version

COMMANDS = {
    "calibrate": ("analysis.calibrate.command", "find thresholds that mask a wanted share of a run's tokens"),
    "doctor": ("doctor.checks", "check this environment and a training command's settings, without training"),
    "evaluate": ("evaluation.evaluate", "score a checkpoint by verl's own validation: Avg@n, pass@k, intervals"),
    "inspect": ("analysis.inspect.command", "show which tokens of a run each method would mask, where and why"),
    "mismatch": (
        "analysis.mismatch",
        "measure, before a run, whether its engines' mismatch would spend its trust region",
    ),
    "prepare": ("data.prepare", "write public data sets as parquet files in verl's schema"),
    "report": ("analysis.report.command", "draw one or more runs as one page, from their logs and token dumps"),
    "stop": ("launch.stop", "ask a run to end after its current step, with a checkpoint"),
    "table": ("evaluation.table", "score many runs as the paper does, in one table"),
}
"""{name: (module of this package with ``add_arguments(parser)`` and ``run(args) -> exit code``, what it does)}."""

OF_A_COMMAND = ["doctor", "evaluate", "mismatch"]
"""The commands that take the arguments of a training command."""
INSTALL = dict.fromkeys(COMMANDS, "pip install 'cppo-verl[tools]', or '.[tools]' in a checkout")
INSTALL |= dict.fromkeys(OF_A_COMMAND, "pip install 'cppo-verl[gpu]', or `make install` in a checkout for the CPU")
"""{name: how to get all that the command needs}."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Only the chosen command's module is imported.

    ``--help`` needs nothing but the standard library. Packages that the command needs and does not find are named on
    stderr with the way to install them, before the command does anything; the exit code is then 1.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # paths, and what files say, may hold what no encoding has
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    parser = argparse.ArgumentParser(prog="cppo-verl", description=__doc__)
    commands = parser.add_subparsers(dest="command_name", metavar="COMMAND", required=True)
    parsers = {name: commands.add_parser(name, help=text) for name, (_, text) in COMMANDS.items()}
    # No option precedes the command, so that the first argument names it.
    chosen = arguments[0] if arguments else ""
    if chosen not in parsers:
        parser.parse_args(arguments)  # prints the help or the error, and exits
    asks_help = {"-h", "--help"} & set(arguments)
    missing = [] if asks_help else [name for name in _needed(chosen) if not _installed(name)]
    try:
        if not missing:
            module = importlib.import_module(f"cppo_verl.{COMMANDS[chosen][0]}")
            parsers[chosen].description = module.__doc__
            module.add_arguments(parsers[chosen])
            parsed, unknown = parser.parse_known_args(arguments)
            if unknown:
                way_out = "; the arguments of a training command stand after --" if chosen in OF_A_COMMAND else ""
                parsers[chosen].error(f"unrecognized arguments: {' '.join(unknown)}{way_out}")
            code = module.run(parsed)
            sys.stdout.flush()
            return code
    except BrokenPipeError:  # whoever reads the output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at the end
        return 1
    except ModuleNotFoundError as error:
        if not error.name or error.name.partition(".")[0] == "cppo_verl":
            raise
        missing = [error.name]
    print(f"cppo-verl {chosen} needs {', '.join(missing)}, not installed here: {INSTALL[chosen]}", file=sys.stderr)
    return 1


def _needed(command: str) -> list[str]:
    """The packages that a command needs: those of the extra ``tools``, and a trainer where it starts one."""
    if command in ("doctor", "stop"):
        return []
    try:
        lines = requires("cppo-verl") or []
    except PackageNotFoundError:  # a checkout that is not installed
        return []
    tools = [re.split(r"[^\w.-]", line)[0] for line in lines if line.endswith('extra == "tools"')]
    return [*tools, "TransferQueue"] if command in ("evaluate", "mismatch") else tools


def _installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False
