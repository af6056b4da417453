"""``python -m cppo_verl cluster``: one command on a Ray cluster of several nodes, and nothing left behind.

``slurm`` (inside a batch job) and ``hosts`` (over ssh) start Ray on all nodes, ask `doctor --cluster`, run the command
on this node, which is the first, and end Ray; ``run`` does the same on a Ray cluster that is there; ``submit`` hands
``run`` to a cluster as a Ray job. SIGTERM, SIGINT (Ctrl-C) and Slurm's warning SIGUSR1 ask a run of verl's trainer to
end after its step, with a checkpoint; a second signal, or --grace seconds, ends it at once. What runs Ray on the
nodes is `cppo_verl.launch.agents`.
"""

import argparse
import asyncio
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from cppo_verl.artifacts import stop_request
from cppo_verl.launch.agents import (
    Cluster,
    ClusterError,
    Interrupted,
    Signals,
    end_process,
    end_with_parent,
    ray_cluster,
    run_agent,
)
from cppo_verl.launch.trainer_process import EXIT_CODE_STOPPED

MODULE = "verl.trainer.main_ppo"


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
        return run_agent()
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


def _launch(names: list[str], args: argparse.Namespace, signals: Signals) -> tuple[int, int | None]:
    with ray_cluster(
        names, signals, rsh=args.rsh, python=args.python, ray_start=args.ray_start, timeout=args.timeout
    ) as cluster:
        code, asked_by = _check_and_run(args, signals, cluster)
        cluster.well = code in (0, EXIT_CODE_STOPPED)
    return code, asked_by


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
    stop_request.request_stop(args.folder, "python -m cppo_verl cluster submit")
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

    from cppo_verl.doctor.checks import compose_command
    from cppo_verl.plugin.constants import TRAINER_MODES

    try:
        trainer = compose_command(arguments).trainer
    except (HydraException, OmegaConfBaseException) as error:
        raise ClusterError(f"the command's config: {error}") from error
    listens = trainer.use_v1 and trainer.v1.trainer_mode in TRAINER_MODES
    return Path(trainer.default_local_dir).absolute() if listens else None


def _say_asked(number: int) -> None:
    name = signal.Signals(number).name
    print(f"cppo_verl cluster: {name}: the run ends after its step; a second signal ends it at once", flush=True)


def _check_and_run(args: argparse.Namespace, signals: Signals, cluster: Cluster) -> tuple[int, int | None]:
    """The exit code of the command, and the signal that asked it to end early, if one did."""
    doctor = [sys.executable, "-m", "cppo_verl", "doctor", "--cluster", f"--nodes={len(cluster.nodes) or 1}", "--"]
    doctor += trainer_arguments(args.command) or []
    if subprocess.run(doctor, env=cluster.environment, start_new_session=True).returncode:
        raise ClusterError("not every node can run this command (FAIL above); it was not started")
    with signals.collecting() as received:
        try:
            process = subprocess.Popen(
                args.command, env=cluster.environment, start_new_session=True, preexec_fn=end_with_parent
            )
        except OSError as error:
            raise ClusterError(f"{args.command[0]}: {error.strerror}") from error
        try:
            code = _wait(process, received, args, cluster)
        finally:
            signals.ignore()
            end_process(process)
            if args.folder is not None and received:
                stop_request.withdraw(args.folder)
    if args.folder is not None and code == 0 and (what := stop_request.stopped(args.folder)):
        print(f"cppo_verl cluster: {what}; the same command continues", flush=True)
        code = EXIT_CODE_STOPPED
    return code, received[0] if received else None


def _wait(process: subprocess.Popen, received: list[int], args: argparse.Namespace, cluster: Cluster) -> int:
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
        stop_request.request_stop(args.folder, signal.Signals(received[0]).name)
