"""``python -m cppo_verl inspect DUMP``: which tokens each method and setting would mask, where and why.

Tables here, and a page where the tokens of chosen responses are coloured by their divergence or by who masks them.
Every method is judged on the tokens that the run's own policies wrote; had it trained, later steps would have had
other tokens.
"""

import argparse
import sys
from pathlib import Path
from textwrap import fill


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dump", type=Path, help="a dump of tokens: one file, its folder, or the folder of a run")
    parser.add_argument(
        "--method",
        action="append",
        metavar="'NAME OVERRIDES'",
        help="a method with hydra overrides, as in 'cppo trust_region.delta=0.1'; 'run' is the run's own; may be "
        "repeated; default: the run's own and every method that the package ships, at the run's thresholds",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("inspect.html"),
        help="the page; one that this command made is replaced (default: %(default)s)",
    )
    parser.add_argument("--tokenizer", help="a local folder; default: the one that the dump names")
    parser.add_argument(
        "--responses", type=int, default=24, help="at most so many in the page (default: %(default)s); tables have all"
    )
    parser.add_argument("--step", type=int, nargs="+", help="only these; default: all that the dump has")


def run(args: argparse.Namespace) -> int:
    """Print the tables and write the page; 2 if there is nothing to read or an argument is wrong, 1 if no method can
    be judged."""
    from cppo_verl.analysis.html.page import refuse_foreign, write_page
    from cppo_verl.analysis.inspect import page
    from cppo_verl.evaluation.table import markdown

    try:
        if args.responses < 1:
            raise ValueError(f"--responses {args.responses}: at least 1")
        refuse_foreign(args.output, "inspect")
        look = page.read(args.dump, args.step)
        settings = page.settings(look, args.method)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if not settings:
        _print_notes(look.notes)
        print("no method is left that this dump can judge", file=sys.stderr)
        return 1
    values = page.page_values(look, settings, args.responses, args.tokenizer)
    print(values["summary"])
    for table in values["tables"]:
        print(f"\n{table.title}\n{fill(table.caption, 100)}\n\n{markdown(table.header, table.text())}")
    _print_notes(look.notes)
    try:
        write_page(args.output, "inspect", title=f"cppo_verl inspect: {args.dump}", **values)
    except OSError as error:
        print(f"--output {args.output}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"\n{args.output}: {len(values['data']['responses'])} of {len(look.responses)} responses, token by token")
    return 0


def _print_notes(notes: list[str]) -> None:
    for note in notes:
        print(f"passed over: {note}", file=sys.stderr)
