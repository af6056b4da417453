"""The process that imports what verl's processes need, and is forked for each (`cppo_verl.cpu.forked_python`)."""

import ctypes
import fcntl
import gc
import importlib
import json
import logging
import multiprocessing.spawn
import os
import resource
import runpy
import select
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

from cppo_verl.cpu import forked_python

MODULES = ("transformers", "vllm.v1.worker.cpu_worker")
"""They bring torch and most of what takes time, but not Ray, which reads its own variables when it is imported."""
MODULES_WITH_RAY = ("verl.trainer.ppo.v1", "verl.workers.rollout.vllm_rollout.vllm_async_server")
"""Imported at the first request, with the RAY_* variables of the worker that it comes from."""
PATIENCE = 10
"""Seconds that a client has to send its request, and that forks have to end once the driver has."""
PR_SET_PDEATHSIG = 1
"""The option of prctl(2) that names the signal for a process whose parent has ended."""


class Request(NamedTuple):
    """What a client asks for: the state of the process that it stands for."""

    arguments: list[str]
    environment: dict[str, str]
    folder: str
    files: list[int]
    """Numbers of its open files."""
    most_files: tuple[int, int]
    """Soft and hard limit of their number."""
    niceness: int
    blocked: list[int]
    """Signals."""
    received: list[int]
    """The same files as they are numbered here."""


class Fork(NamedTuple):
    pid: int
    client: socket.socket | None
    """None once it has ended."""


def main(listener: int, driver: int) -> None:
    """Serve until the driver has ended; a fork returns from here when its own program has ended.

    Args:
        listener: a socket that listens, alone in its folder with what this process prints.
        driver: pidfd of the process that starts Ray.
    """
    # pyarrow's allocator would start a thread. What a thread holds at a fork is held for ever in it.
    os.environ["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
    # vLLM sets it for its engine, and torch reads it when it is imported.
    os.environ["TORCHINDUCTOR_CPP_DYNAMIC_THREADS"] = "1"
    # Ray sets it for its workers, and setproctitle reads it when it is imported.
    os.environ["SPT_NOENV"] = "1"
    before = dict(os.environ)
    import_modules(MODULES)
    if "ray" in sys.modules:
        sys.exit("Ray has been imported without the variables of its workers")
    multiprocessing.spawn.get_command_line = command_of_child
    server = Server(socket.socket(fileno=listener), driver)
    pid, request = os.getpid(), server.serve()
    if request is None:
        shutil.rmtree(os.path.dirname(server.listener.getsockname()), ignore_errors=True)
        os._exit(0)  # and with it what is left of its forks, at once
    # vLLM sets variables when it is imported. A variable that the program has been given itself stays.
    set_by_imports = {k: v for k, v in os.environ.items() if (before | (server.of_ray or {})).get(k) != v}
    given = request.environment
    become(request, {k: v for k, v in set_by_imports.items() if given.get(k) == before.get(k)}, pid)


def import_modules(names: tuple[str, ...]) -> None:
    """Import them. If one fails there is no server, and the process that needs it says why."""
    levels: dict[Any, int] = {}
    sys.path.insert(0, os.getcwd())  # as Ray's workers have the driver's folder
    gc.disable()  # it would walk what has been imported again and again
    for name in names:
        importlib.import_module(name)
        # A library that vLLM imports silences the root logger, to which verl's trainer writes.
        silenced: list[Any] = [logging.root, *logging.root.handlers]
        for one in silenced:
            one.setLevel(levels.setdefault(one, one.level))
    gc.enable()
    sys.path.remove(os.getcwd())


@contextmanager
def plain_class_ids() -> Iterator[None]:
    """Classes that become Ray's actors inside get their ids without Ray's random generator.

    Once used, it would have the same state in all forks: they would give the same ids to different objects.
    """
    import ray.actor

    own = ray.actor.ActorClassID
    plain = SimpleNamespace(from_random=lambda: own(os.urandom(own.size())))
    ray.actor.ActorClassID = plain  # type: ignore[assignment, misc]  # a patch
    try:
        yield
    finally:
        ray.actor.ActorClassID = own  # type: ignore[misc]  # the end of it


def ids_differ() -> bool:
    """Whether two forks make different ids with Ray's random generator, in their first threads and in others."""
    first, second = ids_of_a_fork(), ids_of_a_fork()
    return bool(first and second) and not set(first) & set(second)


def ids_of_a_fork() -> list[str]:
    import ray

    end, other = os.pipe()
    pid = os.fork()
    if pid == 0:
        ids = [ray.UniqueID.from_random().hex()]
        thread = threading.Thread(target=lambda: ids.append(ray.UniqueID.from_random().hex()))
        thread.start()
        thread.join()
        os.write(other, " ".join(ids).encode())
        os._exit(0)
    os.close(other)
    os.waitpid(pid, 0)
    with open(end) as file:
        return file.read().split()


def command_of_child(**arguments: Any) -> list[str]:
    """multiprocessing's command for a process that it spawns, run in a fork of this server."""
    call = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    code = f"from multiprocessing.spawn import spawn_main; spawn_main({call})"
    return [*forked_python.command(), "-c", code, "--multiprocessing-fork"]


class Server:
    def __init__(self, listener: socket.socket, driver: int) -> None:
        self.listener, self.driver = listener, driver
        self.forks: dict[int, Fork] = {}
        """By their pidfds."""
        self.of_ray: dict[str, str] | None = None
        """The RAY_* variables of the first client."""
        self.files_of_libraries = forked_python.open_files() - {0, 1, 2, listener.fileno(), driver}

    def serve(self) -> Request | None:
        """Return a client's request in the fork that is for it; None in the server, when the driver has ended.

        Forks that are there then end with the server.
        """
        sys.stdout.flush()  # or each fork would write it
        serving = True
        while serving or self.forks:
            clients: dict[Any, int] = {
                fork.client: pidfd for pidfd, fork in self.forks.items() if fork.client is not None
            }
            watched: list[Any] = [*clients, *self.forks, *([self.listener, self.driver] if serving else [])]
            ready, _, _ = select.select(watched, [], [], None if serving else PATIENCE)
            if not ready:
                break
            for one in ready:
                if one == self.driver:
                    serving = False
                elif one is self.listener:
                    if (request := self.fork_for(self.listener.accept()[0])) is not None:
                        return request
                elif one in clients:
                    self.end(clients[one])
                else:
                    self.tell_end(one)
        return None

    def fork_for(self, client: socket.socket) -> Request | None:
        """Fork if that is safe and tell the client; return its request in the fork, None in the server."""
        try:
            request = receive(client)
        except (OSError, TypeError, ValueError):  # it has ended before it had asked
            client.close()
            return None
        if self.of_ray is None:
            self.import_with_ray(request.environment)
        pid = None
        if self.is_safe(request):
            with suppress(OSError):  # no room for a process
                pid = os.fork()
        if pid == 0:
            self.close()
            client.close()
            return request
        for number in request.received:
            os.close(number)
        if pid is None:
            client.close()
            return None
        self.forks[os.pidfd_open(pid)] = Fork(pid, client)
        with suppress(OSError):
            client.sendall(pid.to_bytes(8, "big"))
        return None

    def import_with_ray(self, environment: dict[str, str]) -> None:
        """Import `MODULES_WITH_RAY` with the RAY_* variables of ``environment``."""
        self.of_ray = {name: value for name, value in environment.items() if name.startswith("RAY_")}
        os.environ.update(self.of_ray)
        before = forked_python.open_files()
        with plain_class_ids():
            import_modules(MODULES_WITH_RAY)
        if not ids_differ():
            sys.exit("Ray's random generator has been used: all forks would make the same ids")
        self.files_of_libraries |= forked_python.open_files() - before

    def is_safe(self, request: Request) -> bool:
        """Whether a fork would be what the request asks for.

        It would lack the server's other threads. It cannot load a library before all others, as vLLM asks of its
        engine, nor give an open file a number that a library's has.
        """
        preloaded = request.environment.get("LD_PRELOAD", "").replace(":", " ").split()
        loaded = Path("/proc/self/maps").read_text()
        return (
            len(os.listdir("/proc/self/task")) == 1
            and not self.files_of_libraries & set(request.files)
            and all(os.path.realpath(library) in loaded for library in preloaded)
        )

    def end(self, pidfd: int) -> None:
        """End a fork whose client has ended."""
        fork = self.forks.get(pidfd)
        if fork is not None and fork.client is not None:
            os.kill(fork.pid, signal.SIGKILL)
            fork.client.close()
            self.forks[pidfd] = Fork(fork.pid, None)

    def tell_end(self, pidfd: int) -> None:
        """Tell the client of a fork that has ended how it did."""
        fork = self.forks.pop(pidfd)
        os.close(pidfd)
        code = os.waitstatus_to_exitcode(os.waitpid(fork.pid, 0)[1])
        if fork.client is not None:
            with suppress(OSError):
                fork.client.sendall(code.to_bytes(8, "big", signed=True))
            fork.client.close()

    def close(self) -> None:
        """Close in a fork what is the server's."""
        self.listener.close()
        os.close(self.driver)
        for pidfd, fork in self.forks.items():
            os.close(pidfd)
            if fork.client is not None:
                fork.client.close()


def receive(client: socket.socket) -> Request:
    """Let a client send its request, and read it.

    Raises:
        OSError, TypeError, ValueError: it has ended, or does not send one.
    """
    client.settimeout(PATIENCE)
    client.sendall(b"?")  # one that has given up waiting must not be forked for
    length, received, _, _ = socket.recv_fds(client, 8, 1024)
    try:
        with client.makefile("rb") as file:
            text = file.read(int.from_bytes(length, "big"))
        request = Request(**json.loads(text), received=list(received))
    except (OSError, TypeError, ValueError):
        for number in received:
            os.close(number)
        raise
    client.settimeout(None)
    return request


def become(request: Request, further: dict[str, str], server: int) -> None:
    """Do in a fork what ``python`` does with the request's arguments.

    Args:
        further: environment variables besides the request's.
        server: the process that has been forked.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != server:  # killed before that: the client is a plain Python by now
        os._exit(1)
    os.setsid()  # a signal to its group of processes must not reach the server
    resource.setrlimit(resource.RLIMIT_NOFILE, request.most_files)
    # First above all numbers that the files are to have.
    above = max(request.files, default=0) + 1
    moved = [fcntl.fcntl(number, fcntl.F_DUPFD, above) for number in request.received]
    for number in request.received:
        os.close(number)
    for source, number in zip(moved, request.files, strict=True):
        os.dup2(source, number)
        os.close(source)
    os.setpriority(os.PRIO_PROCESS, 0, request.niceness)
    signal.pthread_sigmask(signal.SIG_SETMASK, request.blocked)
    os.chdir(request.folder)
    # Only what differs: what renames processes (Ray, and vLLM by setproctitle) finds the place of their names by the
    # environment's.
    environment = request.environment | further
    for name in os.environ.keys() - environment.keys():
        del os.environ[name]
    for name, value in environment.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
    if "numpy" in sys.modules:  # Python's own generator has a new seed in each fork
        sys.modules["numpy"].random.seed()
    program, *arguments = request.arguments
    if program == "-c":
        code, *arguments = arguments
        sys.argv[:] = ["-c", *arguments]
        sys.path.insert(0, "")
        sys.modules["__main__"] = module = ModuleType("__main__")
        exec(code, module.__dict__)
    else:
        sys.argv[:] = [program, *arguments]
        sys.path.insert(0, os.path.dirname(program))
        runpy.run_path(program, run_name="__main__")
