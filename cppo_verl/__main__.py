"""``python -m cppo_verl <command>``."""

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m cppo_verl", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    doctor = commands.add_parser(
        "doctor",
        help="check this environment, and the settings that decide where mu comes from",
        description="Reports versions, what is registered here and in a Ray worker, the device, and for a training "
        "command's overrides where mu will come from. Exits with 1 if anything would break a run.",
    )
    doctor.add_argument("--no-ray", action="store_true", help="do not start Ray to look inside a worker")
    doctor.add_argument("overrides", nargs="*", help="the hydra overrides of a verl.trainer.main_ppo command")
    args = parser.parse_args(argv)

    from cppo_verl.doctor import diagnose

    return diagnose(args.overrides, with_ray=not args.no_ray)


if __name__ == "__main__":
    sys.exit(main())
