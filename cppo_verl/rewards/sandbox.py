"""A verifier in a child process with a time and a memory limit.

A verifier is Python and regular expressions on text that a model wrote. It can loop inside one C call, exhaust memory,
overflow the stack or exit, and nothing inside its own process can stop that. So it runs in a child, which is killed at
the limit and replaced. The child has this process's rights: it contains accidents, not attacks.

The child is this file, started by its path: Python then puts this folder on the child's ``sys.path`` until `_serve`
replaces it, so no module in this folder may be named like one of the standard library.
"""

import logging
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


logger = logging.getLogger(__name__)
# A level of its own, as verl's modules have: importing verl's vLLM server raises the root logger's to errors.
logger.setLevel(os.getenv("VERL_LOGGING_LEVEL", "WARN"))


class Grade(NamedTuple):
    """What became of one answer. A lost one, ``timed_out`` or ``crashed``, scores 0."""

    score: float
    timed_out: bool = False
    crashed: bool = False

    def metrics(self) -> dict[str, float]:
        """Return what a reward reports beside its score: ``acc`` is 1 for a score of at least 1, else 0."""
        return {"acc": float(self.score >= 1), "timed_out": float(self.timed_out), "crashed": float(self.crashed)}


class Sandbox:
    """One verifier in a process of its own, started at the first answer and replaced after a loss.

    ``loader`` names a function in the Python file ``file``. It takes nothing, returns ``verify(answer, truth) ->
    score``, runs in the child and raises ImportError for a missing library.
    """

    def __init__(self, file: str, loader: str):
        self._source = file, loader
        self._reset()
        os.register_at_fork(after_in_child=self._reset)  # a fork must not talk over its parent's pipe

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen | None = None
        self._pipe: Connection | None = None

    def grade(self, data_source: str, answer: str, truth: list[str], time_limit: float) -> Grade:
        """Compare ``answer`` with the ``truth`` within ``time_limit`` seconds of wall clock.

        Neither the child's start nor the wait for other threads counts towards the limit. The log has lost answers, by
        their ``data_source``. Raises ValueError for a limit that is not a positive number, ImportError if the loader
        lacks a library, RuntimeError if the child does not start.
        """
        if not 0 < time_limit < math.inf:
            raise ValueError(f"time_limit must be a positive number of seconds, got {time_limit!r}")
        grade = self._grade(answer, truth, time_limit)
        if grade.timed_out or grade.crashed:
            what = f"not graded within {time_limit} s" if grade.timed_out else "the verifier died or raised"
            logger.warning("%s answer counted as wrong, %s: ...%r", data_source, what, answer[-200:])
        return grade

    def _grade(self, answer: str, truth: list[str], time_limit: float) -> Grade:
        with self._lock:
            reusable = False
            try:
                pipe = self._running()
                pipe.send((answer, truth, time_limit))
                if not pipe.poll(time_limit):
                    return Grade(0.0, timed_out=True)
                score, crashed, reusable = pipe.recv()
                return Grade(score, crashed=crashed)
            except (EOFError, OSError):
                return Grade(0.0, crashed=True)
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
                        # numpy would reserve address space for a thread a core, on large machines all there is.
                        env=os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
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
        answer, truth, time_limit = pipe.recv()
        signal.setitimer(signal.ITIMER_REAL, time_limit + 2.0)  # later than a parent that is still there
        try:
            score, crashed = float(verify(answer, truth)), False
        except Exception:
            score, crashed = 0.0, True
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        # Caches grow. A child near its limit would find right answers wrong, so it is replaced at half of it.
        in_use = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        pipe.send((score, crashed, in_use < memory / 2))


if __name__ == "__main__":
    try:
        _serve(Connection(int(sys.argv[1])))
    except (EOFError, OSError):
        sys.exit()  # the parent is gone, or has given up on this child
