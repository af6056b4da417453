"""``python`` for Ray's workers on the CPU: it runs in a fork of a process that has imported verl and vLLM already.

    python -IS forked_python.py SCRIPT ARGUMENTS
    python -IS forked_python.py -c CODE ARGUMENTS

These imports take ten seconds of a core, and eight processes of a run need them. The first of Ray's workers on a
machine starts `cppo_verl.cpu.fork_server`, which imports them once. This process asks it for a fork with the same
arguments, environment, folder and open files, stands for the fork until it ends, and ends as it does. Where the server
gives no answer, this process becomes a plain Python. Until then it imports the standard library alone.
"""

import array
import json
import os
import resource
import shlex
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from typing import Any

RAYLET = "--raylet-name="
"""What Ray gives each of its workers: the path of its own socket on this machine."""
SOCKET = "CPPO_VERL_FORK_SERVER"
"""Environment variable with the path of the server's socket, for the processes that Ray's workers start."""
SERVER = """
import os, sys
if os.fork():  # Ray ends the children of a worker that ends: the server must not be one
    os._exit(0)
sys.path = [folder for folder in sys.path if folder]  # without the one where the worker starts
from cppo_verl.cpu import fork_server
fork_server.main(*map(int, sys.argv[1:3]))
"""
IMPORTING = 30
"""Seconds to wait for a server that is still importing. Ray gives up a worker that has not come after 60."""
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


def use_for_workers(runtime_env: dict[str, Any] | None) -> dict[str, Any]:
    """Make this the Python of all workers of a Ray that the driver starts: a value of RAY_RUNTIME_ENV_HOOK.

    Only RAY_ADDRESS=local says that the driver starts one. A Ray that runs already may have workers of other jobs, and
    its Python elsewhere on other machines. Other settings, such as "pip", bring a Python of their own.
    """
    runtime_env = dict(runtime_env or {})
    others = [name for name, value in runtime_env.items() if value and name != "env_vars"]
    if os.environ.get("RAY_ADDRESS") == "local" and not others and sys.platform == "linux":
        runtime_env["py_executable"] = shlex.join(command())
        # By default each process would have a thread a core, and one with threads cannot be forked.
        threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        runtime_env["env_vars"] = threads | (runtime_env.get("env_vars") or {})
    return runtime_env


def command() -> list[str]:
    return [sys.executable, "-IS", os.path.abspath(__file__)]


def main(arguments: list[str]) -> None:
    raylets = [argument.removeprefix(RAYLET) for argument in arguments if argument.startswith(RAYLET)]
    path = raylets[0] + "_fork" if raylets else os.environ.get(SOCKET, "")
    os.environ[SOCKET] = path
    with socket.socket(socket.AF_UNIX) as server:
        try:
            if raylets and not os.path.exists(path):
                with suppress(FileExistsError):
                    start_server(path)
            server.settimeout(IMPORTING)
            server.connect(path)
            pid = ask(server, arguments)
        except OSError:  # it has ended, or imports still, or its path is too long for a socket
            pid = None
        if pid is not None:
            stand_for(pid, server)
    os.execv(sys.executable, [sys.executable, *arguments])


def start_server(path: str) -> None:
    """Start the server, which ends with Ray on this machine. What it prints is in the file beside its socket.

    Raises:
        FileExistsError: another worker has just done so.
        OSError: ``path`` is no path for a socket, or Ray is ending.
    """
    raylet = int(os.environ.get("RAY_RAYLET_PID", 0))
    if os.getppid() != raylet:
        raise ProcessLookupError(raylet)
    with open(f"{path}.log", "x") as log, socket.socket(socket.AF_UNIX) as listener:
        files = [listener.fileno(), os.pidfd_open(raylet)]
        listener.bind(path)
        listener.listen(64)
        command = [sys.executable, "-c", SERVER, *map(str, files)]
        subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=files, start_new_session=True
        )
        os.close(files[1])


def ask(server: socket.socket, arguments: list[str]) -> int | None:
    """Return the id of the process that runs on ``arguments``, None if the server does not fork.

    Raises:
        TimeoutError: the server is not ready. It has not seen the request, and never will.
    """
    if not server.recv(1):
        return None
    server.settimeout(None)
    files = sorted(open_files() - {server.fileno()})
    request = {
        "arguments": arguments,
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "files": files,
        "most_files": resource.getrlimit(resource.RLIMIT_NOFILE),
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "blocked": [int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
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
