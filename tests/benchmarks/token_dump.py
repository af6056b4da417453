"""What the dump of tokens costs: steps of the quickstart with and without one, in turn in one run.

    python tests/benchmarks/token_dump.py --quickstart FOLDER [--steps 40]

FOLDER holds data and model of a quickstart, whose dump (32 responses) is switched on at every other step. Each dumping
step is compared with the mean of its two neighbours.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

from omegaconf import OmegaConf

EXAMPLE = Path(__file__).parents[2] / "examples" / "quickstart"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("data", "model"):
            os.symlink((args.quickstart / name).resolve(), Path(folder) / name)
        command = [sys.executable, str(EXAMPLE / "run.py"), "--output", folder, "trust_region.dump.every=2"]
        command += [f"trainer.total_training_steps={args.steps}", "trainer.test_freq=-1", "trainer.save_freq=-1"]
        command += ["trainer.val_before_train=false", "trainer.logger=[console,file]"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(folder) / "logs" / "metrics-0.jsonl").read_text().splitlines()
        files = list((Path(folder) / "checkpoints" / "tokens").glob("step-*.parquet"))
        sizes = [file.stat().st_size for file in files]
    steps = {record["step"]: record["data"] for record in map(json.loads, lines)}
    every = OmegaConf.load(EXAMPLE / "quickstart.yaml").trust_region.dump.every
    # The first step waits for vLLM to warm up.
    dumping = range(4, args.steps, 2)
    for phase in ("step", "update_actor"):
        seconds = {step: values[f"timing_s/{phase}"] for step, values in steps.items()}
        ratio = median(2 * seconds[step] / (seconds[step - 1] + seconds[step + 1]) for step in dumping)
        with_dump, without = (median(seconds[step + shift] for step in dumping) for shift in (0, 1))
        print(f"{phase:14} {with_dump:.3f} s with a dump, {without:.3f} s without, median of pairs {ratio:.3f}")
    share = median(steps[step]["timing_s/dump_tokens"] / steps[step]["timing_s/step"] for step in dumping)
    print(f"in the trainer's process: {share:.2%} of a dumping step, {share / every:.2%} at every {every}")
    print(f"{len(sizes)} files, median {median(sizes) / 1e3:.1f} kB")


if __name__ == "__main__":
    main()
