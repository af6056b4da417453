"""A step of the quickstart with this checkout beside another commit, in turn.

    python tests/benchmarks/step.py FOLDER COMMIT [--pairs 2] [--steps 12]

FOLDER is a quickstart's, such as outputs/quickstart: its data and model are used again. Prints, for each run, the
median seconds of a step, of its generation and of its eight updates, by verl's own timers and without the first two
steps, and the median ratio.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

HERE = Path(__file__).parents[2]
TIMERS = ("step", "gen", "update_actor")
WARM_UP = 2
"""Steps in which vLLM and torch do something for the first time."""


def run(checkout, inputs, steps):
    """Median of each of `TIMERS` over a run of that checkout's quickstart."""
    with tempfile.TemporaryDirectory() as output:
        for name in ("data", "model"):
            Path(output, name).symlink_to((inputs / name).resolve())
        settings = [f"trainer.total_training_steps={steps}", "trainer.val_before_train=false"]
        settings += ["trainer.test_freq=-1", "trainer.save_freq=-1"]
        # In each process of the run these come before the installed package: PYTHONPATH in Ray's workers, and the
        # working directory in what is started by python -m.
        environment = {"PYTHONPATH": str(checkout), "VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(checkout / "examples/quickstart/run.py"), "--output", output, *settings]
        process = subprocess.run(command, cwd=checkout, env=os.environ | environment, stdout=subprocess.DEVNULL)
        if process.returncode:
            sys.exit(f"the quickstart of {checkout} ended with exit code {process.returncode}")
        lines = Path(output, "logs", "metrics-0.jsonl").read_text().splitlines()[WARM_UP:]
        return [median(json.loads(line)["data"][f"timing_s/{timer}"] for line in lines) for timer in TIMERS]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("commit")
    parser.add_argument("--pairs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as other:
        archive = subprocess.run(["git", "archive", args.commit], cwd=HERE, stdout=subprocess.PIPE, check=True).stdout
        subprocess.run(["tar", "-x", "-C", other], input=archive, check=True)
        checkouts = {args.commit: Path(other), "this": HERE}
        runs = {name: [] for name in checkouts}
        print("checkout   step s   generation s   updates s")
        for _ in range(args.pairs):
            for name, checkout in checkouts.items():
                runs[name].append(run(checkout, args.folder, args.steps))
                print("{:10.10}{:7.2f}{:15.2f}{:12.2f}".format(name, *runs[name][-1]), flush=True)
    ratios = [median(b[i] / a[i] for a, b in zip(*runs.values(), strict=True)) for i in range(len(TIMERS))]
    print("{:10}{:7.2f}{:15.2f}{:12.2f}".format("ratio", *ratios))


if __name__ == "__main__":
    main()
