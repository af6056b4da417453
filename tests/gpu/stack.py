"""Accept the whole stack on one GPU: verl's trainer, FSDP2 and vLLM, with a binary and with a top-K divergence.

    python tests/gpu/stack.py [--output outputs/gpu] [--steps 20] [-- arguments of verl.trainer.main_ppo]

Trains examples/gsm8k (Qwen3-0.6B, one GPU) for 20 steps with each divergence, in folders of its own; prepares GSM8K
first, in data/gsm8k. Prints one Markdown table, with the engines' mismatch, time, throughput and memory of both, and
exits with 1 if a row of it is out of its bound. Not yet run on a GPU.

Arguments after -- train something else, such as the quickstart on the CPU, whose data and model another run has made:

    python tests/gpu/stack.py -- --config-dir examples/quickstart --config-name quickstart inputs=outputs/quickstart
"""

import argparse
import math
import os
import subprocess
import sys
from pathlib import Path
from statistics import fmean, median

import torch

from cppo_verl.analysis.mismatch import Mismatch, rule_of
from cppo_verl.artifacts.run_reader import read_run
from cppo_verl.artifacts.token_dump import read_tokens
from cppo_verl.launch import trainer_process

ROOT = Path(__file__).parents[2]
DATA = Path("data/gsm8k")
DIVERGENCES = ("binary_tv", "topk_tv")
FIRST, MASKED = "trust_region/first_update/divergence", "trust_region/masked_share"


def command(folder, divergence, steps, own):
    """The arguments of verl's trainer for one of the two runs, in its own ``folder``."""
    config = ["--config-dir", str(ROOT / "examples" / "gsm8k"), "--config-name", "gsm8k", f"data_dir={DATA.absolute()}"]
    return [
        *(own or config),
        f"output={trainer_process.quoted(folder)}",
        f"divergence={divergence}",
        f"trainer.total_training_steps={steps}",
        "trainer.val_before_train=false",
        "trainer.test_freq=-1",
        "trainer.save_freq=-1",
        "trainer.logger=[console]",
        f"trainer.default_local_dir={trainer_process.quoted(folder / 'checkpoints')}",
        f"trust_region.dump.every={max(1, steps // 4)}",
    ]


def train(folder, arguments):
    """Run verl's trainer; return its exit code."""
    folder.mkdir(parents=True)
    log = folder / "train.log"
    print(f"training in {folder}; the log is {log}", file=sys.stderr, flush=True)
    with trainer_process.trainer(arguments, log, dict(os.environ)) as trainer:
        trainer.wait()
    if trainer.returncode:
        trainer_process.show_failure(trainer, log)
    return trainer.returncode


def found(folder):
    """What one run has logged and dumped: {row of the table: number}."""
    steps = {step: values for step, values in read_run(folder).steps.items() if "timing_s/step" in values}
    # The first step waits for kernels to be compiled and graphs to be captured.
    later = [values for step, values in steps.items() if step > min(steps)]
    dump = read_tokens(folder)
    first = [response for response in dump.responses if response.update == 0 and response.mask.any()]
    mismatch = Mismatch.of(first, rule_of(dump.header))
    tokens = [x["response_length/mean"] * responses(x) / x["timing_s/gen"] for x in later]
    return {
        "steps": len(steps),
        "first update: mean D_t": fmean(values[FIRST] for values in steps.values()),
        "first update: share of the prefix budget": mismatch.spent,
        "first update: share of tokens outside": mismatch.outside,
        "masked share": fmean(values[MASKED] for values in steps.values()),
        "grad norm, largest": max(values["actor/grad_norm"] for values in steps.values()),
        "reward, last step": steps[max(steps)]["critic/score/mean"],
        "s a step": median(values["timing_s/step"] for values in later),
        "s of it generation": median(values["timing_s/gen"] for values in later),
        "s of it the update": median(values["timing_s/update_actor"] for values in later),
        "response tokens a second of generation": median(tokens),
        "GB allocated, peak of the actor": max(x["actor/perf/max_memory_allocated_gb"] for x in steps.values()),
    }


def responses(values):
    """Number of responses of a step, of which verl logs the total of tokens and the mean lengths."""
    return values["perf/total_num_tokens"] / (values["response_length/mean"] + values["prompt_length/mean"])


def table(binary, top_k, steps):
    """The table in Markdown, and whether a row of it is out of its bounds."""
    bounds = {
        "steps": (steps, steps),
        "first update: mean D_t": (0, 0.01),
        "first update: share of the prefix budget": (0, 1),
        "first update: share of tokens outside": (0, 0.01),
        "masked share": (0, 0.5),
        "grad norm, largest": (math.ulp(0), 1e3),
    }
    lines, failed = ["| what | binary | top-K | bound | |", "| --- | --- | --- | --- | --- |"], False
    for what in binary:
        low, high = bounds.get(what, (None, None))
        ok = low is None or all(low <= run[what] <= high for run in (binary, top_k))  # false for nan
        failed |= not ok
        bound = "" if low is None else f"= {low}" if low == high else f"<= {high:g}"
        judged = "" if low is None else "ok" if ok else "FAIL"
        lines.append(f"| {what} | {binary[what]:.4g} | {top_k[what]:.4g} | {bound} | {judged} |")
    for what in ("s a step", "s of it generation"):
        lines.append(f"| {what}, top-K over binary | | {top_k[what] / binary[what]:.3f} | | |")
    return "\n".join(lines), failed


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("outputs/gpu"), help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    own, output = [word for word in args.command if word != "--"], args.output.resolve()
    if output.exists() and any(output.iterdir()):
        print(f"{output} is not empty: give another --output", file=sys.stderr)
        return 2
    if not own:
        if not torch.cuda.is_available():
            print("torch finds no CUDA device; --help says what to train on the CPU", file=sys.stderr)
            return 2
        prepare = [sys.executable, "-m", "cppo_verl", "prepare", "gsm8k", "--output", str(DATA)]
        subprocess.run(prepare, check=True, stdout=sys.stderr)
    folders = {divergence: output / divergence for divergence in DIVERGENCES}
    for divergence, folder in folders.items():
        if code := train(folder, command(folder, divergence, args.steps, own)):
            return code
    text, failed = table(*(found(folder) for folder in folders.values()), args.steps)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{card}, torch {torch.__version__}, {args.steps} steps\n\n{text}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
