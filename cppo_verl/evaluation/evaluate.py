"""Score a checkpoint by verl's own validation: Avg@n and pass@k with intervals over problems."""

import argparse
import json
import math
import os
import sys
from pathlib import Path
from statistics import fmean

from cppo_verl.artifacts.atomic import replacing
from cppo_verl.artifacts.run_reader import read_generations
from cppo_verl.evaluation.statistics import Interval, interval_over_problems, pass_at_k
from cppo_verl.evaluation.table import markdown, percent
from cppo_verl.launch import trainer_process

GENERATIONS, RESULT = "generations", "result.json"


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
    """Print the result; evaluate first unless ``--output`` holds one. Return verl's exit code if that failed."""
    output = args.output.resolve()
    result = output / RESULT
    if result.exists() and not args.force:
        print(f"{result} is there: showing it; --force evaluates again")
        print(show(json.loads(result.read_text())))
        return 0
    if args.checkpoint and not args.checkpoint.is_dir():
        print(f"no checkpoint at {args.checkpoint}: expected a global_step_N folder of verl's", file=sys.stderr)
        return 1
    output.mkdir(parents=True, exist_ok=True)
    result.unlink(missing_ok=True)
    log = output / "verl.log"
    print(f"verl validates; its log is {log}", flush=True)
    arguments = [a for a in args.command if a != "--"]
    environment = os.environ | {"VERL_FILE_LOGGER_PATH": str(output / "metrics.jsonl")}
    try:
        with trainer_process.trainer([*arguments, *overrides(args, output)], log, environment) as trainer:
            trainer.wait()
    except KeyboardInterrupt:
        print("\ninterrupted; the same command starts over", flush=True)
        return 130
    if trainer.returncode:
        trainer_process.show_failure(trainer, log)
        return trainer.returncode
    dumps = [path for path in (output / GENERATIONS).glob("*.jsonl") if path.stem.isdigit()]
    if not dumps:
        print(f"verl ended without answers in {output / GENERATIONS}; see {log}", file=sys.stderr)
        return 1
    newest = max(dumps, key=lambda path: path.stat().st_mtime)
    value = summary(output / GENERATIONS, int(newest.stem), args.samples)
    sampling = {"temperature": args.temperature, "top_p": args.top_p}
    with replacing(result) as (file,):
        file.write_text(json.dumps(value | sampling | {"command": arguments}, indent=1))
    print(show(value))
    return 0


def overrides(args: argparse.Namespace, output: Path) -> list[str]:
    """Return the overrides that turn the training command into one validation."""
    resume = ["trainer.resume_mode=disable"]
    if args.checkpoint:
        path = trainer_process.quoted(args.checkpoint.resolve())
        resume = ["trainer.resume_mode=resume_path", f"trainer.resume_from_path={path}"]
    sampling = "actor_rollout_ref.rollout.val_kwargs."
    return [
        "trainer.val_only=true",
        "trainer.val_before_train=true",
        "trainer.logger=[console,file]",
        f"trainer.validation_data_dir={trainer_process.quoted(output / GENERATIONS)}",
        f"trainer.default_local_dir={trainer_process.quoted(output / 'no-checkpoints')}",
        *resume,
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
