"""Ray on the nodes of ``python -m cppo_verl cluster``, for as long as the launcher lives.

On each node an agent (`run_agent`, started by `ray_cluster`) runs Ray for as long as its standard input is open, whose
first line brings address and token. However the launcher ends, that input ends, and Ray with it. The token is made
anew for each cluster and stands in a file that only its owner can read, never on a command line or in a variable.
"""

import ctypes
import json
import os
import re
import secrets
import select
import selectors
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
FORWARDED = ("CPPO_VERL_", "GLOO_", "HF_", "NCCL_", "OMP_", "PYTHON", "RAY_", "UCX_", "VERL_", "VLLM_", "WANDB_")
"""Prefixes of the variables that the nodes get from the launcher: on a cluster, workers see their node's environment
and not that of the command."""
OWN_VARIABLES = ("RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""Of a cluster: another's would lead to that one."""
READY = "cppo_verl node: "
"""Before what an agent tells the launcher, on its standard output."""
NODE_FAILED = 3
"""Exit code of an agent; others are those of ssh, srun and the interpreter."""
WELL = b"well"
"""Before the end of an agent's input where nothing went wrong: Ray's logs need not be kept."""
STARTED = "will now block forever"
"""The last that `ray start --block` says."""
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


class ClusterError(Exception):
    """The cluster cannot be used; the message names the node and the way out."""


class Interrupted(BaseException):
    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class Signals:
    """What this process is asked by signals: `Interrupted` is raised wherever it is, but while `collecting`."""

    def __init__(self):
        self.collected: list[int] | None = None

    def __enter__(self) -> "Signals":
        # one that is ignored (nohup, a background job of a script) stays so
        handled = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self.previous = {number: signal.signal(number, self._handle) for number in handled}
        return self

    def __exit__(self, *_):
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number, _frame):
        if self.collected is None:
            raise Interrupted(number)
        self.collected.append(number)

    @contextmanager
    def collecting(self) -> Iterator[list[int]]:
        self.collected = []
        try:
            yield self.collected
        finally:
            self.collected = None

    def ignore(self) -> None:
        """For clean-up: an impatient further signal would leave Ray behind."""
        for number in self.previous:
            signal.signal(number, signal.SIG_IGN)


# --- the launcher's side ---------------------------------------------------------------------------------------


@dataclass
class Cluster:
    environment: dict[str, str]
    """Of a driver."""
    nodes: list["Node"]
    well: bool = False
    """Whether all went well, so that Ray's logs need not be kept."""


@contextmanager
def ray_cluster(
    names: list[str], signals: Signals, *, rsh: str, python: str, ray_start: str, timeout: float
) -> Iterator[Cluster]:
    """Ray on all nodes, the first of which is this machine.

    Args:
        rsh: what starts a program on another node, the node's name being the next argument.
        python: the interpreter on the others.
        ray_start: further arguments of `ray start` on every node.
        timeout: seconds for all nodes to join.

    Raises:
        ClusterError: the first node is not known here, before anything has started; or a node did not join.
    """
    head_at = head_address(names)
    order = {
        "token": secrets.token_hex(32),
        "folder": os.getcwd(),
        "timeout": str(int(timeout)),
        "ray_start": shlex.split(ray_start),
        "environment": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(FORWARDED) and name not in OWN_VARIABLES
        },
    }
    agent = ["-m", "cppo_verl", "cluster", "node"]
    cluster = Cluster({name: value for name, value in os.environ.items() if name not in OWN_VARIABLES}, [])
    deadline = time.monotonic() + timeout
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        head = Node(names[0], [sys.executable, *agent], order | {"head": head_at})
        cluster.nodes.append(head)
        _wait_ready(cluster.nodes, deadline)
        cluster.environment |= head.ready["environment"]
        for name in names[1:]:
            command = [*shlex.split(rsh), name, python, *agent]
            address = cluster.environment["RAY_ADDRESS"]
            cluster.nodes.append(Node(name, command, order | {"address": address}))
        _wait_ready(cluster.nodes, deadline)
        print(f"cppo_verl cluster: Ray runs on {', '.join(names)}; dashboard at {head.ready['dashboard']}", flush=True)
        yield cluster
    finally:
        signals.ignore()
        for node in reversed(cluster.nodes):
            node.let_go(cluster.well)
        left = [node.name for node in cluster.nodes if not node.ended(60)]
        _end_children()
        if left:
            print(f"cppo_verl cluster: no answer from {', '.join(left)}: Ray may still run there", file=sys.stderr)


def head_address(names: list[str]) -> str | None:
    """The address under which the others reach the first node; None leaves it to Ray.

    Raises:
        ClusterError: the name is not known here.
    """
    try:
        address = socket.gethostbyname(names[0])
    except OSError as error:
        raise ClusterError(f"{names[0]}: {error.strerror}; the first node must be this machine") from error
    # Debian's /etc/hosts gives a machine's own name a loopback address.
    return None if address.startswith("127.") else address


class Node:
    """An agent on a node, from the launcher's side."""

    def __init__(self, name: str, command: list[str], order: dict):
        self.name, self.command, self.ready, self.output = name, command, None, b""
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True, bufsize=0
        )
        with suppress(BrokenPipeError):  # what has ended already is found by its exit code
            self.process.stdin.write(json.dumps(order).encode() + b"\n")

    def read(self) -> bool:
        """Take what the agent has written, which must be there; False at its end."""
        chunk = os.read(self.process.stdout.fileno(), 65536)
        self.output += chunk
        for line in self.output.decode(errors="replace").splitlines(keepends=True):
            if line.startswith(READY) and line.endswith("\n"):
                self.ready = json.loads(line.removeprefix(READY))
        return bool(chunk)

    def let_go(self, well: bool) -> None:
        with suppress(BrokenPipeError):
            if well:
                self.process.stdin.write(WELL)
            self.process.stdin.close()

    def ended(self, patience: float) -> bool:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        return self.process.returncode is not None


def _wait_ready(nodes: list[Node], deadline: float) -> None:
    problems = []
    with selectors.DefaultSelector() as waiting:
        for node in nodes:
            if node.ready is None:
                waiting.register(node.process.stdout, selectors.EVENT_READ, node)
        while waiting.get_map() and time.monotonic() < deadline and not problems:
            for key, _ in waiting.select(max(0.0, deadline - time.monotonic())):
                node = key.data
                if not node.read():
                    code = node.process.wait()
                    installed = "" if code == NODE_FAILED else "; is cppo-verl installed for that interpreter there?"
                    problems.append(
                        f"{node.name}: `{shlex.join(node.command)}` ended with exit code {code}, its output is above"
                        + installed
                    )
                if problems or node.ready is not None:
                    waiting.unregister(key.fileobj)
        if not problems:
            late = [key.data.name for key in waiting.get_map().values()]
            problems = [f"{name}: Ray does not run there yet; --timeout SECONDS gives it longer" for name in late]
    if problems:
        raise ClusterError("; ".join(problems))


# --- the agent -------------------------------------------------------------------------------------------------


def run_agent() -> int:
    """Ray on this node until standard input ends."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    host = socket.gethostname()
    line = sys.stdin.readline()
    if not line:  # the launcher has ended already
        return NODE_FAILED
    order = json.loads(line)
    try:
        os.chdir(order["folder"])
    except OSError as error:
        print(f"cppo_verl node {host}: {error}: start from a folder that all nodes have", file=sys.stderr)
        return NODE_FAILED
    folder = Path(tempfile.mkdtemp(prefix="ray-"))
    token, well = folder / "token", False
    token.touch(0o600)
    token.write_text(order["token"])
    with Signals() as signals:
        try:
            ray = _start_ray(order, folder)
            try:
                well = _keep(ray, folder)
            finally:
                signals.ignore()
                end_process(ray)
        except Interrupted as interrupted:
            print(f"cppo_verl node {host}: ended by {interrupted}", file=sys.stderr)
        finally:
            signals.ignore()
            _end_children()
            token.unlink()
            if well:
                shutil.rmtree(folder, ignore_errors=True)
            else:
                print(f"cppo_verl node {host}: Ray's logs are in {folder}", file=sys.stderr)
    return 0 if well else NODE_FAILED


def _start_ray(order: dict, folder: Path) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name not in OWN_VARIABLES}
    environment |= order["environment"] | _token_variables(folder)
    environment["RAY_raylet_start_wait_time_s"] = order["timeout"]  # Ray's 30 s are few for a busy machine
    environment["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"] = "0"  # or Ray waits for its workers to become idle
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--temp-dir={folder / 'ray'}"]
    if "address" in order:
        command += [f"--address={order['address']}"]
    else:
        command += ["--head", "--port=0", "--include-dashboard=true", "--dashboard-host=127.0.0.1"]
        command += [f"--node-ip-address={order['head']}"] if order["head"] else []
    if "SLURM_CPUS_ON_NODE" in os.environ:  # Ray would count the machine's
        command += [f"--num-cpus={os.environ['SLURM_CPUS_ON_NODE']}"]
    with (folder / "start.log").open("wb") as log:
        return subprocess.Popen(
            [*command, *order["ray_start"]],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )


def _token_variables(folder: Path) -> dict[str, str]:
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(folder / "token")}


def _keep(ray: subprocess.Popen, folder: Path) -> bool:
    """Tell the launcher when Ray runs, and wait for the end of its input; whether the launcher ended well."""
    started, well = False, False
    while ray.poll() is None:
        text = (folder / "start.log").read_text(errors="replace")
        if not started and STARTED in text:
            started, environment = True, _token_variables(folder)
            if address := re.search(r"ray start --address='([^']+)'", text):
                environment["RAY_ADDRESS"] = address[1]
            dashboard = re.search(r"RAY_API_SERVER_ADDRESS='([^']+)'", text)
            print(READY + json.dumps({"environment": environment, "dashboard": dashboard and dashboard[1]}), flush=True)
        if select.select([0], [], [], 1 if started else 0.2)[0]:
            words = os.read(0, 100)
            well |= WELL in words
            if not words:
                return well
    end = "\n".join((folder / "start.log").read_text(errors="replace").splitlines()[-30:])
    print(f"cppo_verl node {socket.gethostname()}: Ray ended with {ray.returncode}:\n{end}", file=sys.stderr)
    return False


# --- processes -------------------------------------------------------------------------------------------------


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value)


def end_with_parent() -> None:
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def end_process(process: subprocess.Popen, patience: float = 20) -> None:
    """End a process by SIGTERM, after ``patience`` seconds by SIGKILL, and what is left of its group."""
    if process.poll() is None:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _end_children() -> None:
    """End all that descends from this process; as a subreaper it is the parent of what has lost its own."""
    while children := psutil.Process().children(recursive=True):
        for child in children:
            with suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(children, 5)
