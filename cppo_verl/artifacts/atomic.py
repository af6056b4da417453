"""Files that are replaced whole or not at all."""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(*paths: Path) -> Iterator[list[Path]]:
    """Yield one temporary path beside each of ``paths``, to be written in the body.

    When the body ends, the temporary files take the places of ``paths`` in the order given. When it raises,
    they are removed and ``paths`` keep what they held. The folders must exist. Their names are unique among all
    machines, because process ids repeat on a folder that several machines share.
    """
    temporary = [path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp") for path in paths]
    try:
        yield temporary
        for source, target in zip(temporary, paths, strict=True):
            os.replace(source, target)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
