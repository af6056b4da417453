"""``cppo-verl inspect DUMP``: which tokens each method would mask, where and why.

It prints tables and writes a page in which the tokens of some responses are coloured by their divergence or by the
methods that mask them. Every method decides about the tokens that the run's own policies wrote; had it trained, later
steps would have had other tokens.
"""

import argparse
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dump", type=Path, help="a token dump: one file, its folder, or the folder of a run")
    method = "a method with hydra overrides, such as 'cppo trust_region.delta=0.1'; 'run' is the run's own; may be "
    method += "repeated (default: the run's own and every shipped method, at the run's thresholds)"
    parser.add_argument("--method", action="append", metavar="'NAME OVERRIDES'", help=method)
    output = "the page to write; replaces an earlier page of this command (default: %(default)s)"
    parser.add_argument("--output", type=Path, default=Path("inspect.html"), help=output)
    parser.add_argument("--tokenizer", help="a local folder (default: the tokenizer that the dump names)")
    responses = "most responses in the page (default: %(default)s); the tables always cover all"
    parser.add_argument("--responses", type=int, default=24, help=responses)
    parser.add_argument("--step", type=int, nargs="+", help="only these steps (default: all that the dump has)")


def run(args: argparse.Namespace) -> int:
    """Print the tables and write the page.

    Returns:
        2 if there is nothing to read or an argument is wrong, 1 if no method can be replayed, else 0.
    """
    from cppo_verl.analysis.html.page import caption, refuse_foreign, write_page
    from cppo_verl.analysis.inspect import methods, page
    from cppo_verl.analysis.text import print_notes

    try:
        if args.responses < 1:
            raise ValueError(f"--responses={args.responses} is not permitted: give at least 1")
        refuse_foreign(args.output, "inspect")
        read = methods.read(args.dump, args.step)
        chosen = methods.choose(read, args.method)
    except (FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if not chosen:
        print_notes(read.notes)
        print("no method is left that can be replayed on this dump: the notes above say why", file=sys.stderr)
        return 1
    values = page.page_values(read, chosen, args.responses, args.tokenizer)
    print(values["summary"])
    for table in values["tables"]:
        print(f"\n{table.terminal(caption(table.name, table=table))}")
    print_notes(read.notes)
    try:
        write_page(args.output, "inspect", title=f"cppo_verl inspect: {args.dump}", **values)
    except OSError as error:
        print(f"--output {args.output}: {error.strerror}", file=sys.stderr)
        return 1
    print(f"\n{args.output}: {len(values['data']['responses'])} of {len(read.responses)} responses, token by token")
    return 0
