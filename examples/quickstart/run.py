"""The quickstart: data, a warmed-up tiny Qwen3, CPPO by verl's trainer, and a summary with a picture.

    python examples/quickstart/run.py [--output FOLDER] [hydra overrides of verl's trainer]

Each part is skipped if FOLDER already holds it. SIGTERM ends the training after its step with a checkpoint; Ctrl-C and
a second SIGTERM end it at once. The same command continues from the last checkpoint.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from statistics import fmean

import warmup

from cppo_verl.data.reasoning_gym import write_parquet
from cppo_verl.launch import trainer_process

HERE = Path(__file__).parent
TASK = "number_sorting"
TASK_SETTINGS = {
    "min_numbers": 5,
    "max_numbers": 5,
    "min_decimals": 0,
    "max_decimals": 0,
    "min_value": 10,
    "max_value": 99,
}
ACCURACY = f"val-core/reasoning_gym/{TASK}/acc/mean@16"


def main(argv=None):
    begin = time.monotonic()
    output, overrides = arguments(argv, __doc__, "outputs/quickstart")
    files = write_data(output / "data", TASK, TASK_SETTINGS)
    warmup.warm_up(*files, output / "model", warmup.Settings())
    code = train(output, overrides, HERE / "quickstart.yaml", progress)
    if code == 0:
        summarise(output, time.monotonic() - begin)
    return code


def arguments(argv, description, default):
    """The run's folder and hydra's overrides."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(default), help="default: %(default)s")
    args, overrides = parser.parse_known_args(argv)
    return args.output.resolve(), overrides


def write_data(folder, task, settings):
    """A task's training and validation file, made unless they are there."""
    files = folder / "train.parquet", folder / "validation.parquet"
    if not files[-1].exists():
        write_parquet(task, folder, train_size=8192, validation_size=48, seed=1, **settings)
    return files


def train(output, overrides, config, show):
    """Run verl's trainer on the primary config file ``config`` to the end and print ``show(step, metrics)`` of each
    step; return its exit code."""
    logs = output / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    # verl's file logger overwrites what it is given: an attempt that resumes gets a file of its own.
    attempt = len(list(logs.glob("metrics-*.jsonl")))
    metrics, log = logs / f"metrics-{attempt}.jsonl", logs / f"train-{attempt}.log"
    place = f"output={trainer_process.quoted(output)}"
    arguments = ["--config-dir", str(config.parent), "--config-name", config.stem, place, *overrides]
    environment = os.environ | {
        "VERL_FILE_LOGGER_PATH": str(metrics),
        "TENSORBOARD_DIR": str(logs / "tensorboard"),
        "WANDB_MODE": os.environ.get("WANDB_MODE", "offline"),
        "WANDB_DIR": str(logs),
        # A Ray of its own: one that runs here already lacks this run's slots, and Ray refuses to add them.
        "RAY_ADDRESS": "local",
        "HYDRA_FULL_ERROR": "1",
    }
    print(
        f"training; the full log is {log}\nstarting Ray, the trainer and vLLM takes about half a minute",
        flush=True,
    )
    try:
        with trainer_process.trainer(arguments, log, environment, checkpoints=output / "checkpoints") as trainer:
            follow(trainer, metrics, show)
    except OSError as error:
        print(f"\n{error}", file=sys.stderr)
        return 1
    except trainer_process.Stopped as stopped:
        print(f"\n{stopped}; the same command continues", flush=True)
        return trainer_process.EXIT_CODE_STOPPED
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues from the last checkpoint", flush=True)
        return 130
    if trainer.returncode:
        trainer_process.show_failure(trainer, log)
    return trainer.returncode


def follow(trainer, metrics, show):
    """Print a line a step from the run's jsonl until the trainer ends."""
    shown = 0
    while trainer.poll() is None or shown < len(read(metrics)):
        for step, values in read(metrics)[shown:]:
            print(show(step, values), flush=True)
            shown += 1
        time.sleep(0.5)


def progress(step, values):
    parts = [f"step {step:3d}"]
    if "critic/score/mean" in values:
        parts.append(f"reward {values['critic/score/mean']:.2f}")
    if "trust_region/masked_share" in values:
        parts.append(f"masked {values['trust_region/masked_share']:5.1%}")
        parts.append(f"of which by the budget {values.get('trust_region/budget_rejected_share', 0):4.0%}")
    if "timing_s/step" in values:
        parts.append(f"{values['timing_s/step']:.1f} s")
    if ACCURACY in values:
        parts.append(f"validation accuracy {values[ACCURACY]:.3f}")
    return "  ".join(parts)


def read(*paths):
    """[(step, metrics)] of jsonl logs in step order; a later attempt's line replaces an earlier one's."""
    steps = {}
    for path in paths:
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue  # the line that is being written
            steps.setdefault(record["step"], {}).update(record["data"])
    return sorted(steps.items())


def attempts(output):
    """The jsonl logs of a run's attempts, in their order."""
    return sorted((output / "logs").glob("metrics-*.jsonl"), key=lambda path: int(path.stem.split("-")[1]))


def summarise(output, seconds):
    import plot  # with matplotlib, which the training need not wait for

    steps = read(*attempts(output))
    accuracy = [(step, values[ACCURACY]) for step, values in steps if ACCURACY in values]
    scores = " -> ".join(f"{accuracy[i][1]:.3f} at step {accuracy[i][0]}" for i in (0, -1)) if accuracy else "not run"
    # verl's own losses have no mask to report.
    rows = [values for _, values in steps if "trust_region/masked_share" in values]
    masked = [row["trust_region/masked_share"] for row in rows]
    by_budget = [row["trust_region/masked_share"] * row.get("trust_region/budget_rejected_share", 0) for row in rows]
    shares = f"{fmean(masked):.1%}, of all tokens {fmean(by_budget):.1%} by the prefix budget" if rows else "none"
    picture = plot.draw(steps, ACCURACY, output / "quickstart.png")
    print(
        f"""
validation accuracy (Avg@16)  {scores}
tokens masked                 {shares}
time                          {seconds / 60:.1f} minutes
checkpoints                   {relative(output / "checkpoints")}
metrics                       {relative(output / "logs")}/metrics-*.jsonl
TensorBoard                   tensorboard --logdir {relative(output / "logs" / "tensorboard")}
wandb, offline                wandb sync {relative(output / "logs" / "wandb")}/offline-run-*
picture                       {relative(picture)}"""
    )


def relative(path):
    return os.path.relpath(path)


if __name__ == "__main__":
    sys.exit(main())
