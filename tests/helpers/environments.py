"""Environments that hold this package with one of its extras, as links to the files installed here."""

from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def closure(extra):
    """The distributions that an installation of this package with ``extra`` brings, by their metadata."""
    found, open_ends = {}, [("cppo-verl", extra)]
    while open_ends:
        name, extra = open_ends.pop()
        if (name, extra) in found:
            continue
        try:
            found[name, extra] = distribution(name)
        except PackageNotFoundError:  # what torch brings along for CUDA
            continue
        for requirement in map(Requirement, found[name, extra].requires or []):
            if not requirement.marker or requirement.marker.evaluate({"extra": extra}):
                open_ends += [(canonicalize_name(requirement.name), e) for e in ("", *requirement.extras)]
    return {name: installed for (name, _), installed in found.items() if name != "cppo-verl"}


def link(site, extra, without=()):
    """Link what the extra brings into a folder of packages, but for the distributions ``without``."""
    for name, installed in closure(extra).items():
        for top in {file.parts[0] for file in installed.files} - {"..", "__pycache__"}:
            if name not in without and not (site / top).exists():
                (site / top).symlink_to(installed.locate_file(top))
