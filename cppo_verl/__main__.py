"""``python -m cppo_verl <command>``."""

import argparse
import importlib
import sys

COMMANDS = {
    "calibrate": ("look.calibrate", "thresholds for a wanted masked share, from a run's dump of tokens"),
    "cluster": ("cluster", "one command on several nodes: Slurm, given hosts, a Ray job"),
    "doctor": ("doctor", "check this environment, and the settings that decide where mu comes from"),
    "evaluate": ("evaluate", "Avg@n, pass@k and intervals of a checkpoint, by verl's own validation"),
    "prepare": ("prepare", "public data sets as parquet files in verl's schema"),
    "stop": ("stop", "ask a run to end after its step, with a checkpoint"),
    "table": ("table", "many runs in one table, scored as the paper does"),
}
"""{name: (module of this package with ``add_arguments(parser)`` and ``run(args) -> exit code``, help)}."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cppo_verl", description=__doc__)
    commands = parser.add_subparsers(dest="command_name", required=True)
    modules = {}
    for name, (module, text) in COMMANDS.items():
        modules[name] = importlib.import_module(f"cppo_verl.{module}")
        modules[name].add_arguments(commands.add_parser(name, help=text, description=modules[name].__doc__))
    args = parser.parse_args(argv)
    return modules[args.command_name].run(args)


if __name__ == "__main__":
    sys.exit(main())
