"""``python -m cppo_verl calibrate DUMP``: thresholds that mask a wanted share of a run's tokens.

Thresholds do not carry over between models: the smaller the model, the further one update moves it. What a run dumped
of its tokens (trust_region.dump.every=5) tells which delta and delta_b would have masked as much as is wanted.
"""

import argparse
import sys
from pathlib import Path

from cppo_verl.evaluation.table import markdown

MASKED_SHARE, BUDGET_SHARE = 0.05, 0.7
"""Defaults, ours: the paper prints neither share. On two dumps of the quickstart they give a ratio delta_b : delta of
0.09 and 0.15, the paper's being 0.1 to 0.13: outliers are left to delta, and most of the masking to the prefix budget,
which sets CPPO apart from DPPO."""
UPDATES_SHOWN = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dump", type=Path, metavar="DUMP", help="a dump of tokens: its folder, or the run's")
    parser.add_argument(
        "--masked-share",
        type=_share,
        default=MASKED_SHARE,
        help="of the generated tokens, what trust_region/masked_share is to be (default: %(default)s)",
    )
    parser.add_argument(
        "--budget-share",
        type=_share,
        help="of the masked tokens, what trust_region/budget_rejected_share is to be: those that only the prefix "
        f"budget rejects (default: {BUDGET_SHARE})",
    )
    parser.add_argument(
        "--method", metavar='"NAME OVERRIDES"', help="whose thresholds; default: the run's own, or cppo"
    )
    parser.add_argument("--from-step", type=int, default=0, help="leave earlier steps out")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("calibrate.html"),
        help="the page; its pictures go beside it. A page of this command is replaced (default: %(default)s)",
    )


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no share: a number between 0 and 1, such as 0.05")
    return value


def run(args: argparse.Namespace) -> int:
    """Print thresholds to paste and write the page; 1 if nothing does what is wanted, 2 if there is nothing to read."""
    from cppo_verl.analysis.calibrate.page import listed, page_values, sample_of
    from cppo_verl.analysis.calibrate.thresholds import Unreachable, Wanted, lacks, propose
    from cppo_verl.analysis.html.page import refuse_foreign, write_page
    from cppo_verl.artifacts.token_dump import read_tokens

    try:
        refuse_foreign(args.output, "calibrate")
        dump = read_tokens(args.dump)
    except (FileNotFoundError, ValueError) as error:
        return _refuse(str(error), 2)
    notes = list(dump.notes)
    for note in notes:
        print(note, file=sys.stderr)
    responses = [r for r in dump.responses if r.step >= args.from_step and r.mask.any()]
    if not responses:
        steps = sorted({r.step for r in dump.responses})
        has = f"it has steps {listed(steps)}" if steps else "see what was skipped"
        return _refuse(f"no response to read in {args.dump} from step {args.from_step} on: {has}", 2)
    try:
        sample = sample_of(args.method, responses, dump.headers, notes)
    except ValueError as error:
        return _refuse(str(error), 2)
    for note in notes[len(dump.notes) :]:
        print(note, file=sys.stderr)
    if sample.rule.budget == "none" and args.budget_share is not None:
        return _refuse(f"--budget-share={args.budget_share}, but {sample.setting.label} has no prefix budget", 2)
    missing = lacks(responses)
    if missing:
        return _refuse(f"{args.dump}: {missing}", 1)
    by_budget = None if sample.rule.budget == "none" else args.budget_share or BUDGET_SHARE
    wanted = Wanted(args.masked_share, by_budget)
    try:
        proposed = propose(sample, wanted)
    except Unreachable as error:
        return _refuse(str(error), 1)
    values = page_values(args.method, sample, wanted, proposed, dump.headers, notes)
    _print(values)
    folder = args.output.with_name(f"{args.output.stem}_figures")
    for figure in values["figures"]:
        figure.save(folder)
    write_page(args.output, "calibrate", **values)
    print(f"\npage      {args.output}\npictures  {folder}")
    return 0


def _refuse(message: str, code: int) -> int:
    print(message, file=sys.stderr)
    return code


def _print(values: dict) -> None:
    tables = {name: (list(header), rows) for name, (header, rows) in values["tables"].items()}
    print(f"{values['summary']}\n\n{values['overrides']}\n\n{values['promise']}.\n{values['check']}\n")
    print(markdown(*tables["thresholds"]), "\n")
    print("What else could be chosen, the other threshold as proposed:\n" + markdown(*tables["curves"]), "\n")
    header, rows = tables["updates"]
    print("By update of a batch, as proposed:\n" + markdown(header, rows[:UPDATES_SHOWN]))
    if len(rows) > UPDATES_SHOWN:
        print(f"and {len(rows) - UPDATES_SHOWN} more in the page")
    print(f"By step: {', '.join(f'{row[0]}: {row[2]}' for row in tables['steps'][1][:UPDATES_SHOWN])}\n")
    print("Engine mismatch (first update) and policy drift (later ones):\n" + markdown(*tables["drift"]))
    print(values["mismatch"])
    for warning in values["warnings"]:
        print(f"\nwarning: {warning}")
