"""``cppo-verl report RUN...``: one page about one or more runs, with the paper's figures drawn from their logs."""

import argparse
import sys
import warnings
from itertools import chain
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    runs = "a run's folder or metrics file, or a folder of runs"
    parser.add_argument("runs", nargs="+", metavar="[LABEL=]RUN", help=runs)
    output = "the page to write; replaces an earlier report (default: %(default)s)"
    parser.add_argument("--output", type=Path, default=Path("report.html"), help=output)
    figures = "folder for each figure as PNG and SVG (default: beside the page, NAME_figures)"
    parser.add_argument("--figures", type=Path, help=figures)
    parser.add_argument("--tokenizer", help="a local folder (default: the tokenizer that the dump names)")


def run(args: argparse.Namespace) -> int:
    """Write the page and the figures.

    Returns:
        2 if there is no run to read or the page may not or cannot be written, else 0.
    """
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

    from cppo_verl.analysis.html.figures import save_all
    from cppo_verl.analysis.report.drawing import draw
    from cppo_verl.analysis.report.page import page_values
    from cppo_verl.analysis.report.panels import Panel
    from cppo_verl.analysis.text import counted, print_notes
    from cppo_verl.evaluation.comparability import unequal

    with warnings.catch_warnings():
        # The font of the PNG files lacks some characters; readers of the page have other fonts.
        warnings.filterwarnings("ignore", r"Glyph .* missing from")
        values = page_values(runs, [*unequal(runs), *notes], args.tokenizer)
        figures = {id: [draw(x) for x in items if isinstance(x, Panel)] for id, items in values["sections"].items()}
        folder = args.figures or args.output.with_name(f"{args.output.stem}_figures")
        try:
            save_all(chain.from_iterable(figures.values()), folder)
            write_page(args.output, "report", figures=figures, **values)
        except OSError as error:
            print(f"--output {args.output}, figures in {folder}: {error}; name others", file=sys.stderr)
            return 2
    print_notes(values["notes"])
    count = sum(map(len, figures.values()))
    print(f"{args.output}: {counted(len(runs), 'run')}, {counted(count, 'figure')}, each as PNG and SVG in {folder}")
    return 0
