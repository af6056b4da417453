"""One run a folder: the lock that a trainer holds on its ``trainer.default_local_dir`` as long as it lives."""

import fcntl
import os
import socket
import sys
from pathlib import Path
from typing import TextIO

LOCK = "run.lock"


def hold(folder: str | Path) -> TextIO:
    """Lock a run's folder for the process that keeps the returned file open; its death frees the folder.

    Raises:
        BlockingIOError: a trainer works in the folder; the message says where it runs.
        OSError: the folder cannot be made or written to.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        file = (Path(folder) / LOCK).open("a+")
    except OSError as error:
        where, way_out = socket.gethostname(), "give this run another trainer.default_local_dir"
        raise OSError(error.errno, f"{folder} cannot be written to on {where}: {error.strerror}; {way_out}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        owner = file.read().strip() or "another process"
        raise BlockingIOError(
            f"{owner} trains in {folder} already: end it first (cppo-verl stop {folder}), or give this run another "
            "trainer.default_local_dir"
        ) from None
    except OSError as error:
        print(f"{folder} cannot be locked ({error}): nothing keeps a second run out of it", file=sys.stderr, flush=True)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
    return file
