"""How the time to read a run's metrics and its dump of tokens grows with their size.

    python tests/benchmarks/reading.py [--steps 1000] [--files 50]

Reads the shipped run's own lines and files, repeated to 1, 4 and 16 times --steps and --files: with linear growth the
time per step and per token stays the same.
"""

import argparse
import itertools
import json
import shutil
import tempfile
import time
from pathlib import Path
from statistics import median

from cppo_verl.artifacts.run_reader import read_run
from cppo_verl.artifacts.token_dump import read_tokens

RUN = Path(__file__).parents[2] / "examples" / "analysis" / "run"
ROUNDS = 3


def seconds(function, path):
    """Median time of a call, and what it returned."""
    times = []
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        result = function(path)
        times.append(time.perf_counter() - begin)
    return median(times), result


def metrics(file, steps):
    records = [json.loads(line) for line in (RUN / "logs" / "metrics-0.jsonl").read_text().splitlines()]
    lines = (json.dumps(r | {"step": step}) for step, r in enumerate(itertools.islice(itertools.cycle(records), steps)))
    file.write_text("\n".join(lines) + "\n")


def dump(folder, files):
    """Copies of the shipped files under names of their own."""
    folder.mkdir()
    shipped = sorted((RUN / "checkpoints" / "tokens").iterdir())
    for step, source in enumerate(itertools.islice(itertools.cycle(shipped), files)):
        shutil.copy(source, folder / f"step-{step:06d}.parquet")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--files", type=int, default=50)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(" steps   read s   ms a step")
        for factor in (1, 4, 16):
            steps = factor * args.steps
            metrics(folder / "metrics.jsonl", steps)
            took, run = seconds(read_run, folder / "metrics.jsonl")
            assert len(run.steps) == steps
            print(f"{steps:6d}{took:9.2f}{took / steps * 1e3:12.3f}", flush=True)
        print(" files   tokens   bytes a token   read s   us a token")
        for factor in (1, 4, 16):
            files = factor * args.files
            dump(folder / str(factor), files)
            took, read = seconds(read_tokens, folder / str(factor))
            tokens = sum(len(response.mask) for response in read.responses)
            size = sum(file.stat().st_size for file in (folder / str(factor)).iterdir())
            print(f"{files:6d}{tokens:9d}{size / tokens:16.1f}{took:9.2f}{took / tokens * 1e6:13.2f}", flush=True)


if __name__ == "__main__":
    main()
