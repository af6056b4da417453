"""Makes the study's tables and pictures anew from its raw results.

    python -m studies.trust_regions.report

Rewrites the tables of the page between their markers, and the pictures beside it. What has not run is named there.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context

from cppo_verl.analysis.html.figures import STYLE
from studies.trust_regions.measures import Study
from studies.trust_regions.pictures import PICTURES
from studies.trust_regions.tables import TABLES

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs" / "evidence.md"


def rewrite(page: str, study: Study) -> str:
    """The page with each ``<!-- table: NAME -->`` ... ``<!-- end -->`` filled anew.

    Raises:
        KeyError: there is no such table.
    """

    def filled(match: re.Match) -> str:
        return f"<!-- table: {match[1]} -->\n\n{TABLES[match[1]](study)}\n\n<!-- end -->"

    return re.sub(r"<!-- table: ([\w-]+) -->.*?<!-- end -->", filled, page, flags=re.DOTALL)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=HERE / "results", help="default: %(default)s")
    parser.add_argument("--page", type=Path, default=PAGE, help="default: %(default)s")
    args = parser.parse_args(argv)
    study = Study.load(args.results)
    args.page.write_text(rewrite(args.page.read_text(), study))
    folder = args.page.parent / "pictures"
    folder.mkdir(exist_ok=True)
    for name, draw in PICTURES.items():
        with rc_context(STYLE):
            draw(study).savefig(folder / f"evidence_{name}.png", dpi=150)
    counts = ", ".join(f"{len(part)} of the {name}" for name, part in study._asdict().items())
    print(f"{args.page}: cells {counts}")


if __name__ == "__main__":
    main()
