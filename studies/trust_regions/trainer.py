"""The study's cells in verl's real trainer: prints their commands, and reads what they leave behind.

python -m studies.trust_regions.trainer commands
python -m studies.trust_regions.trainer collect outputs/study/trainer
"""

import argparse
import shlex
from pathlib import Path

import pandas as pd

from cppo_verl.artifacts import run_reader
from studies.trust_regions import results, rules
from studies.trust_regions.results import Cell

METHODS = ("none", "dppo", "cppo")
SEEDS = range(201, 206)
FOLDER = Path("outputs/study/trainer")
COLUMNS = {
    "accuracy": "critic/score/mean",
    "masked": "trust_region/masked_share",
    "deviation": "trust_region/divergence",
}
"""The loop's columns, and the trainer's metrics of the same meaning."""


def command(cell: Cell) -> str:
    """What runs the cell of the loop in verl's trainer, one run for each seed."""
    method, *overrides = rules.text(cell.about["method"], cell.about["thresholds"]).split()
    name = FOLDER / cell.about["method"]
    settings = cell.about["settings"]
    arguments = ["--config-dir", "studies/trust_regions", "--config-name", "trainer", "-m"]
    arguments += [f"seed={','.join(map(str, SEEDS))}", f"method={method}", *overrides]
    arguments += [f"actor_rollout_ref.actor.optim.lr={settings['learning_rate']:g}"]
    places = f"output=$PWD/{name} inputs=$PWD/{FOLDER}/inputs"
    return f"{shlex.join(['python', '-m', 'verl.trainer.main_ppo', *arguments])} {places}"


def commands(folder: Path) -> list[str]:
    """Of the export for each seed, then of the sweep for each method, from the results of the loop in ``folder``."""
    lines = [
        f"python -m studies.trust_regions.export --horizon 64 --seed {seed} --output {FOLDER}/inputs/{seed}"
        for seed in SEEDS
    ]
    cells = (results.read(folder / f"{method}_h64_u16_share-0.05.parquet") for method in METHODS)
    return lines + [command(cell) for cell in cells]


def collect(runs: Path, loop: Cell) -> Cell:
    """The trainer's runs of one method, as a cell; ``loop`` is the same in the loop."""
    frames = []
    for run in run_reader.read_runs(runs):
        steps = {step: values for step, values in run.steps.items() if COLUMNS["accuracy"] in values}
        columns = {name: [values.get(key, 0.0) for values in steps.values()] for name, key in COLUMNS.items()}
        by_budget = [
            values.get("trust_region/budget_rejected_share", 0.0) * values.get(COLUMNS["masked"], 0.0)
            for values in steps.values()
        ]
        # How many tokens had a signal is not logged; all steps weigh alike.
        frame = pd.DataFrame({"seed": run.seed, "step": list(steps), **columns, "by_budget": by_budget, "tokens": 1})
        frames.append(frame)
    about = {name: value for name, value in loop.about.items() if name != "seconds"}
    about |= {"command": command(loop), "seeds": "trainer"}
    return Cell(pd.concat(frames, ignore_index=True), about)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="default: %(default)s")
    parts = parser.add_subparsers(dest="part", required=True)
    parts.add_parser("commands", help="print them")
    parts.add_parser("collect", help="write the results").add_argument("runs", type=Path)
    args = parser.parse_args()
    evaluation = args.results / "evaluation"
    if args.part == "commands":
        print("\n".join(commands(evaluation)))
        return
    for method in METHODS:
        name = f"{method}_h64_u16_share-0.05.parquet"
        results.write(args.results / "trainer" / name, *collect(args.runs / method, results.read(evaluation / name)))


if __name__ == "__main__":
    main()
