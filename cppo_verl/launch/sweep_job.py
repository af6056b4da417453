"""One point of a sweep: ``python -m cppo_verl.launch.sweep_job``, a process between the sweep and verl's trainer.

The sweep (`cppo_verl.launch.hydra_launcher`) writes a `Point` to its standard input, one line of JSON, and keeps that
open: when it closes, the sweep was killed, and the point is stopped as by SIGTERM. The exit code is the trainer's.
"""

import fcntl
import json
import os
import shlex
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from cppo_verl.artifacts import stop_request
from cppo_verl.artifacts.atomic import replacing
from cppo_verl.launch import trainer_process

RECORD, LOCK = "point.json", "point.lock"
INTERRUPTED = 128 + signal.SIGINT


@dataclass(frozen=True)
class Point:
    """A run of a sweep.

    Args:
        name: its folder's name, made of ``swept``.
        swept: what sets it apart from the sweep's other points, as "key=value".
        folder: an absolute path.
        command: the module and the arguments that make it this point and no other.
        additions: further arguments, which may change from attempt to attempt.
        checkpoints: its ``trainer.default_local_dir``.
        address: the dashboard of the Ray cluster to run on, or None for a process of this machine.
    """

    name: str
    swept: list[str]
    folder: str
    command: list[str]
    additions: list[str]
    checkpoints: str
    address: str | None = None


def read_record(folder: Path) -> dict | None:
    """What the last attempt has written: "command", "swept", "job" and "exit_code", None while it runs or if it was
    killed; None where there was none."""
    try:
        return json.loads((folder / RECORD).read_text())
    except FileNotFoundError:
        return None


class Occupied(Exception):
    """A point's folder holds something else."""


def has_finished(point: Point) -> bool:
    """
    Raises:
        Occupied: its folder holds another command's run, or what no sweep has made.
    """
    folder = Path(point.folder)
    record = read_record(folder)
    if record is None:
        if folder.exists() and any(path.name != LOCK for path in folder.iterdir()):
            raise Occupied(
                f"{folder} holds something that no sweep has made: move it, or choose another hydra.sweep.dir"
            )
        return False
    there, here = set(record["command"]), set(point.command)
    if there != here:
        raise Occupied(
            f"{folder} holds the run of another command (there: {' '.join(sorted(there - here)) or '-'}; here: "
            f"{' '.join(sorted(here - there)) or '-'}): choose another hydra.sweep.dir, or move it"
        )
    return record["exit_code"] == 0


def main() -> int:
    point = Point(**json.loads(sys.stdin.readline()))
    threading.Thread(target=end_with_the_sweep, daemon=True).start()
    folder = Path(point.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as lock:
        take(lock, point)
        # The sweep has looked before it started; another one may have been here since.
        if has_finished(point):
            return 0
        record = read_record(folder) or {}
        record |= {"command": point.command, "swept": point.swept, "exit_code": None}
        write_record(folder, record)
        log = folder / f"train-{len(list(folder.glob('train-*.log')))}.log"
        run = run_here if point.address is None else run_on_cluster
        try:
            record["exit_code"] = run(point, log, lock, record)
        except trainer_process.Stopped as stopped:
            print(f"{point.name}: {stopped}", flush=True)
            record["exit_code"] = trainer_process.EXIT_CODE_STOPPED
        except KeyboardInterrupt:
            record["exit_code"] = INTERRUPTED
        write_record(folder, record)
    return record["exit_code"]


def end_with_the_sweep() -> None:
    os.read(sys.stdin.fileno(), 1)
    os.kill(os.getpid(), signal.SIGTERM)


def take(lock: TextIO, point: Point) -> None:
    """Wait until no process of an earlier attempt is left, be it one that a killed sweep has left behind."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"{point.name}: another process still runs it ({lock.name}); waiting for its end", flush=True)
        fcntl.flock(lock, fcntl.LOCK_EX)


def write_record(folder: Path, record: dict) -> None:
    with replacing(folder / RECORD) as (file,):
        file.write_text(json.dumps(record, indent=1))


def run_here(point: Point, log: Path, lock: TextIO, _record: dict) -> int:
    module, *arguments = point.command
    # The trainer holds the lock as well, in case it outlives this process.
    with trainer_process.trainer(
        [*arguments, *point.additions],
        log,
        dict(os.environ),
        checkpoints=Path(point.checkpoints),
        module=module,
        pass_fds=(lock.fileno(),),
    ) as trainer:
        pass
    return trainer.returncode


def run_on_cluster(point: Point, log: Path, _lock: TextIO, record: dict) -> int:
    """The point as a Ray job; one that an earlier attempt has left running, or that has ended well since, is followed
    rather than submitted again. SIGTERM and Ctrl-C mean what they mean to `trainer_process.trainer`."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    client = JobSubmissionClient(point.address)
    signalled, asked = threading.Event(), threading.Event()

    def on_sigterm(*_):
        if asked.is_set():
            raise KeyboardInterrupt
        signalled.set()

    def status() -> JobStatus:
        return client.get_job_status(record["job"])

    def submitted() -> bool:
        try:
            return "job" in record and status() not in (JobStatus.FAILED, JobStatus.STOPPED)
        except RuntimeError:  # unknown here: another cluster's
            return False

    signal.signal(signal.SIGTERM, on_sigterm)
    if not submitted():
        module, *arguments = point.command
        command = ["python", "-m", module, *arguments, *point.additions]
        record["job"] = client.submit_job(entrypoint=shlex.join(command))
        write_record(Path(point.folder), record)
    print(f"{point.name}: Ray job {record['job']}", flush=True)
    try:
        while not status().is_terminal():
            if signalled.is_set():
                stop_request.request_stop(point.checkpoints, "SIGTERM")
                asked.set()
            time.sleep(1)
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        client.stop_job(record["job"])
        while not status().is_terminal():
            time.sleep(1)
        raise
    finally:
        if signalled.is_set():
            stop_request.withdraw(point.checkpoints)
        log.write_text(client.get_job_logs(record["job"]))
    if status() != JobStatus.SUCCEEDED:
        return client.get_job_info(record["job"]).driver_exit_code or 1
    if what := stop_request.stopped(point.checkpoints):
        del record["job"]
        raise trainer_process.Stopped(what)
    return 0


if __name__ == "__main__":
    sys.exit(main())
