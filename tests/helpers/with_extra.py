"""Runs cppo-verl commands as if this package were installed with one of its extras alone.

python tests/helpers/with_extra.py EXTRA COMMAND...
"""

import sys
from importlib.machinery import PathFinder
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def missing_with(extra):
    """Modules installed here that an installation of this package with ``extra`` would not bring, by their metadata."""
    found, open_ends = set(), [("cppo-verl", extra)]
    while open_ends:
        name, extra = open_ends.pop()
        if (name, extra) in found:
            continue
        found.add((name, extra))
        try:
            lines = requires(name) or []
        except PackageNotFoundError:  # what torch brings along for CUDA
            continue
        for requirement in map(Requirement, lines):
            if not requirement.marker or requirement.marker.evaluate({"extra": extra}):
                open_ends += [(canonicalize_name(requirement.name), e) for e in ("", *requirement.extras)]
    names = {name for name, _ in found}
    return {top for top, owners in packages_distributions().items() if not names & set(map(canonicalize_name, owners))}


hidden = missing_with(sys.argv[1])
assert {"vllm", "transfer_queue", "pytest"} < hidden and not {"torch", "verl", "matplotlib"} & hidden


class Without(PathFinder):
    """Finds hidden packages only where another package brings its own copy, as Ray does."""

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name in hidden:
            path = [folder for folder in sys.path if not folder.endswith("site-packages")]
        return super().find_spec(name, path, target)


sys.meta_path[:] = [Without if finder is PathFinder else finder for finder in sys.meta_path]

from cppo_verl.cli import main  # noqa: E402

for command in sys.argv[2:]:
    assert main(command.split()) == 0, command
