"""Files that are replaced whole or not at all."""

import os
from contextlib import contextmanager


@contextmanager
def replacing(*paths):
    """Yield one temporary path beside each of ``paths``, to be written in the body.

    When the body ends, the temporary files take the places of ``paths`` in the order given; when it raises,
    they are removed and ``paths`` keep what they held. The folders must exist.
    """
    temporary = [path.with_name(f"{path.name}.{os.getpid()}.tmp") for path in paths]
    try:
        yield temporary
        for source, target in zip(temporary, paths, strict=True):
            os.replace(source, target)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
