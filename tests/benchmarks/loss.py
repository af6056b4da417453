"""The CPPO loss beside verl's dppo_tv on the same tensors, in one process each run and in turn.

    python tests/benchmarks/loss.py [--repeats 41] [--threads 1]

Prints, for micro-batches of 8 thousand to half a million tokens, the median time of forward and backward of both, their
ratio, and CPPO's time per token; then the number of tensor operations that each issues, and their peak extra memory,
measured in a process of its own.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from statistics import median

import torch
import verl  # noqa: F401  loads the plug-in
from torch.utils._python_dispatch import TorchDispatchMode
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import FSDPActorConfig

from cppo_verl.plugin.config import CPPOLossConfig

SHAPES = ((8, 1024), (16, 8192), (64, 8192), (16, 32768), (4, 65536))
"""Responses and their padded length."""
MEMORY_SHAPES = ((4096, 1024), (64, 65536))


def tensors(rows, length):
    """Responses of random length, pi near mu as within a step of training."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(length // 2, length + 1, (rows, 1), generator=g)
    log_mu = -torch.rand(rows, length, generator=g).mul_(3).square_().mul_(0.5)
    return {
        "old_log_prob": log_mu,
        "log_prob": (log_mu + 0.05 * torch.randn(rows, length, generator=g)).clamp_max_(0).requires_grad_(),
        "advantages": torch.randn(rows, 1, generator=g).expand(rows, length).contiguous(),
        "response_mask": torch.arange(length) < lengths,
    }


def step(loss_mode, data, config):
    data["log_prob"].grad = None
    loss, _ = get_policy_loss_fn(loss_mode)(**data, config=config, rollout_is_weights=None)
    loss.backward()


def configs(data):
    common = dict(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    cppo = FSDPActorConfig(**common, policy_loss=CPPOLossConfig())
    dppo = FSDPActorConfig(**common, clip_ratio_low=0.15, clip_ratio_high=0.15, clip_ratio_c=20.0)
    for config in (cppo, dppo):
        config.global_batch_info.update(dp_size=1, batch_num_tokens=int(data["response_mask"].sum()))
    return {"cppo": cppo, "dppo_tv": dppo}


def peak_memory(loss_mode, rows, length):
    """Bytes that ``loss_mode`` needs beyond its input."""
    data = tensors(rows, length)
    config = configs(data)[loss_mode]
    small = tensors(1, 64)
    step(loss_mode, small, configs(small)[loss_mode])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step(loss_mode, data, config)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


class OperationCount(TorchDispatchMode):
    """Counts the tensor operations inside, those of the backward pass too."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += 1
        return function(*args, **(kwargs or {}))


def operations(loss_mode):
    data = tensors(*SHAPES[0])
    config = configs(data)[loss_mode]
    step(loss_mode, data, config)
    with OperationCount() as count:
        step(loss_mode, data, config)
    return count.number


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=41)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.memory:
        print(peak_memory(args.memory[0], int(args.memory[1]), int(args.memory[2])))
        return

    print(f"torch {torch.__version__}, {args.threads} thread(s), median of {args.repeats}")
    print("rows  length   dppo_tv ms   cppo ms   ratio   cppo ns/token")
    for rows, length in SHAPES:
        data = tensors(rows, length)
        times = {name: [] for name in configs(data)}
        for repeat in range(args.repeats + 2):
            for name, config in configs(data).items():
                begin = time.perf_counter()
                step(name, data, config)
                if repeat >= 2:
                    times[name].append(time.perf_counter() - begin)
        cppo, dppo = median(times["cppo"]), median(times["dppo_tv"])
        ratio = median(a / b for a, b in zip(times["cppo"], times["dppo_tv"], strict=True))
        print(
            f"{rows:4d}{length:8d}{dppo * 1e3:13.1f}{cppo * 1e3:10.1f}{ratio:8.2f}{cppo / rows / length * 1e9:16.1f}",
            flush=True,
        )
    print(f"tensor operations: dppo_tv {operations('dppo_tv')}, cppo {operations('cppo')}")
    # glibc would raise this threshold as blocks are freed, and keep larger ones: the peak would change from run to run.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
    for rows, length in MEMORY_SHAPES:
        command = [sys.executable, __file__, "--memory"]
        shape = [str(rows), str(length)]
        peak = {m: int(subprocess.check_output([*command, m, *shape], text=True, env=environment)) for m in times}
        print(
            f"peak extra memory at [{rows} x {length}]: dppo_tv {peak['dppo_tv'] / 2**20:.0f} MiB, "
            f"cppo {peak['cppo'] / 2**20:.0f} MiB, ratio {peak['cppo'] / peak['dppo_tv']:.2f}"
        )


if __name__ == "__main__":
    main()
