"""Reads what verl's trainer leaves behind, in whatever state it is: metrics, generations, the run's config.

A damaged file never makes reading fail: what was skipped is listed in the run's ``notes``.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from cppo_verl.artifacts.folders import files_below
from cppo_verl.artifacts.saved_config import flattened, load, select
from cppo_verl.artifacts.sweep_record import RECORD, read_record

ACCURACY = re.compile(r"val-core/(?P<benchmark>.+)/acc/mean@(?P<n>\d+)$")
SOURCES_SUFFIX = ".sources.json"
"""Ending of the file, beside a dump of generations, that names each prompt's data source."""
METHOD, SCALE = (f"hydra.runtime.choices.{group}" for group in ("method", "scale"))
"""Keys of hydra.yaml that name the shipped method of the run, and the recipe's model."""
OLD_RECORD = "point.json"
"""Name of the sweep's record in older versions."""


@dataclass
class Run:
    path: Path
    label: str
    scale: str | None = None
    """The recipe's model, such as qwen3_8b_base."""
    seed: int | None = None
    t_stop: int | None = None
    """Last step that the run was asked to train."""
    steps: dict[int, dict[str, float]] = field(default_factory=dict)
    """{step: {metric: value}}, numbers only, in step order."""
    generations: Path | None = None
    """Folder of verl's validation dumps, one file {step}.jsonl each."""
    config: Path | None = None
    """The config.yaml that hydra saved with the run."""
    notes: list[str] = field(default_factory=list)

    def accuracies(self) -> dict[int, dict[str, float]]:
        """{step: {benchmark: Avg@n}} of verl's validation; if a step has several n, the largest."""
        result: dict[int, dict[str, float]] = defaultdict(dict)
        for step, values in self.steps.items():
            found = [(match, value) for name, value in values.items() if (match := ACCURACY.match(name))]
            for match, value in sorted(found, key=lambda pair: int(pair[0]["n"])):
                result[step][match["benchmark"]] = value
        return dict(result)

    def saved(self, name: str) -> dict[str, object]:
        """{"a.b.c": value} of a file of hydra's beside ``config``, a list under ""; empty where it is not readable."""
        try:
            return {} if self.config is None else flattened(load(self.config.with_name(name)))
        except ValueError:  # `read_run` has noted it
            return {}


def labelled(text: str) -> tuple[Path, str | None]:
    """Split "[LABEL=]PATH" into path and label."""
    label, _, path = text.partition("=")
    # A path may contain =, such as the folders of hydra's sweeps: lr=1e-6.
    return (Path(text), None) if Path(text).exists() or not path else (Path(path), label)


def read_runs(path: Path, label: str | None = None) -> list[Run]:
    """Read the run at ``path``, or all runs below it if hydra saved several; FileNotFoundError if there is none."""
    roots = sorted({file.parent.parent for file in files_below(path, "hydra.yaml")}) if path.is_dir() else []
    if len(roots) < 2 and not any((root / RECORD).exists() for root in roots):
        return [read_run(path, label)]
    runs = []
    for root in roots:
        with suppress(FileNotFoundError):  # of a command that ended before its first metric
            runs.append(read_run(root, label))
    if not runs:
        raise FileNotFoundError(
            f"none of the {len(roots)} runs in {path} has metrics of verl's file logger: the plug-in's trainers write "
            "them, other runs with trainer.logger=[console,file]"
        )
    return runs


def read_run(path: Path, label: str | None = None) -> Run:
    """Read a run from its folder, or from one jsonl file of verl's file logger.

    Every metrics file in the folder counts, as an attempt. An attempt replaces the steps of earlier ones beside it from
    its first step on, which led nowhere. Raises FileNotFoundError if there is no such path or no metrics in it.
    """
    if not path.exists():
        raise FileNotFoundError(f"no run at {path}: give the folder of a run, or a metrics file")
    files = [path] if path.is_file() else sorted(files_below(path, "*.jsonl"), key=_attempt)
    run = Run(path, label or (path.stem if path.is_file() else path.resolve().name))
    found: dict[str, dict[int, dict[str, float]]] = {}  # {folder: its steps}
    for file in files:
        if not (records := list(_metrics(file, run.notes))):
            continue
        steps, (first, _) = found.setdefault(str(file.parent), {}), records[0]
        if given_up := [step for step in sorted(steps) if step > first]:
            run.notes.append(f"steps {given_up[0]} to {given_up[-1]} were given up: {file.name} begins at step {first}")
        for step in given_up:
            del steps[step]
        for step, values in records:
            _merge(
                steps.setdefault(step, {}), values, f"step {step} was validated twice; {file.name} counts", run.notes
            )
    if not found:
        raise FileNotFoundError(f"no metrics of verl's file logger in {path}: expected jsonl lines of step and data")
    if len(found) > 1:
        run.notes.append(f"metrics of {len(found)} folders are taken for one run: {', '.join(found)}")
    for folder, steps in found.items():
        for step, values in steps.items():
            twice = f"step {step} was validated twice; {folder} counts"
            _merge(run.steps.setdefault(step, {}), values, twice, run.notes)
    run.steps = dict(sorted(run.steps.items()))
    _read_config(path, run, label)
    if path.is_dir():
        # verl's dumps of training responses look the same, but have no sources beside them.
        dumps = sorted({p.parent for p in files_below(path, "*.jsonl") if p.stem.isdecimal()})
        run.generations = next((d for d in dumps if any(d.glob(f"*{SOURCES_SUFFIX}"))), dumps[0] if dumps else None)
    return run


def _merge(kept: dict[str, float], values: dict[str, float], twice: str, notes: list[str]) -> None:
    """Put a step's values over those that are kept; note it if that changes an accuracy."""
    notes += [twice for name, value in values.items() if ACCURACY.match(name) and kept.get(name, value) != value]
    kept |= values


def _attempt(file: Path) -> tuple:
    """Sort key that puts metrics-2 before metrics-10."""
    return (str(file.parent), [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", file.name)])


def _lines(file: Path, notes: list[str]) -> Iterator[dict]:
    """Yield the objects of a jsonl file; note the lines that are not objects."""
    bad, cut_off = 0, False
    try:
        # Line by line, as the answers of a validation may be larger than the memory. Only "\n" ends a line: verl writes
        # answers as they are, with signs such as U+2028 in them.
        with file.open(encoding="utf-8", errors="replace", newline="\n") as lines:
            for line in filter(str.strip, lines):
                try:
                    record = json.loads(line, parse_int=_whole)
                except (json.JSONDecodeError, RecursionError):
                    record = None
                cut_off = not isinstance(record, dict)
                bad += cut_off
                if not cut_off:
                    yield record
    except OSError as error:
        notes.append(f"{file.name}: {error.strerror}")
    if bad:
        end = "; the last is cut off: a run killed, or still being written" if cut_off else ""
        notes.append(f"{file.name}: {bad} line(s) are not JSON objects and were skipped{end}")


def _whole(digits: str) -> int | float:
    """A JSON number; of one so long that Python refuses to read it, or to make a float of it, the infinite float."""
    return int(digits) if len(digits) < 300 else float(digits)


def _metrics(file: Path, notes: list[str]) -> Iterator[tuple[int, dict[str, float]]]:
    if file.stem.isdecimal():  # a dump of generations
        return
    missing, foreign = set(), 0
    for record in _lines(file, notes):
        step, data = record.get("step"), record.get("data")
        if not isinstance(step, int) or isinstance(step, bool) or not isinstance(data, dict):
            foreign += 1
            continue
        values = {}
        for name, value in data.items():
            if isinstance(value, bool) or not isinstance(value, int | float | None):
                continue
            if value is None or not math.isfinite(value):
                missing.add(name)
            else:
                values[name] = float(value)
        yield step, values
    if foreign:
        notes.append(f"{file.name}: {foreign} line(s) without a step and data were skipped")
    if missing:
        shown = ", ".join(sorted(missing)[:3]) + (" ..." if len(missing) > 3 else "")
        notes.append(f"{file.name}: values of {shown} that are not finite were skipped")


def _read_config(path: Path, run: Run, label: str | None) -> None:
    """Take label, seed and last step from what hydra saved with the run."""
    folder = path if path.is_dir() else path.parent
    # What lies further below a single file's folder may be another run's.
    saved = sorted(files_below(folder, "hydra.yaml") if folder == path else folder.glob("*/hydra.yaml"))
    if not saved:
        return
    run.config = saved[0].with_name("config.yaml")
    try:
        hydra, config = (flattened(load(file)) for file in (saved[0], run.config))
    except ValueError as error:
        run.notes.append(str(error))
        return
    if label is None:
        run.label = _label_of_job(folder, run.notes) or str(select(hydra, METHOD) or run.label)
    run.scale = None if (scale := select(hydra, SCALE)) is None else str(scale)
    numbers: dict[str, int | None] = {}
    for key in ("data.seed", "trainer.total_training_steps"):
        value = select(config, key)
        numbers[key] = value if isinstance(value, int) and not isinstance(value, bool) else None
        if value is not None and numbers[key] is None:
            run.notes.append(f"{run.config}: {key} is {value!r:.200}, not a whole number: read as not given")
    run.seed, run.t_stop = numbers.values()


def _label_of_job(folder: Path, notes: list[str]) -> str | None:
    """What sets a sweep's job apart from the others, except its seed: "key=value,..." or a method's bare name."""
    try:
        record = read_record(folder)
    except (OSError, ValueError) as error:
        notes.append(str(error))
        return None
    if record is None and (folder / OLD_RECORD).exists():
        notes.append(f"{OLD_RECORD}: the sweep record of an older version; the run is not labelled by what was swept")
    swept = [text for text in (record or {}).get("swept", []) if not text.startswith("seed=")]
    return ",".join(text.removeprefix("method=") for text in swept) or None


@dataclass
class Answers:
    """The answers of one validation, by problem."""

    correct: dict[tuple[str, str], dict[tuple[str, str], float]] = field(default_factory=dict)
    """{(benchmark, prompt): {sample: its accuracy}}."""
    notes: list[str] = field(default_factory=list)

    def accuracy(self, benchmark: str | None = None) -> dict[tuple[str, str], float]:
        """{problem: Avg@n} of one benchmark, or of all."""
        return {
            key: math.fsum(values.values()) / len(values)
            for key, values in self.correct.items()
            if benchmark is None or key[0] == benchmark
        }


def read_generations(folder: Path, step: int) -> Answers:
    """Read the answers that verl dumped at ``step``; the benchmark is "all" if the trainer left no sources.

    Raises FileNotFoundError without a dump of that step.
    """
    file, answers = folder / f"{step}.jsonl", Answers()
    if not file.exists():
        raise FileNotFoundError(f"no generations of step {step} in {folder}")
    sources = {}
    try:
        sources = {uid: str(name) for uid, name in json.loads((folder / f"{step}{SOURCES_SUFFIX}").read_text()).items()}
    except (OSError, ValueError, AttributeError, RecursionError):
        answers.notes.append(f"{file.name}: no data sources beside it, all problems count as one benchmark")
    skipped = 0
    for record in _lines(file, answers.notes):
        accuracy, prompt = record.get("acc", record.get("score")), record.get("input")
        if not isinstance(accuracy, int | float) or not math.isfinite(accuracy) or not isinstance(prompt, str):
            skipped += 1
            continue
        # verl's key: uid of the prompt, number of the sample, number of the output. An agent loop may make several
        # outputs per sample; the last one counts, as in verl's metrics.
        uid, sample, _ = (str(record.get("uid", "")).rsplit("_", 2) + ["", ""])[:3]
        problem = answers.correct.setdefault((sources.get(uid, "all"), prompt), {})
        problem[uid, sample or str(len(problem))] = float(accuracy)
    if skipped:
        answers.notes.append(f"{file.name}: {skipped} answer(s) without input and accuracy were skipped")
    return answers
