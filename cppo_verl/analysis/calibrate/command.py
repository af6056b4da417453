"""``cppo-verl calibrate DUMP``: thresholds that mask a wanted share of a run's tokens.

Thresholds do not carry over between models: the smaller the model, the further one update moves it. A run's token dump
(trust_region.dump.every=5) tells which delta and delta_b would have masked the wanted share.
"""

import argparse
import sys
from pathlib import Path

MASKED_SHARE, BUDGET_SHARE = 0.05, 0.7
"""Our defaults; the paper prints neither share. On two dumps of the quickstart they give delta_b / delta = 0.09 and
0.15, where the paper has 0.1 to 0.13: delta handles outliers, and the prefix budget, which is what sets CPPO apart from
DPPO, does most of the masking."""
ROWS_IN_TERMINAL = 13


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dump", type=Path, metavar="DUMP", help="a token dump: its folder, or the folder of its run")
    masked = "the wanted trust_region/masked_share, a share of the generated tokens (default: %(default)s)"
    parser.add_argument("--masked-share", type=_share, default=MASKED_SHARE, help=masked)
    by_budget = "the wanted trust_region/budget_rejected_share, the share of the masked tokens that only the prefix "
    by_budget += f"budget rejects (default: {BUDGET_SHARE})"
    parser.add_argument("--budget-share", type=_share, help=by_budget)
    method = "the method to find thresholds for (default: the run's own, or cppo)"
    parser.add_argument("--method", metavar='"NAME OVERRIDES"', help=method)
    parser.add_argument("--from-step", type=int, default=0, help="leave out earlier steps")
    output = "the page to write, with its pictures beside it; replaces an earlier page of this command "
    parser.add_argument("--output", type=Path, default=Path("calibrate.html"), help=f"{output}(default: %(default)s)")


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a share: give a number between 0 and 1, such as 0.05")
    return value


def run(args: argparse.Namespace) -> int:
    """Print thresholds to paste and write the page.

    Returns:
        1 if no thresholds do what is wanted, 2 if there is nothing to read, an argument is wrong or the page cannot be
        written, else 0.
    """
    from cppo_verl.analysis.calibrate import figures
    from cppo_verl.analysis.calibrate.page import Results, page_values
    from cppo_verl.analysis.calibrate.thresholds import Unreachable, propose, sample_of
    from cppo_verl.analysis.html.figures import save_all
    from cppo_verl.analysis.html.page import refuse_foreign, write_page
    from cppo_verl.analysis.text import listed, print_notes
    from cppo_verl.artifacts.token_dump import read_tokens

    notes: list[str] = []
    try:
        refuse_foreign(args.output, "calibrate")
        dump = read_tokens(args.dump)
        notes += dump.notes
        responses = [r for r in dump.responses if r.step >= args.from_step and r.mask.any()]
        if not responses:
            present = sorted({r.step for r in dump.responses})
            has = f"it has steps {listed(present)}" if present else "see the notes"
            raise ValueError(f"no response to read in {args.dump} from step {args.from_step} on: {has}")
        sample = sample_of(args.method, responses, dump.headers, notes)
        budget = sample.rule.budget != "none"
        if not budget and args.budget_share is not None:
            raise ValueError(
                f"--budget-share={args.budget_share}, but {sample.setting.label} has no prefix budget: leave it out, "
                "or choose a method with a budget, such as --method cppo"
            )
        by_budget = args.budget_share or BUDGET_SHARE if budget else None
        results = Results(sample, args.masked_share, propose(sample, args.masked_share, by_budget))
    except (FileNotFoundError, ValueError) as error:
        print_notes(notes)
        unreachable = isinstance(error, Unreachable)
        print(f"{args.dump}: {error}" if unreachable else error, file=sys.stderr)
        return 1 if unreachable else 2
    print_notes(notes)
    values = page_values(results, notes)
    _print(values)
    drawn = figures.draw(results)
    folder = args.output.with_name(f"{args.output.stem}_figures")
    try:
        save_all(drawn, folder)
        write_page(args.output, "calibrate", figures=drawn, **values)
    except OSError as error:
        print(f"--output {args.output}, figures in {folder}: {error}; name another", file=sys.stderr)
        return 2
    print(f"\npage      {args.output}\npictures  {folder}")
    return 0


def _print(values: dict) -> None:
    from cppo_verl.analysis.html.page import caption

    print(f"{values['summary']}\n\n{values['overrides']}\n\n{values['promise']}\n{caption('check')}")
    for table in values["tables"]:
        print(f"\n{table.terminal(caption(table.name, table=table, results=values['results']), ROWS_IN_TERMINAL)}")
    for warning in values["warnings"]:
        print(f"\nwarning: {warning}")
