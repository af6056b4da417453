"""The start of the quickstart's trainer with forked workers and with plain ones, in turn.

    python tests/benchmarks/start.py outputs/quickstart [--pairs 2]

FOLDER is a quickstart's: its data and model are used again. Prints, for each run of one step, the seconds from the
command to the end of the trainer's start, to the end of the step, and to the end of the command, and the median ratio.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart" / "run.py"
SHORT = (
    "trainer.total_training_steps=1",
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
    "trainer.save_freq=-1",
)
PLAIN = {"RAY_RUNTIME_ENV_HOOK": "builtins.dict"}
"""A hook of Ray's that changes nothing, in place of the plug-in's."""
MOMENTS = {"started": "ready to fit", "step": "cppo_verl  step 1/1"}


def run(inputs, environment):
    """Seconds from the command to each of `MOMENTS` in its log, and to its end."""
    with tempfile.TemporaryDirectory() as output:
        for name in ("data", "model"):
            Path(output, name).symlink_to((inputs / name).resolve())
        log, seconds = Path(output, "logs", "train-0.log"), {}
        begin = time.perf_counter()
        process = subprocess.Popen(
            [sys.executable, str(QUICKSTART), "--output", output, *SHORT],
            env=os.environ | {"VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1"} | environment,
            stdout=subprocess.DEVNULL,
        )
        while process.poll() is None:
            text = log.read_text() if log.exists() else ""
            for moment, words in MOMENTS.items():
                if words in text:
                    seconds.setdefault(moment, time.perf_counter() - begin)
            time.sleep(0.1)
        if process.returncode:
            sys.exit(f"the quickstart ended with exit code {process.returncode}")
        return [*seconds.values(), time.perf_counter() - begin]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=int, default=2)
    args = parser.parse_args()
    print("workers   started s   step s   end s")
    runs = {"plain": [], "forked": []}
    for _ in range(args.pairs):
        for workers, environment in (("plain", PLAIN), ("forked", {})):
            runs[workers].append(run(args.folder, environment))
            print("{:7}{:12.0f}{:9.0f}{:8.0f}".format(workers, *runs[workers][-1]), flush=True)
    ratios = [median(f[i] / p[i] for p, f in zip(*runs.values(), strict=True)) for i in range(len(MOMENTS) + 1)]
    print("{:7}{:12.2f}{:9.2f}{:8.2f}".format("ratio", *ratios))


if __name__ == "__main__":
    main()
