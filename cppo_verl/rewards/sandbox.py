"""A verifier in a child process with a time and a memory limit.

A verifier is Python and regular expressions on text that a model wrote. It can loop inside one C call, exhaust memory
or overflow the stack, and nothing inside its own process can stop that. So it runs in a child, which is killed at the
limit and replaced.

The child is this file, started by its path: Python then puts this folder on the child's ``sys.path`` until `_serve`
replaces it, so no module in this folder may be named like one of the standard library.
"""

import math
import os
import resource
import runpy
import signal
import subprocess
import sys
import threading
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

MEMORY_BYTES = 1 << 30
"""Address space of a child; an idle one takes less than a tenth of it."""
START_SECONDS = 120.0
"""Time for a child's imports, which may come from a slow shared disk."""


class Grade(NamedTuple):
    """What became of one answer. A lost one, ``timed_out`` or ``crashed``, is not right."""

    right: bool
    timed_out: bool = False
    crashed: bool = False


class Sandbox:
    """One verifier in a process of its own, started at the first answer and replaced after a loss.

    ``loader`` names a function in the Python file ``file``. It takes nothing, returns ``verify(answer, accepted) ->
    bool``, runs in the child and raises ImportError for a missing library.
    """

    def __init__(self, file: str, loader: str):
        self._source = file, loader
        self._reset()
        os.register_at_fork(after_in_child=self._reset)  # a fork must not talk over its parent's pipe

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._pipe: Connection | None = None

    def grade(self, answer: str, accepted: list[str], time_limit: float) -> Grade:
        """Compare ``answer`` with the ``accepted`` ones within ``time_limit`` seconds of wall clock.

        Neither the child's start nor the wait for other threads counts towards the limit. Raises ValueError for a limit
        that is not a positive number, ImportError if the loader lacks a library, RuntimeError if the child does not
        start.
        """
        if not 0 < time_limit < math.inf:
            raise ValueError(f"time_limit must be a positive number of seconds, got {time_limit!r}")
        with self._lock:
            reusable = False
            try:
                pipe = self._running()
                pipe.send((answer, accepted, time_limit))
                if not pipe.poll(time_limit):
                    return Grade(False, timed_out=True)
                right, crashed, reusable = pipe.recv()
                return Grade(right, crashed=crashed)
            except (EOFError, OSError):
                return Grade(False, crashed=True)
            finally:
                # Also if this thread was interrupted: a late grade must not be taken for the next answer's.
                if not reusable:
                    self.stop()

    def stop(self) -> None:
        """Kill the child; the next answer starts another."""
        if self._pipe is not None:
            self._pipe.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._pipe = None

    def _running(self) -> Connection:
        """Return the pipe to a child that runs; start one if there is none."""
        if self._pipe is not None and self._process is not None and self._process.poll() is None:
            return self._pipe
        for _ in range(3):
            self.stop()
            error = f"no sign of life within {START_SECONDS:.0f} s"
            try:
                self._pipe, theirs = Pipe()
                with theirs:
                    # A new interpreter rather than a fork, because this process has threads. Not multiprocessing's
                    # spawn, which would import the main module, in a Ray worker Ray itself. What verifiers print (ANTLR
                    # complains about every odd formula) would fill the log.
                    self._process = subprocess.Popen(
                        [sys.executable, __file__, str(theirs.fileno())],
                        pass_fds=[theirs.fileno()],
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                    )
                self._pipe.send((sys.path, *self._source))
                if self._pipe.poll(START_SECONDS):
                    missing = self._pipe.recv()
                    if missing is None:
                        return self._pipe
                    raise ImportError(missing)
            except (EOFError, OSError) as lost:
                error = f"exit status {self._process.wait()}" if self._process else repr(lost)
        raise RuntimeError(f"the process of the verifier {self._source[1]} does not start: {error}")


def _serve(pipe: Connection) -> None:
    """Run in the child: load the verifier, then grade one answer per request until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent to handle
    # The kernel ends a stuck child even if the parent, which would kill it, is gone.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    memory = MEMORY_BYTES if most == resource.RLIM_INFINITY else min(MEMORY_BYTES, most)
    resource.setrlimit(resource.RLIMIT_AS, (memory, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    sys.path[:], file, loader = pipe.recv()
    try:
        verify = runpy.run_path(file)[loader]()
    except Exception as error:
        pipe.send(str(error) if isinstance(error, ImportError) else repr(error))
        return
    pipe.send(None)
    while True:
        answer, accepted, time_limit = pipe.recv()
        signal.setitimer(signal.ITIMER_REAL, time_limit + 2.0)  # later than a parent that is still there
        try:
            right, crashed = bool(verify(answer, accepted)), False
        except Exception:
            right, crashed = False, True
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        # Caches grow. A child near its limit would find right answers wrong, so it is replaced at half of it.
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        pipe.send((right, crashed, in_use < memory / 2))


if __name__ == "__main__":
    try:
        _serve(Connection(int(sys.argv[1])))
    except (EOFError, OSError):
        sys.exit()  # the parent is gone, or has given up on this child
