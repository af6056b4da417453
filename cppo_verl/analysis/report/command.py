"""``python -m cppo_verl report RUN...``: runs as one page, with the figures of the paper from their own logs."""

import argparse
import sys
import warnings
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", metavar="[LABEL=]RUN", help="a run's folder or metrics file, or a folder of runs"
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("report.html"),
        help="the page; an earlier report there is replaced (default: %(default)s)",
    )
    parser.add_argument(
        "--figures", type=Path, help="folder for each figure as PNG and SVG (default: beside the page, NAME_figures)"
    )
    parser.add_argument("--tokenizer", help="folder; default: the one that the dump names, if it is on this machine")


def run(args: argparse.Namespace) -> int:
    """Write the page and the figures; 2 if there is no run to read or the page may not be written."""
    from cppo_verl.analysis.html.page import refuse_foreign, write_page
    from cppo_verl.artifacts.run_reader import labelled, read_runs

    try:
        refuse_foreign(args.output, "report")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    runs, notes = [], []
    for text in args.runs:
        try:
            runs += read_runs(*labelled(text))
        except FileNotFoundError as error:
            notes.append(f"skipped: {error}")
    runs = list({item.path.resolve(): item for item in runs}.values())
    if not runs:
        print(*notes, "no run to report on: give a folder that holds a run's metrics", sep="\n", file=sys.stderr)
        return 2

    from cppo_verl.analysis.report.page import Overview

    with warnings.catch_warnings():
        # A PNG has boxes in the place of characters that the font lacks; a page's reader has other fonts.
        warnings.filterwarnings("ignore", r"Glyph .* missing from")
        overview = Overview(runs, notes, args.tokenizer)
        write_page(args.output, "report", overview=overview)
        folder = args.figures or args.output.with_name(f"{args.output.stem}_figures")
        for figure in overview.figures:
            figure.save(folder)
    for note in overview.notes:
        print(note, file=sys.stderr)
    print(f"{args.output}: {len(runs)} run(s), {len(overview.figures)} figures, each as PNG and SVG in {folder}")
    return 0
