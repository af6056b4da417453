"""hydra/launcher=processes: each point of a sweep is verl's command in a process of its own, and a sweep that ended
early goes on where it was.

hydra's basic launcher runs all points in the process of the command, where verl starts Ray once.
"""

import hashlib
import importlib
import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import ModuleType

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus, configure_log, setup_globals
from hydra.errors import CompactHydraException
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf

from cppo_verl.launch import trainer_process
from cppo_verl.launch.sweep_job import Occupied, Point, has_finished

log = logging.getLogger(__name__)

ONE_FOR_ALL = ("VERL_FILE_LOGGER_PATH", "TENSORBOARD_DIR")
"""Environment variables by which all points would write to one place."""
LONGEST_NAME = 120
LINES_OF_A_FAILURE = 15


class Processes(Launcher):
    """hydra's launcher; its settings are explained in config/hydra/launcher/processes.yaml.

    A job's folder has a record of the command it holds and of how that ended: what ended with exit code 0 is not run
    again, and what is another command's is refused.
    """

    __module__ = "hydra_plugins.cppo_verl"  # see register_launcher

    def __init__(self, jobs: int, address: str | None, point_overrides: DictConfig):
        if not isinstance(jobs, int) or isinstance(jobs, bool) or jobs < 1:
            raise ValueError(f"hydra.launcher.jobs={jobs} is not permitted: an integer >= 1")
        self.jobs = jobs
        self.address = address
        self.point_overrides = OmegaConf.to_container(point_overrides, resolve=True)

    def setup(self, *, hydra_context, task_function, config: DictConfig) -> None:
        self.loader = hydra_context.config_loader
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        check_environment(self.config)
        if self.address is not None:
            check_cluster(self.address)
        points = [self.point(list(overrides)) for overrides in job_overrides]
        check_apart(points)
        try:
            finished = [point for point in points if has_finished(point)]
        except Occupied as error:
            raise CompactHydraException(str(error)) from error
        folder = os.path.relpath(self.config.hydra.sweep.dir)
        log.info(f"{len(points)} points in {folder}, {len(finished)} of them finished before")
        failed, stopped_by = self.run([point for point in points if point not in finished], len(points))
        left = [point for point in points if point not in failed and not has_finished(point)]
        log.info(f"{len(points) - len(failed) - len(left)} finished, {len(failed)} failed, {len(left)} to be run")
        for point in failed:
            log.info(f"failed: {point.name}")
        if failed or left:
            log.info("the same command runs these and no others")
        log.info(f"the results: python -m cppo_verl table {shlex.quote(folder)}")
        if stopped_by:
            sys.exit(128 + stopped_by)
        if failed:
            sys.exit(1)
        return [
            JobReturn(overrides=overrides, working_dir=point.folder, status=JobStatus.COMPLETED)
            for overrides, point in zip(job_overrides, points, strict=True)
        ]

    def point(self, overrides: list[str]) -> Point:
        swept = self.swept(overrides)
        name = folder_name(swept)
        folder = os.path.abspath(os.path.join(self.config.hydra.sweep.dir, name))
        own = [f"{key}={written(value, folder, name)}" for key, value in self.point_overrides.items()]
        # Where its folder is makes no other point of it.
        placed = [key for key, value in self.point_overrides.items() if "{folder}" in str(value)]
        command = [text for text in overrides if text.partition("=")[0] not in placed]
        config = self.loader.load_sweep_config(self.config, command + own)
        return Point(
            name=name,
            swept=swept,
            folder=folder,
            command=[*program(), *command],
            additions=[
                *self.config.hydra.overrides.hydra,
                *own,
                f"hydra.run.dir={trainer_process.quoted(folder)}",
                "hydra.mode=RUN",
            ],
            checkpoints=os.path.abspath(config.trainer.default_local_dir),
            address=self.address,
        )

    def swept(self, overrides: list[str]) -> list[str]:
        """Those of a point's overrides that the command has not fixed, in the order of their keys, which are cut down
        to their last part where that is enough to tell them apart."""
        command = OverridesParser.create().parse_overrides(list(self.config.hydra.overrides.task))
        fixed = {override.get_key_element() for override in command if not override.is_sweep_override()}
        pairs = sorted(text.partition("=")[::2] for text in overrides if text.partition("=")[0] not in fixed)
        keys = [key.lstrip("+") for key, _ in pairs]
        short = [re.split(r"[./]", key.partition("@")[0])[-1] for key in keys]
        names = [s if short.count(s) == 1 else key for s, key in zip(short, keys, strict=True)]
        return [f"{name}={value}" for name, (_, value) in zip(names, pairs, strict=True)]

    def run(self, points: list[Point], total: int) -> tuple[list[Point], int | None]:
        """Run ``points``, ``jobs`` at a time; return those that failed, and the signal that ended the sweep if one
        did."""
        waiting, running, failed = list(points), {}, []
        stopped_by = None
        with signals() as received:
            while running or (waiting and stopped_by is None):
                while waiting and len(running) < self.jobs and not received and stopped_by is None:
                    point = waiting.pop(0)
                    log.info(
                        f"{total - len(waiting)}/{total} {point.name}: started, see {os.path.relpath(point.folder)}"
                    )
                    running[start(point)] = (point, time.monotonic())
                time.sleep(0.2)
                while received:
                    stopped_by = received.pop(0)
                    log.info(f"{signal.Signals(stopped_by).name}: ending {len(running)} point(s)")
                    for process in running:
                        # A terminal that closes asks for what a cluster does, not for an immediate end.
                        process.send_signal(signal.SIGTERM if stopped_by == signal.SIGHUP else stopped_by)
                for process in [process for process in running if process.poll() is not None]:
                    point, begin = running.pop(process)
                    process.stdin.close()
                    if process.returncode == 0:
                        log.info(f"{point.name}: finished in {timedelta(seconds=int(time.monotonic() - begin))}")
                    elif stopped_by is None:
                        failed.append(point)
                        log.error(f"{point.name}: failed with exit code {process.returncode}{end_of_log(point)}")
                    else:
                        log.info(f"{point.name}: ended early")
        return failed, stopped_by


@contextmanager
def signals():
    """The list of signals that have come since; what the shell has told to ignore stays ignored."""
    received, before = [], {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, lambda number, _: received.append(number))
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start(point: Point) -> subprocess.Popen:
    # A session of its own: what is sent to the sweep's terminal or process group reaches it once, from here.
    process = subprocess.Popen(
        [sys.executable, "-m", "cppo_verl.launch.sweep_job"], stdin=subprocess.PIPE, text=True, start_new_session=True
    )
    process.stdin.write(json.dumps(vars(point)) + "\n")
    process.stdin.flush()
    return process


def program() -> list[str]:
    """This command's module and what it tells hydra about configs."""
    spec = sys.modules["__main__"].__spec__
    if spec is None:
        raise CompactHydraException(f"a sweep starts its points with python -m: call {sys.argv[0]} in that way")
    args = get_args_parser().parse_args(sys.argv[1:])
    paths = {"--config-path": args.config_path, "--config-name": args.config_name}
    if args.config_dir is not None:
        paths["--config-dir"] = os.path.abspath(args.config_dir)
    return [spec.name, *(part for key, value in paths.items() if value is not None for part in (key, value))]


def check_environment(config: DictConfig) -> None:
    sweep = OmegaConf.to_container(config.hydra.sweep, resolve=False)
    if "${now:" in sweep["dir"]:
        raise CompactHydraException(
            f"hydra.sweep.dir={sweep['dir']} is another folder each time, so that no sweep could go on where it was: "
            "add hydra.sweep.dir=FOLDER"
        )
    for name in ONE_FOR_ALL:
        if name in os.environ:
            raise CompactHydraException(f"{name}={os.environ[name]} would be one place for all points: unset {name}")


def check_cluster(address: str) -> None:
    from ray.job_submission import JobSubmissionClient

    try:
        JobSubmissionClient(address)
    except Exception as error:  # whatever the way to it makes of it
        raise CompactHydraException(f"hydra.launcher.address={address}: {error}") from error


def check_apart(points: list[Point]) -> None:
    for what in ("folder", "checkpoints"):
        seen = {}
        for point in points:
            other = seen.setdefault(getattr(point, what), point)
            if other is not point:
                raise CompactHydraException(
                    f"{other.name} and {point.name} would share the {what} {getattr(point, what)}: give each its own "
                    "by hydra.launcher.point_overrides"
                )


def folder_name(swept: list[str]) -> str:
    """A name for the folder of a point, and of nothing but this point."""
    exact = ",".join(swept) or "run"
    name = re.sub(r"[^\w.,=+-]+", "_", exact)[:LONGEST_NAME]
    return name if name == exact else f"{name}-{hashlib.sha256(exact.encode()).hexdigest()[:8]}"


def written(value, folder: str, name: str) -> str:
    """A value of ``point_overrides`` in hydra's grammar of overrides."""
    if not isinstance(value, str):
        return json.dumps(value)
    return trainer_process.quoted(value.replace("{folder}", folder).replace("{name}", name))


def end_of_log(point: Point) -> str:
    logs = sorted(Path(point.folder).glob("train-*.log"), key=lambda path: path.stat().st_mtime)
    return (
        f"; the end of {os.path.relpath(logs[-1])}:\n{trainer_process.last_lines(logs[-1], LINES_OF_A_FAILURE)}"
        if logs
        else ""
    )


def register_launcher() -> None:
    """Make `Processes` a launcher of hydra's, which takes them from its namespace package alone, registered or not."""
    try:
        namespace = importlib.import_module("hydra_plugins")
    except ModuleNotFoundError:  # without another plug-in there is none
        namespace = sys.modules["hydra_plugins"] = ModuleType("hydra_plugins")
    namespace.cppo_verl = sys.modules[__name__]
    Plugins.instance().register(Processes)
