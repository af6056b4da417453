"""``python`` for Ray's workers on the CPU: it runs in a fork of a process that has imported verl and vLLM already.

    python -IS forked_python.py SCRIPT ARGUMENTS
    python -IS forked_python.py -c CODE ARGUMENTS

These imports take ten seconds of a core, and eight processes of a run need them. Before the driver starts Ray, it
starts `cppo_verl.cpu.fork_server`, which imports them once, while Ray starts. This process asks it for a fork with the
same arguments, environment, folder and open files, stands for the fork until it ends, and ends as it does. Where the
server gives no answer, this process becomes a plain Python. Until then it imports the standard library alone.
"""

import array
import json
import os
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from typing import Any

SOCKET = "CPPO_VERL_FORK_SERVER"
"""Environment variable with the path of the server's socket."""
SERVER = """
import sys
sys.path = [folder for folder in sys.path if folder]  # without the one where it starts
from cppo_verl.cpu import fork_server
fork_server.main(*map(int, sys.argv[1:3]))
"""
IMPORTING = 30
"""Seconds to wait for a server that has not yet imported what needs no Ray. Ray gives up a worker after 60."""
servers: dict[str, subprocess.Popen] = {}
"""Those that this process has started, by their folders."""
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def use_for_workers(runtime_env: dict[str, Any] | None) -> dict[str, Any]:
    """Make this the Python of all workers of a Ray that the driver is about to start, and start the server.

    It is a value of RAY_RUNTIME_ENV_HOOK. Only RAY_ADDRESS=local says that the driver starts a Ray. One that runs
    already may have workers of other jobs, and its Python elsewhere on other machines. Other settings, such as "pip",
    bring a Python of their own.
    """
    import ray

    runtime_env = dict(runtime_env or {})
    others = [name for name, value in runtime_env.items() if value and name != "env_vars"]
    starts_ray = os.environ.get("RAY_ADDRESS") == "local" and not ray.is_initialized()
    if starts_ray and not others and hasattr(os, "pidfd_open"):  # which Linux has
        # By default each process would have a thread a core, and one with threads cannot be forked.
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        variables = threads | (runtime_env.get("env_vars") or {})
        with suppress(OSError):  # no room for its files, or no path for a socket
            texts = {name: str(value) for name, value in variables.items()}  # Ray itself refuses other values
            variables |= {SOCKET: start_server(os.environ | texts)}
            runtime_env |= {"py_executable": shlex.join(command()), "env_vars": variables}
    return runtime_env


def command() -> list[str]:
    return [sys.executable, "-IS", os.path.abspath(__file__)]


def start_server(environment: dict[str, str]) -> str:
    """Start the server and return the path of its socket. It ends with this process, or when that starts another.

    The libraries that it imports read ``environment``. What it prints is in a file beside the socket, in a folder that
    stays only if the server fails.

    Raises:
        OSError: there can be no such folder, or its path is too long for a socket.
    """
    for folder, server in servers.items():  # that of a Ray that has ended
        server.terminate()
        server.wait()
        shutil.rmtree(folder, ignore_errors=True)
    servers.clear()
    driver = os.pidfd_open(os.getpid())
    folder = tempfile.mkdtemp(prefix="cppo_verl_")
    path = os.path.join(folder, "fork_server")
    try:
        with open(f"{path}.log", "x") as log, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(64)
            files = listener.fileno(), driver
            command = [sys.executable, "-c", SERVER, *map(str, files)]
            options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log, "pass_fds": files}
            servers[folder] = subprocess.Popen(command, env=environment, start_new_session=True, **options)
    except BaseException:
        shutil.rmtree(folder)
        raise
    finally:
        os.close(driver)
    return path


def main(arguments: list[str]) -> None:
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with socket.socket(socket.AF_UNIX) as server:
        try:
            server.settimeout(IMPORTING)
            server.connect(os.environ.get(SOCKET, ""))
            pid = ask(server, arguments)
        except OSError:  # there is none, it has ended, or it imports still
            pid = None
        if pid is not None:
            stand_for(pid, server)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    os.execv(sys.executable, [sys.executable, *arguments])


def ask(server: socket.socket, arguments: list[str]) -> int | None:
    """Return the id of the process that runs on ``arguments``, None if the server does not fork.

    Raises:
        TimeoutError: the server is not ready. It has not seen the request, and never will.
    """
    if not server.recv(1):
        return None
    server.settimeout(None)
    # A signal that comes from now on is for the fork, which may run before this process knows its id.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, FORWARDED)
    files = sorted(open_files() - {server.fileno()})
    request = {
        "arguments": arguments,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "files": files,
        "most_files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "blocked": [int(number) for number in mask],
    }
    text = json.dumps(request).encode()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", files))]
    server.sendmsg([len(text).to_bytes(8, "big")], rights)
    server.sendall(text)
    answer = server.recv(8)
    return int.from_bytes(answer, "big") if answer else None


def stand_for(pid: int, server: socket.socket) -> None:
    """End as the process ``pid`` ends; its signals come here until then."""

    def forward(number: int, _frame: Any) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    for number in FORWARDED:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    answer = server.recv(8)
    code = int.from_bytes(answer, "big", signed=True) if answer else 1  # 1: the server has been killed, and its forks
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def open_files() -> set[int]:
    """Numbers of this process's open files."""
    numbers = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # what listed them is closed by now
            os.fstat(int(name))
            numbers.add(int(name))
    return numbers


if __name__ == "__main__":
    main(sys.argv[1:])
