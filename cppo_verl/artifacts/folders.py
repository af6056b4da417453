"""The files of a folder, where parts of it are links, such as checkpoints that lie on another disk."""

import os
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path


def files_below(folder: Path, pattern: str) -> Iterator[Path]:
    """Files in ``folder`` and below it whose names fit the pattern; each folder once, however many links lead to it."""
    entered = set()
    for place, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(place)
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        # A folder is named by its own path rather than by a link beside it.
        folders.sort(key=lambda name: (os.path.islink(os.path.join(place, name)), name))
        paths = (Path(place, name) for name in names if fnmatch(name, pattern))
        yield from (path for path in paths if not path.is_fifo())  # reading one waits for ever
