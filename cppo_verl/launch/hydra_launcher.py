"""Sweeps by hydra/launcher=processes: each job is a process, since verl starts Ray once in a process."""

import fcntl
import hashlib
import logging
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hydra.core.config_loader import ConfigLoader
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import CompactHydraException
from omegaconf import DictConfig, OmegaConf

import __main__
from cppo_verl.artifacts.sweep_record import has_finished, write_record
from cppo_verl.launch.trainer_process import Trainers, quoted, show_failure

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A run of the sweep; ``swept`` sets it apart from the others, ``command`` makes it this run and no other."""

    swept: list[str]
    folder: Path
    command: list[str]
    arguments: list[str]
    checkpoints: Path


def sweep(loader: ConfigLoader, config: DictConfig, job_overrides: Sequence[Sequence[str]], at_once: int) -> int:
    """Run the jobs that have not finished, ``at_once`` at a time; return the command's exit code."""
    jobs = [make_job(loader, config, overrides) for overrides in job_overrides]
    try:
        check(config, jobs)
        waiting = [job for job in jobs if not has_finished(job.folder, job.command)]
    except (OSError, ValueError) as error:
        raise CompactHydraException(str(error)) from error
    folder = os.path.relpath(config.hydra.sweep.dir)
    log.info(f"{len(jobs)} jobs in {folder}, {len(jobs) - len(waiting)} of them finished before")
    failed, ended_by = run(waiting, at_once)
    left = [job for job in waiting if job not in failed and not has_finished(job.folder, job.command)]
    log.info(f"{len(jobs) - len(failed) - len(left)} finished, {len(failed)} failed, {len(left)} to be run")
    log.info(f"the same command runs what has not finished; the results: cppo-verl table {quoted(folder)}")
    return 128 + ended_by if ended_by else int(bool(failed))


def check(config: DictConfig, jobs: list[Job]) -> None:
    """Raise ValueError where jobs would write to one place, or the sweep to another place each time."""
    if "${now:" in OmegaConf.to_yaml(config.hydra.sweep):
        raise ValueError(f"hydra.sweep.dir={config.hydra.sweep.dir} changes with the time: add hydra.sweep.dir=FOLDER")
    for name in {"VERL_FILE_LOGGER_PATH", "TENSORBOARD_DIR"} & os.environ.keys():
        raise ValueError(f"{name}={os.environ[name]} would be one place for all jobs: unset {name}")
    if twice := [name for name, count in Counter(job.folder.name for job in jobs).items() if count > 1]:
        raise ValueError(f"the sweep has {twice[0]} several times: give each value once")
    if shared := [job for job in jobs if sum(job.checkpoints == other.checkpoints for other in jobs) > 1]:
        names = " and ".join(job.folder.name for job in shared[:2])
        raise ValueError(f"{names} would share {shared[0].checkpoints}: let the launcher set trainer.default_local_dir")


def make_job(loader: ConfigLoader, config: DictConfig, overrides: Sequence[str]) -> Job:
    if __main__.__spec__ is None:
        raise CompactHydraException(f"a sweep starts its jobs with python -m: call {sys.argv[0]} in that way")
    swept, name = identity(config, overrides)
    folder = Path(config.hydra.sweep.dir, name).absolute()
    key, part = ("output", "") if "output" in config else ("trainer.default_local_dir", "checkpoints")
    place = f"{key}={quoted(folder / part)}"
    label = f"trainer.experiment_name={quoted(f'{config.trainer.experiment_name}-{name}')}"
    own = [text for text in overrides if not text.startswith("output=")]  # the sweep's: where it is makes no other job
    given = {"-m", "--multirun", *config.hydra.overrides.task, *config.hydra.overrides.hydra}
    options = [text for text in sys.argv[1:] if text not in given]  # --config-name and others of hydra's
    additions = [place, label, *config.hydra.overrides.hydra, f"hydra.run.dir={quoted(folder)}", "hydra.mode=RUN"]
    checkpoints = loader.load_sweep_config(config, [place, *own]).trainer.default_local_dir
    command = [__main__.__spec__.name, *options, *own]
    return Job(swept, folder, command, [*options, *additions, *own], Path(checkpoints).absolute())


def identity(config: DictConfig, overrides: Sequence[str]) -> tuple[list[str], str]:
    """Return the swept overrides, keys cut to their last parts where these differ, and the job's name, its alone."""
    command = OverridesParser.create().parse_overrides(list(config.hydra.overrides.task))
    fixed = {override.get_key_element() for override in command if not override.is_sweep_override()}
    pairs = sorted(text.split("=", 1) for text in overrides if text.split("=", 1)[0] not in fixed)
    keys = [key.lstrip("+") for key, _ in pairs]
    short = [re.split(r"[./]", key.partition("@")[0])[-1] for key in keys]
    swept = [f"{s if short.count(s) == 1 else k}={v}" for s, k, (_, v) in zip(short, keys, pairs, strict=True)]
    exact = ",".join(swept) or "run"
    name = re.sub(r"[^\w.,=+-]+", "_", exact)[:120]
    return swept, name if name == exact else f"{name}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"


def run(jobs: list[Job], at_once: int) -> tuple[list[Job], int]:
    """Return the jobs that failed, and the signal that ended the sweep early, or 0."""
    waiting, failed = list(jobs), []
    with suppress(KeyboardInterrupt), Trainers() as trainers:
        while trainers.running or (waiting and not trainers.received):
            if waiting and len(trainers.running) < at_once and not trainers.received:
                job = waiting.pop(0)
                try:
                    start(job, trainers)
                except OSError as error:
                    log.info(f"{job.folder.name}: {error}")
                    failed.append(job)
            time.sleep(0.2)
            for child in trainers.ended():
                job, code = child.job, child.exit_code()
                write_record(job.folder, job.command, job.swept, code)
                log.info(f"{job.folder.name}: {f'ended with exit code {code}' if code else 'finished'}")
                if code and not trainers.received:
                    failed.append(job)
                    show_failure(child.process, child.log)
    return failed, trainers.received or 0


def start(job: Job, trainers: Trainers) -> None:
    job.folder.mkdir(parents=True, exist_ok=True)
    # The trainer holds the lock as well, in case it outlives this process.
    lock = (job.folder / "job.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        log.info(f"{job.folder.name}: another process still runs it; waiting for its end")
        fcntl.flock(lock, fcntl.LOCK_EX)
    if not has_finished(job.folder, job.command):  # by that other process
        write_record(job.folder, job.command, job.swept, exit_code=None)
        file = job.folder / f"train-{len(list(job.folder.glob('train-*.log')))}.log"
        trainers.start(job.arguments, file, dict(os.environ), job.checkpoints, job.command[0], job, lock)
        log.info(f"{job.folder.name}: started, its log is {os.path.relpath(file)}")
