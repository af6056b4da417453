"""``python -m cppo_verl report RUN...``: runs as one page, with the figures of the paper from their own logs."""

import argparse
import sys
import warnings
from pathlib import Path

MADE_BY = "cppo_verl report"


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
    """Write the page and the figures; 2 if there is no run to read, 1 if the page may not be written."""
    from cppo_verl.runs import labelled, read_runs

    if args.output.is_dir():
        print(f"{args.output} is a folder: give --output a file's name", file=sys.stderr)
        return 2
    if args.output.exists() and not _is_report(args.output):
        print(f"{args.output} is no page of this command and is left as it is: give another --output", file=sys.stderr)
        return 1
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

    from cppo_verl.look.overview import Overview
    from cppo_verl.look.page import write_page

    with warnings.catch_warnings():
        # A PNG has boxes in the place of characters that the font lacks; a page's reader has other fonts.
        warnings.filterwarnings("ignore", r"Glyph .* missing from")
        overview = Overview(runs, notes, args.tokenizer)
        write_page(args.output, "report.html", made_by=MADE_BY, overview=overview)
        folder = args.figures or args.output.with_name(f"{args.output.stem}_figures")
        for figure in overview.figures:
            figure.save(folder)
    for note in overview.notes:
        print(note, file=sys.stderr)
    print(f"{args.output}: {len(runs)} run(s), {len(overview.figures)} figures, each as PNG and SVG in {folder}")
    return 0


def _is_report(path: Path) -> bool:
    with path.open("rb") as file:
        return f'<meta name="generator" content="{MADE_BY}">'.encode() in file.read()
