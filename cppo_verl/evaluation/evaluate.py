"""Score a checkpoint by verl's own validation: Avg@n and pass@k with intervals over problems."""

import argparse
import json
import math
import os
import re
import sys
from pathlib import Path
from statistics import fmean

from cppo_verl.artifacts.atomic import replacing
from cppo_verl.artifacts.run_reader import read_generations
from cppo_verl.evaluation.statistics import Interval, interval_over_problems, pass_at_k
from cppo_verl.evaluation.table import markdown, percent
from cppo_verl.launch import trainer_process

GENERATIONS, RESULT = "generations", "result.json"
WEIGHTS = "actor"
"""The folder of the trained weights in a checkpoint of verl's."""
CHECKPOINT = re.compile(r"global_step_\d+")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, help="folder for the answers and the result")
    checkpoint = "verl's global_step_N folder; default: the model.path of the command"
    parser.add_argument("--checkpoint", type=Path, help=checkpoint)
    parser.add_argument("--samples", type=int, default=16, help="answers per problem (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--top-p", type=float, default=0.95)
    parser.add_argument("--force", action="store_true", help="evaluate again where --output holds a result")
    command = "after --: the training run's arguments of verl.trainer.main_ppo; its model, data and reward are used"
    parser.add_argument("command", nargs=argparse.REMAINDER, help=command)


def run(args: argparse.Namespace) -> int:
    """Print the result; evaluate first unless ``--output`` holds it. Return verl's exit code if that failed."""
    output = args.output.resolve()
    result, log = output / RESULT, output / "verl.log"
    try:
        if output.exists() and any(output.iterdir()) and not log.exists():
            raise ValueError(f"{output} holds what no evaluation has made: give another --output")
        if of_run := next(filter(holds_run, output.parents), None):
            raise ValueError(
                f"{output} is within the run {of_run} and would count as a part of it: give an --output beside"
            )
        asked = request(args)
        if held := None if args.force else held_result(result, asked):
            print(f"{result} is there: showing it; --force evaluates again")
            print(show(held))
            return 0
        if not asked["command"]:
            raise ValueError(f"no result in {output} to show: give the training run's arguments, after --, for one")
        if args.checkpoint:
            refuse_objects(Path(asked["checkpoint"]) / WEIGHTS)
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        wanted = "--output must be a folder that can be written to, and every file of --checkpoint readable"
        print(f"{error.filename}: {error.strerror}; {wanted}", file=sys.stderr)
        return 1
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    result.unlink(missing_ok=True)
    if args.checkpoint:
        link_weights(Path(asked["checkpoint"]), linked(args, output))
    before = dumps(output)
    print(f"verl validates; its log is {log}", flush=True)
    environment = os.environ | {"VERL_FILE_LOGGER_PATH": str(output / "metrics.jsonl")}
    if code := trainer_process.run_to_end([*asked["command"], *overrides(args, output)], log, environment):
        return code
    if not (written := dumps(output) - before):
        print(f"verl ended without answers in {output / GENERATIONS}; see {log}", file=sys.stderr)
        return 1
    _, newest = max(written)
    value = summary(output / GENERATIONS, int(newest.stem), args.samples) | asked
    with replacing(result) as (file,):
        file.write_text(json.dumps(value, indent=1))
    print(show(value))
    return 0


def holds_run(folder: Path) -> bool:
    """Whether this is the folder of a training run, as hydra leaves it, or of its checkpoints."""
    made = ("hydra/hydra.yaml", ".hydra/hydra.yaml", "latest_checkpointed_iteration.txt")
    return any((folder / name).exists() for name in made)


def request(args: argparse.Namespace) -> dict:
    """Return what decides a result; raise ValueError for a checkpoint that is none."""
    sampling = {"samples": args.samples, "temperature": args.temperature, "top_p": args.top_p}
    asked = sampling | {"command": [a for a in args.command if a != "--"], "checkpoint": None, "saved": None}
    if args.checkpoint is None:
        return asked
    folder = args.checkpoint.resolve()
    weights = [file.stat().st_mtime_ns for file in (folder / WEIGHTS).rglob("*") if file.is_file()]
    if not CHECKPOINT.fullmatch(folder.name) or not weights:
        raise ValueError(f"no checkpoint at {args.checkpoint}: expected a global_step_N folder of verl's")
    return asked | {"checkpoint": str(folder), "saved": max(weights)}


def held_result(result: Path, asked: dict) -> dict | None:
    """Return the result in a file, None without one; raise ValueError if it answers another request or is damaged.

    Without a command and a checkpoint whatever is there is asked for.
    """
    try:
        held = json.loads(result.read_text())
        there = {key: held.get(key) for key in asked}
        show(held)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{result} is damaged ({error!r}): move it, or --force to evaluate again") from error
    if there != asked and (asked["command"] or asked["checkpoint"]):
        differs = "; ".join(f"{k} was {there[k]}, is {v}" for k, v in asked.items() if there[k] != v)
        raise ValueError(f"{result} is of another evaluation ({differs}): give another --output, or --force")
    return held


def refuse_objects(weights: Path) -> None:
    """Raise ValueError if a file of weights holds more than tensors: verl unpickles whatever it holds.

    The optimizer's and the extra state, of which the latter does hold more, are not loaded.
    """
    import torch
    import torch.distributed.tensor  # makes its sharded tensors known as harmless

    for file in sorted(weights.rglob("*.pt")):
        if not file.name.startswith(("optim_", "extra_state_")):
            try:
                torch.load(file, map_location="meta", mmap=True, weights_only=True)
            except OSError:
                raise
            except Exception as error:  # torch's, pickle's, and those of damaged files
                reason = type(error).__name__
                raise ValueError(f"{file} is damaged, or holds more than tensors ({reason})") from error


def link_weights(checkpoint: Path, folder: Path) -> None:
    """Make a folder that holds nothing of a checkpoint but its weights, for verl to resume from.

    verl would also unpickle the data's position and TransferQueue's content, which a validation does not need.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (link := folder / WEIGHTS).unlink(missing_ok=True)
    link.symlink_to(checkpoint / WEIGHTS)


def linked(args: argparse.Namespace, output: Path) -> Path:
    return output / "checkpoint" / args.checkpoint.resolve().name


def dumps(output: Path) -> set[tuple[int, Path]]:
    """Return time and path of verl's answers."""
    return {(file.stat().st_mtime_ns, file) for file in (output / GENERATIONS).glob("*.jsonl") if file.stem.isdecimal()}


def overrides(args: argparse.Namespace, output: Path) -> list[str]:
    """Return the overrides that turn the training command into one validation, which writes into ``output`` alone."""
    quoted = trainer_process.quoted
    resume = ["trainer.resume_mode=disable"]
    if args.checkpoint:
        resume = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={quoted(linked(args, output))}"]
    sampling = "actor_rollout_ref.rollout.val_kwargs."
    return [
        "trainer.val_only=true",
        "trainer.val_before_train=true",
        "trainer.logger=[console,file]",
        f"trainer.validation_data_dir={quoted(output / GENERATIONS)}",
        f"trainer.default_local_dir={quoted(output / 'no-checkpoints')}",
        f"hydra.run.dir={quoted(output)}",
        "hydra.output_subdir=null",
        *resume,
        "actor_rollout_ref.actor.checkpoint.load_contents=[model]",  # see `refuse_objects`
        f"{sampling}n={args.samples}",
        f"{sampling}do_sample={'true' if args.temperature else 'false'}",
        f"{sampling}temperature={args.temperature}",
        f"{sampling}top_p={args.top_p}",
    ]


def summary(folder: Path, step: int, samples: int) -> dict:
    """Return Avg@n and pass@k, in [0, 1], of each benchmark in a folder of verl's answers.

    A problem with fewer than ``samples`` answers counts with those it has; ``short`` is the number of such problems.
    """
    answers = read_generations(folder, step)
    benchmarks = {}
    for name in sorted({benchmark for benchmark, _ in answers.correct}):
        rows = [list(values.values()) for (b, _), values in answers.correct.items() if b == name]
        averages = [fmean(values) for values in rows]
        ks = [k for k in (1, 2, 4, 8, 16, 32, 64, 128, 256) if k <= min(map(len, rows))]
        benchmarks[name] = {
            "problems": len(rows),
            "answers": sum(map(len, rows)),
            "short": sum(len(values) < samples for values in rows),
            "average": fmean(averages),
            "interval": [None if math.isnan(x) else x for x in interval_over_problems(averages)],
            "pass": {k: fmean(pass_at_k(sum(v >= 1 for v in row), len(row), k) for row in rows) for k in ks},
        }
    return {"step": step, "samples": samples, "benchmarks": benchmarks, "notes": answers.notes}


def show(value: dict) -> str:
    """Return a `summary` as a Markdown table."""
    ks = sorted({int(k) for b in value["benchmarks"].values() for k in b["pass"]})
    header = ["benchmark", "problems", f"Avg@{value['samples']} [95 %]", *(f"pass@{k}" for k in ks)]
    rows, short = [], []
    for name, b in value["benchmarks"].items():
        passed = {int(k): v for k, v in b["pass"].items()}
        average = percent(b["average"], None if None in b["interval"] else Interval(*b["interval"]))
        rows.append([name, str(b["problems"]), average, *(percent(passed[k]) if k in passed else "" for k in ks)])
        if b["short"]:
            short.append(f"{name}: {b['short']} problem(s) have fewer than {value['samples']} answers")
    if len(rows) > 1:
        averages, problems = zip(*((b["average"], b["problems"]) for b in value["benchmarks"].values()), strict=True)
        rows.append(["mean", str(sum(problems)), percent(fmean(averages)), *[""] * len(ks)])
    return "\n".join([markdown(header, rows), *short, *value["notes"]])
