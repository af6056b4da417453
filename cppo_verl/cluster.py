"""``python -m cppo_verl cluster``: one command on a Ray cluster of several nodes, and nothing left behind.

``slurm`` (inside a batch job) and ``hosts`` (over ssh) start Ray on all nodes, ask `doctor --cluster`, run the command
on this node, which is the first, and end Ray; ``run`` does the same on a Ray cluster that is there; ``submit`` hands
``run`` to a cluster as a Ray job. SIGTERM, SIGINT (Ctrl-C) and Slurm's warning SIGUSR1 ask a run of verl's trainer to
end after its step, with a checkpoint; a second signal, or --grace seconds, ends it at once.

On each node an agent (``node``, started by the launcher) runs Ray for as long as its standard input is open, whose
first line brings address and token. However the launcher ends, that input ends, and Ray with it. The token is made
anew for each cluster and stands in a file that only its owner can read, never on a command line or in a variable.
"""

import argparse
import asyncio
import ctypes
import json
import math
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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from cppo_verl import stop
from cppo_verl.launch import EXIT_CODE_STOPPED

MODULE = "verl.trainer.main_ppo"
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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    ways = parser.add_subparsers(dest="way", required=True)
    command = argparse.ArgumentParser(add_help=False)
    command.add_argument("--grace", type=float, default=600, help="seconds for a step and a checkpoint after a signal")
    command.add_argument("command", nargs=argparse.REMAINDER, help="after --: what to run on the first node")
    start = argparse.ArgumentParser(add_help=False)
    start.add_argument(
        "--timeout", type=float, default=300, help="seconds for all nodes to join (default: %(default)s)"
    )
    start.add_argument("--ray-start", default="", help="further arguments of `ray start` on every node, as one string")
    start.add_argument("--python", default=sys.executable, help="interpreter on the other nodes (default: this one)")

    slurm = ways.add_parser("slurm", parents=[start, command], help="on the nodes of the Slurm job this runs in")
    slurm.add_argument(
        "--rsh",
        default="srun --nodes=1 --ntasks=1 --cpu-bind=none --unbuffered --nodelist",
        help="what starts a program on a node, its name being the next argument (default: %(default)s)",
    )
    hosts = ways.add_parser("hosts", parents=[start, command], help="on given hosts, this one first")
    hosts.add_argument("--nodes", required=True, help="names or addresses, separated by commas, this machine's first")
    hosts.add_argument("--rsh", default="ssh -o BatchMode=yes", help="as for slurm (default: %(default)s)")
    ways.add_parser("run", parents=[command], help="on the Ray cluster that RAY_ADDRESS names")
    submit = ways.add_parser("submit", parents=[command], help="as a Ray job on a running cluster")
    submit.add_argument("--address", required=True, help="of Ray's dashboard, e.g. http://127.0.0.1:8265")
    submit.add_argument("--working-dir", help="folder to send along with the job")
    ways.add_parser("ask", parents=[command], help="what submit asks a run to stop with; not for people")
    ways.add_parser("node", help="what the launcher starts on every node; not for people")


def run(args: argparse.Namespace) -> int:
    if args.way == "node":
        return node()
    args.command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not args.command:
        print(f"no command: `python -m cppo_verl cluster {args.way} ... -- python -m {MODULE} ...`", file=sys.stderr)
        return 2
    ways = {"slurm": slurm, "hosts": hosts, "run": here, "submit": submit, "ask": ask}
    try:
        with Signals() as signals:
            # of a cluster's own files `submit` knows nothing; a mistake shows here before anything starts
            args.folder = None if args.way == "submit" else trainer_folder(args.command)
            return ways[args.way](args, signals)
    except ClusterError as error:
        print(f"cppo_verl cluster: {error}", file=sys.stderr)
        return 1
    except Interrupted as interrupted:
        print(f"cppo_verl cluster: ended by {interrupted}", file=sys.stderr)
        return 128 + interrupted.number


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


# --- the four ways ---------------------------------------------------------------------------------------------


def slurm(args: argparse.Namespace, signals: Signals) -> int:
    for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURMD_NODENAME"):
        if not os.environ.get(name):
            raise ClusterError(
                f"{name} is not set: `cluster slurm` runs once, in the batch script of a Slurm job: "
                "sbatch recipes/cluster/slurm.sbatch"
            )
    if int(os.environ.get("SLURM_PROCID", 0)) > 0:
        raise ClusterError(
            f"SLURM_PROCID is {os.environ['SLURM_PROCID']}: start this once, without srun, which it calls itself"
        )
    nodelist = os.environ["SLURM_JOB_NODELIST"]
    shown = subprocess.run(["scontrol", "show", "hostnames", nodelist], check=True, capture_output=True, text=True)
    names = shown.stdout.split()
    if os.environ["SLURMD_NODENAME"] != names[0]:
        raise ClusterError(f"SLURMD_NODENAME is {os.environ['SLURMD_NODENAME']}, the job's first node is {names[0]}")
    try:
        code, asked_by = _launch(names, args, signals)
    except Interrupted as interrupted:
        code, asked_by = 128 + interrupted.number, interrupted.number
    if asked_by == signal.SIGUSR1:
        print("cppo_verl cluster: Slurm's warning: the job goes back to the queue, to continue from there", flush=True)
        subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
    return code


def hosts(args: argparse.Namespace, signals: Signals) -> int:
    return _launch([name for name in args.nodes.split(",") if name], args, signals)[0]


def here(args: argparse.Namespace, signals: Signals) -> int:
    return _check_and_run(args, signals, Cluster(dict(os.environ), []))[0]


def submit(args: argparse.Namespace, signals: Signals) -> int:
    from ray.job_submission import JobStatus, JobSubmissionClient

    os.environ["RAY_API_SERVER_ADDRESS"] = args.address  # Ray's client would prefer RAY_ADDRESS
    try:
        client = JobSubmissionClient(args.address)
    except Exception as error:
        raise ClusterError(
            f"no Ray jobs at {args.address}: {str(error).strip().splitlines()[0]}; RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH must hold the cluster's token, and a dashboard on another machine's loopback is "
            "reached through ssh -L 8265:127.0.0.1:8265 HEAD"
        ) from error
    runtime_env = {"working_dir": args.working_dir} if args.working_dir else {}

    def start(*words: str) -> str:
        entrypoint = shlex.join(["python", "-m", "cppo_verl", "cluster", *words, "--", *args.command])
        return client.submit_job(entrypoint=entrypoint, runtime_env=runtime_env)

    job = start("run")
    print(f"cppo_verl cluster: Ray job {job}", flush=True)

    async def show_log():
        async for lines in client.tail_job_logs(job):
            print(lines, end="", flush=True)

    async def follow() -> int | None:
        log, asked_by, deadline = asyncio.create_task(show_log()), None, math.inf
        while not log.done():
            await asyncio.wait([log], timeout=1)
            if received and asked_by is None:
                asked_by, deadline = received[0], time.monotonic() + args.grace
                _say_asked(asked_by)
                start("ask")
            if len(received) > 1 or time.monotonic() > deadline:
                client.stop_job(job)
        log.result()
        return asked_by

    with signals.collecting() as received:
        asked_by = asyncio.run(follow())
    status = client.get_job_status(job)
    if status == JobStatus.SUCCEEDED:
        return 0
    print(f"cppo_verl cluster: {job} {status.value}: {client.get_job_info(job).message}", file=sys.stderr)
    return 1 if asked_by is None else 128 + asked_by


def ask(args: argparse.Namespace, _signals: Signals) -> int:
    if args.folder is None:
        raise ClusterError("this command is no run that can be asked to stop")
    stop.request_stop(args.folder, "python -m cppo_verl cluster submit")
    return 0


# --- the command -----------------------------------------------------------------------------------------------


def trainer_arguments(command: Sequence[str]) -> list[str] | None:
    """The arguments of verl's trainer, or None for a command that is another."""
    return list(command[command.index(MODULE) + 1 :]) if MODULE in command else None


def trainer_folder(command: Sequence[str]) -> Path | None:
    """Where the command's run looks for a request to stop; None where none does.

    Raises:
        ClusterError: hydra refuses the command's arguments.
    """
    arguments = trainer_arguments(command)
    if arguments is None:
        return None
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from cppo_verl.doctor import compose_command
    from cppo_verl.plugin.config import TRAINER_MODES

    try:
        trainer = compose_command(arguments).trainer
    except (HydraException, OmegaConfBaseException) as error:
        raise ClusterError(f"the command's config: {error}") from error
    listens = trainer.use_v1 and trainer.v1.trainer_mode in TRAINER_MODES
    return Path(trainer.default_local_dir).absolute() if listens else None


def _say_asked(number: int) -> None:
    name = signal.Signals(number).name
    print(f"cppo_verl cluster: {name}: the run ends after its step; a second signal ends it at once", flush=True)


def _check_and_run(args: argparse.Namespace, signals: Signals, cluster: "Cluster") -> tuple[int, int | None]:
    """The exit code of the command, and the signal that asked it to end early, if one did."""
    doctor = [sys.executable, "-m", "cppo_verl", "doctor", "--cluster", f"--nodes={len(cluster.nodes) or 1}", "--"]
    doctor += trainer_arguments(args.command) or []
    if subprocess.run(doctor, env=cluster.environment, start_new_session=True).returncode:
        raise ClusterError("not every node can run this command (FAIL above); it was not started")
    if args.folder is not None:
        stop.start_over(args.folder)
    try:
        process = subprocess.Popen(
            args.command, env=cluster.environment, start_new_session=True, preexec_fn=_end_with_parent
        )
    except OSError as error:
        raise ClusterError(f"{args.command[0]}: {error.strerror}") from error
    try:
        with signals.collecting() as received:
            code = _wait(process, received, args, cluster)
    finally:
        signals.ignore()
        _end(process)
        if args.folder is not None:
            stop.withdraw(args.folder)
    if args.folder is not None and code == 0 and (what := stop.stopped(args.folder)):
        print(f"cppo_verl cluster: {what}; the same command continues", flush=True)
        code = EXIT_CODE_STOPPED
    return code, received[0] if received else None


def _wait(process: subprocess.Popen, received: list[int], args: argparse.Namespace, cluster: "Cluster") -> int:
    deadline = math.inf
    while True:
        with suppress(subprocess.TimeoutExpired):
            return process.wait(1)
        gone = [node.name for node in cluster.nodes if node.process.poll() is not None]
        if gone:
            raise ClusterError(f"{', '.join(gone)}: Ray has ended there (its output is above), and the command with it")
        if not received:
            continue
        if args.folder is None or len(received) > 1 or time.monotonic() > deadline:
            raise Interrupted(received[0])
        if deadline == math.inf:
            deadline = time.monotonic() + args.grace
            _say_asked(received[0])
        # Again and again: a run that is just starting takes a request for one from before its start.
        stop.request_stop(args.folder, signal.Signals(received[0]).name)


# --- Ray on the nodes ------------------------------------------------------------------------------------------


@dataclass
class Cluster:
    environment: dict[str, str]
    """Of a driver."""
    nodes: list["Node"]
    well: bool = False
    """Whether all went well, so that Ray's logs need not be kept."""


def _launch(names: list[str], args: argparse.Namespace, signals: Signals) -> tuple[int, int | None]:
    with ray_cluster(names, args, signals) as cluster:
        code, asked_by = _check_and_run(args, signals, cluster)
        cluster.well = code in (0, EXIT_CODE_STOPPED)
    return code, asked_by


@contextmanager
def ray_cluster(names: list[str], args: argparse.Namespace, signals: Signals) -> Iterator[Cluster]:
    """Ray on all nodes, the first of which is this machine.

    Raises:
        ClusterError: the first node is not known here, before anything has started; or a node did not join.
    """
    first = head_address(names)
    order = {
        "token": secrets.token_hex(32),
        "folder": os.getcwd(),
        "timeout": str(int(args.timeout)),
        "ray_start": shlex.split(args.ray_start),
        "environment": {
            name: value
            for name, value in os.environ.items()
            if name.startswith(FORWARDED) and name not in OWN_VARIABLES
        },
    }
    agent = ["-m", "cppo_verl", "cluster", "node"]
    cluster = Cluster({name: value for name, value in os.environ.items() if name not in OWN_VARIABLES}, [])
    deadline = time.monotonic() + args.timeout
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        head = Node(names[0], [sys.executable, *agent], order | {"head": first})
        cluster.nodes.append(head)
        _wait_ready(cluster.nodes, deadline)
        cluster.environment |= head.ready["environment"]
        for name in names[1:]:
            command = [*shlex.split(args.rsh), name, args.python, *agent]
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


def node() -> int:
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
                _end(ray)
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
            preexec_fn=_end_with_parent,
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


def _end_with_parent() -> None:
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _end(process: subprocess.Popen, patience: float = 20) -> None:
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
