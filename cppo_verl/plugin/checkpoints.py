"""Files that a run writes beside verl's: metrics, the data sources of its answers, its best checkpoint."""

import errno
import itertools
import json
import os
import re
import shutil
import socket
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from omegaconf import DictConfig, open_dict

from cppo_verl.artifacts.atomic import replacing
from cppo_verl.artifacts.log_lines import LINE
from cppo_verl.artifacts.run_reader import ACCURACY, SOURCES_SUFFIX

METRICS_PATH = "VERL_FILE_LOGGER_PATH"
BEST = "best"
TRACKER = "latest_checkpointed_iteration.txt"
"""verl's file beside its checkpoints that names the newest one, written once all ranks have written theirs."""
TRANSFER_QUEUE = "transfer_queue"
"""verl's folder in a checkpoint of its asynchronous trainers: the responses in TransferQueue when it was saved."""


def log_to_file(config: DictConfig) -> Path:
    """Add verl's file logger to the run's loggers, with a new file for each attempt.

    A run that resumes would overwrite verl's default path. A path that the user has set stays.
    """
    loggers = config.trainer.logger
    loggers = [loggers] if isinstance(loggers, str) else list(loggers)
    if "file" not in loggers:
        with open_dict(config):
            config.trainer.logger = [*loggers, "file"]
    if METRICS_PATH not in os.environ:
        folder = Path(config.trainer.default_local_dir)
        folder.mkdir(parents=True, exist_ok=True)
        attempts = [int(m[1]) for p in folder.iterdir() if (m := re.fullmatch(r"metrics-(\d+)\.jsonl", p.name))]
        os.environ[METRICS_PATH] = str(folder / f"metrics-{max(attempts, default=-1) + 1}.jsonl")
    return Path(os.environ[METRICS_PATH])


def check_resume(config: DictConfig) -> None:
    """Let verl resume from the newest whole checkpoint, which is that of its tracker file or an earlier one.

    verl would fail on a file that was cut off, and start from scratch, over the existing checkpoints, without a folder.

    Raises:
        ValueError: the tracker file names no checkpoint, there is no whole one, or it is of another number of ranks.
    """
    folder = Path(config.trainer.default_local_dir)
    step = newest(folder)
    if config.trainer.resume_mode != "auto" or step is None:
        return
    found = [n for n in _steps(folder) if is_whole(folder, n)]
    known = step.isdecimal() and int(step) in _steps(folder)
    # verl truncates the file before it writes there, once the newest checkpoint is whole.
    usable = [n for n in found if not step or (known and n <= int(step))]
    if not usable:
        names = ", ".join(map(str, found)) or "none"
        raise ValueError(
            f"{folder / TRACKER} says {step!r}, but the steps with a whole checkpoint beside it are: {names}. Write "
            "one of them into the file to resume from it, or use trainer.resume_mode=disable to start from scratch"
        )
    if not step or usable[-1] != int(step):
        damaged = f"the checkpoint of step {step}" if step else TRACKER
        print(f"{LINE}{damaged} is damaged: going on from step {usable[-1]}", flush=True)
        with replacing(folder / TRACKER) as (file,):
            file.write_text(str(usable[-1]))
    _check_ranks(config, folder, usable[-1])


def _check_ranks(config: DictConfig, folder: Path, step: int) -> None:
    """Raise ValueError where FSDP's ranks would look for files of their own that other ranks have not written."""
    files = (folder / f"global_step_{step}" / "actor").glob("model_world_size_*_rank_*.pt")
    written = {int(file.name.split("_")[3]) for file in files}
    nodes, gpus = (config.trainer.get(key) for key in ("nnodes", "n_gpus_per_node"))
    if written and nodes * gpus not in written:
        raise ValueError(
            f"the checkpoint of step {step} in {folder} is of {max(written)} ranks, each of which reads its own part, "
            f"and this run has {nodes * gpus} (trainer.nnodes={nodes} trainer.n_gpus_per_node={gpus}): continue it on "
            f"{max(written)} GPUs, or start another run from its weights, which `python -m verl.model_merger` joins"
        )


def is_whole(folder: Path, step: int) -> bool:
    """Return whether this machine's part of a checkpoint is there, with all of its files to their ends.

    Where no checkpoint has weights on this machine, the others' parts are not seen.
    """
    checkpoint = folder / f"global_step_{step}"
    weights_are_here = any(folder.glob("global_step_*/actor"))
    files = [*checkpoint.glob("*.pt"), *checkpoint.glob("actor/*.pt"), *checkpoint.glob("critic/*.pt")]
    # torch.save writes a zip archive, whose table of contents comes last.
    return bool(files) and (checkpoint / "actor").exists() >= weights_are_here and all(map(zipfile.is_zipfile, files))


def not_written(folder: str | Path, step: int, error: Exception) -> str:
    """The error message for a checkpoint that could not be written: where, why, and what a run can resume from."""
    folder = Path(folder).absolute()
    # The error of a Ray worker has its node's address in its text only.
    worker = re.search(r"\bip=([\w.:]+)", str(error))
    node = worker[1] if worker else socket.gethostname()
    free = shutil.disk_usage(folder).free / 1e6
    lines = str(error).strip().splitlines() or [type(error).__name__]
    whole = newest(folder)
    rest = f"that of step {whole} is whole" if whole else "there is none before it"
    return (
        f"on {node}: the checkpoint of step {step} could not be written to {folder} ({free:,.0f} MB free, seen from "
        f"{socket.gethostname()}): {lines[-1]}; {rest}. Make room; the same command continues"
    )


@contextmanager
def naming_a_full_disk(folder: str | Path) -> Iterator[None]:
    """Say for whom there is no room when one of verl's loggers finds none, which names no file."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        where = f"{os.environ.get(METRICS_PATH)}, beside it or to {Path(folder).absolute()}"
        why = f"on {socket.gethostname()}: nothing can be written to {where}: {error}"
        raise RuntimeError(f"{why}. Make room; {how_to_continue(folder)}") from error


def newest(folder: str | Path) -> str | None:
    """The step in verl's tracker file: that of the newest checkpoint that all ranks have written."""
    tracker = Path(folder) / TRACKER
    return tracker.read_text().strip() if tracker.exists() else None


def how_to_continue(folder: str | Path) -> str:
    """The end of the message of a run that has failed."""
    step = newest(folder)
    return f"the same command continues from {f'the checkpoint of step {step}' if step else 'the start: no checkpoint'}"


def rotate(folder: str | Path, step: int, role: str, keep: int | None) -> None:
    """Remove this machine's checkpoints of a role ("actor", "critic") up to ``step``, except for the last ``keep``.

    verl rotates what the same attempt has written; the checkpoints of earlier attempts would stay. With the actor goes
    what the asynchronous trainers save of TransferQueue, a step's whole batch, which verl never removes. Without
    ``keep`` all stay.
    """
    steps = [n for n in _steps(folder) if n <= step and (Path(folder) / f"global_step_{n}" / role).exists()]
    if not keep or not steps:
        return
    for old in steps[:-keep]:
        shutil.rmtree(Path(folder) / f"global_step_{old}" / role, ignore_errors=True)
    for old in _steps(folder) if role == "actor" else ():
        if old < steps[-keep:][0]:
            shutil.rmtree(Path(folder) / f"global_step_{old}" / TRANSFER_QUEUE, ignore_errors=True)


def _steps(folder: str | Path) -> list[int]:
    return sorted(int(m[1]) for p in Path(folder).iterdir() if (m := re.fullmatch(r"global_step_(\d+)", p.name)))


def write_sources(folder: str | Path, step: int, uids: list[str], data_sources: list[str]) -> None:
    """Write {uid of the prompt: data source} beside verl's dump of a validation's answers, which lacks the source."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sources = dict(zip(map(str, uids), map(str, data_sources), strict=True))
    with replacing(folder / f"{step}{SOURCES_SUFFIX}") as (file,):
        file.write_text(json.dumps(sources))


def mean_accuracy(metrics: dict[str, float]) -> float | None:
    """Unweighted mean over benchmarks of a validation's Avg@n."""
    values = [value for name, value in metrics.items() if ACCURACY.match(name)]
    return sum(values) / len(values) if values else None


def best_so_far(folder: str | Path) -> dict | None:
    """{"step", "accuracy"} of the run's best checkpoint so far; None if there is none."""
    try:
        return json.loads((Path(folder) / BEST / "best.json").read_text())
    except (OSError, json.JSONDecodeError):
        return None


def write_best(folder: str | Path, step: int, accuracy: float) -> None:
    best = Path(folder) / BEST
    best.mkdir(parents=True, exist_ok=True)
    with replacing(best / "best.json") as (file,):
        file.write_text(json.dumps({"step": step, "accuracy": accuracy}))


def set_aside_best(folder: str | Path, step: int) -> str | None:
    """Name the folder to which the best checkpoint goes if it is not of this run, which goes on after ``step``."""
    best = best_so_far(folder)
    if best is None or best["step"] <= step:
        return None
    taken = [path.name for path in Path(folder).glob(f"{BEST}-*")]
    return next(name for n in itertools.count(1) if (name := f"{BEST}-{n}") not in taken)


def unshare(folder: str | Path, step: int) -> None:
    """Remove this machine's files of a checkpoint that are hard links, before it is saved again.

    torch.save truncates a file in place, and with it the same file under ``folder``/best.
    """
    for file in (Path(folder) / f"global_step_{step}").rglob("*"):
        with suppress(FileNotFoundError):  # another process of this machine was faster
            if file.is_file() and file.stat().st_nlink > 1:
                file.unlink()


def link_checkpoint(folder: str | Path, step: int) -> None:
    """Hard-link this machine's files of a checkpoint under ``folder``/best, where verl does not rotate them.

    Call it on every machine that holds a part; several processes may do so at once.
    """
    source = Path(folder) / f"global_step_{step}"
    for file in source.rglob("*") if source.exists() else ():
        target = Path(folder) / BEST / source.name / file.relative_to(source)
        if file.is_dir():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, target)
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            shutil.copy2(file, target)


def forget_others(folder: str | Path, step: int | None) -> None:
    """Remove this machine's links of all best checkpoints but that of ``step``; of all if it is None."""
    for other in (Path(folder) / BEST).glob("global_step_*"):
        if other.name != f"global_step_{step}":
            shutil.rmtree(other, ignore_errors=True)


def progress_line(step: int, steps: int, seconds_left: float, metrics: dict[str, float], accuracy: float | None) -> str:
    """The line that a step prints for a person who watches."""
    minutes, seconds = divmod(int(seconds_left), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"step {step}/{steps}", f"{hours}:{minutes:02d}:{seconds:02d} left"]
    if "critic/score/mean" in metrics:
        parts.append(f"reward {metrics['critic/score/mean']:.3f}")
    if accuracy is not None:
        parts.append(f"validation {accuracy:.1%}")
    if "trust_region/masked_share" in metrics:
        parts.append(f"masked {metrics['trust_region/masked_share']:.1%}")
    if metrics.get("perf/time_per_step"):
        rate = metrics.get("perf/total_num_tokens", 0) / metrics["perf/time_per_step"]
        parts.append(f"{rate:,.0f} tokens/s")
    return LINE + "  ".join(parts)
