"""Accept the loss's maths on a GPU: it needs torch and this checkout, and neither verl nor vLLM.

    python tests/gpu/core.py [--device cuda] [--lengths 1024 4096 16384 65536] [--positions 2048] [--vocabulary 151936]

Compares `cppo_verl.core` on the device, on bf16 and fp32 inputs, with fp64 on the CPU; counts kernels and how often the
host waits; measures time and memory beside DPPO's formula. Prints one Markdown table and exits with 1 if a row of it is
out of its bound. With --device cpu every line runs that does not ask CUDA itself. Not yet run on a GPU.
"""

import argparse
import os
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[2]))  # a checkout that nothing is installed from

from cppo_verl.core import metrics, surrogate, trust_region
from cppo_verl.core.divergence import (
    as_float32,
    binary_divergence,
    candidate_divergence,
    gather_logits,
    log_probs_beside,
    top_k_divergence,
)

DELTA, DELTA_B, W_MIN, CAP, TOP_K = 0.15, 0.02, 0.8, 20.0, 20
DTYPES = (torch.bfloat16, torch.float32)
SHAPES = ((8, 1024), (16, 8192), (64, 8192), (16, 32768), (4, 65536))
"""Responses and their padded length, of the times."""
EPSILON = {torch.bfloat16: 2**-8 + 1e-5, torch.float32: 1e-5}
"""Relative error that a gradient may have, which is in the dtype of log pi."""


class Table:
    """Rows of what was found, in Markdown; ``failed`` says whether one is out of its bound."""

    def __init__(self):
        self.rows = [("what", "of", "found", "bound", ""), ("---",) * 5]
        self.failed = False

    def measured(self, what, of, found):
        self.rows.append((what, of, found, "", ""))

    def bounded(self, what, of, found, bound):
        ok = found <= bound  # false for nan
        self.failed |= not ok
        self.rows.append((what, of, f"{found:.3g}", f"{bound:.3g}", "ok" if ok else "FAIL"))

    def __str__(self):
        return "\n".join(f"| {' | '.join(row)} |" for row in self.rows)


def name(dtype):
    return str(dtype).removeprefix("torch.")


# --- the loss ---------------------------------------------------------------------------------------------------


def batch(rows, length, dtype, device):
    """Responses of random length, pi from near mu to far off: log pi, log mu, A_t, the mask."""
    g = torch.Generator().manual_seed(0)
    lengths = torch.randint(length // 2, length + 1, (rows, 1), generator=g)
    log_mu = -torch.rand(rows, length, generator=g).mul_(3).square_().mul_(0.5)
    scale = torch.linspace(0.05, 0.5, rows).unsqueeze(-1)
    log_pi = (log_mu + scale * torch.randn(rows, length, generator=g)).clamp_max_(0)
    advantages = torch.randn(rows, 1, generator=g).expand(rows, length)
    mask = torch.arange(length) < lengths
    log_pi, log_mu, advantages = (x.to(device, dtype) for x in (log_pi, log_mu, advantages))
    return log_pi.requires_grad_(), log_mu, advantages, mask.to(device)


def decide(log_pi, log_mu, advantages, mask, dtype=torch.float32):
    """D_t, the trust region, M_t, the weight of grad log pi_t and what the metrics are made of.

    They are composed as `cppo_verl.plugin.losses` composes them, which needs verl.
    """
    with torch.no_grad():
        valid = mask.to(dtype)
        log_pi, log_mu, advantages = (
            as_float32(x).nan_to_num(0, 0, 0).mul_(valid) for x in (log_pi, log_mu, advantages)
        )
        log_ratio = log_pi - log_mu
        divergence = binary_divergence(log_pi, log_mu)
        counted = trust_region.count(valid)
        p90 = trust_region.quantile_of_largest(divergence, counted[1], 0.9)
        weights = trust_region.position_weights(valid, W_MIN, dtype, counted=counted)
        delta_b = trust_region.adaptive_budget(divergence, mask, DELTA_B, p90=p90)
        region = trust_region.build_trust_region(divergence, None, delta=DELTA, delta_b=delta_b, weights=weights)
        keep = trust_region.update_mask(region, log_ratio, advantages, delta=DELTA)
        weight = surrogate.surrogate_weight(log_ratio, advantages, keep, CAP)
        reported = [
            metrics.token_sums(region, keep, divergence, log_ratio, advantages, valid, DELTA),
            metrics.position_sums(divergence, valid, counted).flatten(),
            metrics.response_columns(region, advantages, counted[1], p90).flatten(),
        ]
    return divergence, region, keep, weight, torch.cat(reported)


def cppo(log_pi, log_mu, advantages, mask):
    """CPPO's loss as a mean over tokens, and the sums of the metrics on the host: the one wait for the device."""
    *_, weight, reported = decide(log_pi, log_mu, advantages, mask)
    valid = mask.to(torch.float32)
    loss = -surrogate.WeightedLogProb.apply(log_pi, weight).sum() / valid.sum()
    host = reported.cpu().numpy()
    tokens = len(metrics.GROUPS) * len(metrics.TOKEN_SUMS) + len(metrics.POSITION_SUMS) * metrics.POSITION_BINS
    of_responses = metrics.response_sums(host[tokens:].reshape(len(mask), -1).astype(float))
    return loss, [*host[:tokens].tolist(), *of_responses.ravel().tolist()]


def dppo_tv(log_pi, log_mu, advantages, mask):
    """DPPO's loss with the binary TV (arXiv 2602.04879), written from its formula, and its three means.

    -A sg(min(rho, cap)) log pi on the tokens with pi - mu <= delta for A > 0, and pi - mu >= -delta otherwise.
    """
    valid = mask.to(torch.float32)
    log_ratio = (log_pi - log_mu).clamp(-20.0, 20.0)
    ratio = log_ratio.exp()
    difference = log_pi.exp() - log_mu.exp()
    keep = torch.where(advantages > 0, difference <= DELTA, difference >= -DELTA).detach().float()
    losses = -advantages * ratio.clamp(max=CAP).detach() * log_pi * keep

    def mean(x):
        return (x * valid).sum() / valid.sum()

    shares = (mean(x.detach()).item() for x in (1 - keep, -log_ratio, (ratio > CAP).float() * keep))
    return mean(losses), list(shares)


def step(loss, inputs):
    """Forward and backward."""
    inputs[0].grad = None
    value, reported = loss(*inputs)
    value.backward()
    return value.detach(), reported


def compare_rule(table, rows, length, dtype, device):
    """One row each for D_t, c_t, M_t and the gradient, beside fp64 on the CPU from the same inputs."""
    inputs = batch(rows, length, dtype, device)
    exact = [x.detach().cpu() for x in inputs]
    exact = [*(x.double() for x in exact[:3]), exact[3]]
    divergence, region, keep, weight, _ = decide(*inputs)
    wanted_divergence, wanted, wanted_keep, wanted_weight, _ = decide(*exact, dtype=torch.float64)
    mask, of = exact[3], f"{rows} x {length} {name(dtype)}"

    spent = wanted.weighted_divergence.cumsum(-1).clamp_min(1)  # rounding grows with the sums
    apart = (region.threshold.cpu() - wanted.threshold).abs() / spent
    near = (wanted.weighted_divergence - wanted.threshold).abs() <= 1e-5 * spent
    near |= (exact[0] - exact[1]).abs() < 1e-6  # on the side of rho_t = 1 that fp32 cannot tell
    differs = (keep.cpu() != wanted_keep) & mask & ~near
    masked = int((wanted_keep == 0)[mask].sum())
    table.bounded("D_t, largest error", of, errors(divergence, wanted_divergence, mask), 1e-6)
    table.bounded("c_t, largest error over max(1, S_t)", of, apart[mask].max().item(), 1e-5)
    table.bounded("M_t that differ", f"{of}, {masked} of {int(mask.sum())} masked", differs.sum().item(), 0)

    step(cppo, inputs)
    gradient = inputs[0].grad.cpu().double() * mask.sum()
    relative = (gradient + wanted_weight).abs() / wanted_weight.abs().clamp_min(1e-3)
    table.bounded("gradient, largest relative error", of, relative[mask & ~near].max().item(), EPSILON[dtype])


def errors(found, wanted, mask):
    return (found.detach().cpu().double() - wanted)[mask].abs().max().item()


# --- the logits ---------------------------------------------------------------------------------------------------


def logits_batch(positions, vocabulary, dtype, device):
    """Logits of pi on the device, logits of mu on the CPU, and the sampled tokens."""
    g = torch.Generator().manual_seed(0)
    logits = torch.empty(positions, vocabulary, dtype=dtype)
    logits.copy_(torch.randn(positions, vocabulary, generator=g).mul_(4))
    other = logits + torch.randn(positions, vocabulary, generator=g).mul_(0.1).to(dtype)
    sampled = torch.randint(vocabulary, (positions,), generator=g)
    return logits.to(device), other, sampled.to(device)


def candidates(log_mu, sampled):
    """mu's K most likely tokens and the sampled one, log mu of them, and whether the sampled one is among the K."""
    top = log_mu.topk(TOP_K, dim=-1).indices
    ids = torch.cat([top, sampled.unsqueeze(-1)], -1)
    return ids, log_mu.gather(-1, ids), (top == sampled.unsqueeze(-1)).any(-1)


def log_probs(logits, ids, log_pi):
    """log pi of the candidates, from the sampled token's."""
    rows = torch.arange(len(logits), device=logits.device)
    return log_probs_beside(gather_logits(logits, ids, rows), log_pi)


def look(logits, ids, log_pi, log_mu, is_top):
    """What the top-K divergence adds to the actor's forward pass, which has log pi of the sampled token."""
    return candidate_divergence(log_probs(logits, ids, log_pi), log_mu, is_top)


def compare_top_k(table, positions, vocabulary, dtype, device):
    logits, other, sampled = logits_batch(positions, vocabulary, dtype, device)
    of, block = f"{positions} x {vocabulary} {name(dtype)}", 64
    parts, wanted = [], []
    for rows in torch.arange(positions).split(block):
        mu = other[rows].double().log_softmax(-1)
        pi, y = logits[rows.to(device)].cpu().double().log_softmax(-1), sampled[rows.to(device)].cpu()
        ids, log_mu, is_top = candidates(mu, y)
        parts.append((ids, log_mu.float(), is_top))
        wanted.append((pi.gather(-1, ids), *(top_k_divergence(pi, mu, y, TOP_K, kind) for kind in ("tv", "kl"))))
    ids, log_mu, is_top = (torch.cat(x).to(device) for x in zip(*parts, strict=True))
    # In fp32 on the device, as a loss over the vocabulary computes it.
    blocks = zip(logits.split(block), ids.split(block), strict=True)
    sampled_log_pi = torch.cat([z.gather(-1, i[:, -1:]) - z.float().logsumexp(-1, True) for z, i in blocks]).squeeze(-1)
    log_pi, tv, kl = map(torch.cat, zip(*wanted, strict=True))
    found, every = log_probs(logits, ids, sampled_log_pi), torch.ones(positions, dtype=torch.bool)
    table.bounded("log pi of the candidates, largest error", of, errors(found, log_pi, every), 5e-6)
    for kind, exact in (("tv", tv), ("kl", kl)):
        divergence = candidate_divergence(found, log_mu, is_top, kind)
        table.bounded(f"top-{TOP_K} {kind.upper()}, largest error", of, errors(divergence, exact, every), 5e-6)
    return logits, (ids, sampled_log_pi, log_mu, is_top)


# --- what is counted and measured -----------------------------------------------------------------------------------


class OperationCount(TorchDispatchMode):
    """Counts the tensor operations inside, those of the backward pass too."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.number += 1
        return function(*args, **(kwargs or {}))


def operations(function):
    function()
    with OperationCount() as count:
        function()
    return count.number


def waits(function):
    """How often the host waits for CUDA during a call."""
    function()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            function()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def kernels(function):
    """Number of kernels, copies and fills that a call starts on CUDA."""
    function()
    activities = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activities.CPU, activities.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def seconds(function, device, repeats):
    """Median time of a call."""
    times = []
    for _ in range(repeats + 2):
        synchronise(device)
        begin = time.perf_counter()
        function()
        synchronise(device)
        times.append(time.perf_counter() - begin)
    return median(times[2:])


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def extra_bytes(function, device):
    """Most memory that torch's allocator holds during a call beyond what it held before."""
    function()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    held, most = 0, 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return most


def count(table, what, of, function, device, most_waits):
    table.measured(f"{what}: tensor operations", of, str(operations(function)))
    if device.type == "cuda":
        table.measured(f"{what}: kernels and copies", of, str(kernels(function)))
        table.bounded(f"{what}: waits of the host", of, waits(function), most_waits)


def measure_top_k(table, of, logits, inputs, device, repeats):
    def call():
        return look(logits, *inputs)

    count(table, "top-K", of, call, device, most_waits=0)
    took, read = seconds(call, device, repeats), seconds(logits.sum, device, repeats)
    table.measured("top-K: ms, ms of one read of the logits", of, f"{took * 1e3:.2f}, {read * 1e3:.2f}")
    table.bounded("top-K: MB beyond the logits", of, extra_bytes(call, device) / 1e6, 16)


def measure_losses(table, shapes, device, repeats):
    for rows, length in shapes:
        of, inputs = f"{rows} x {length} float32", batch(rows, length, torch.float32, device)
        took, held = {}, {}
        for loss in (dppo_tv, cppo):
            took[loss] = seconds(partial(step, loss, inputs), device, repeats)
            held[loss] = extra_bytes(partial(step, loss, inputs), device)
        table.measured("ms of cppo, of dppo_tv, ratio", of, compared(took, 1e3))
        table.measured("MB beyond the inputs of cppo, of dppo_tv, ratio", of, compared(held, 1e-6))


def compared(values, unit):
    return f"{values[cppo] * unit:.2f}, {values[dppo_tv] * unit:.2f}, {values[cppo] / values[dppo_tv]:.2f}"


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 65536], help="tokens a response")
    parser.add_argument("--positions", type=int, default=2048, help="rows of the logits")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--repeats", type=int, default=21)
    args = parser.parse_args(argv)
    device = args.device
    if device.type == "cuda" and not torch.cuda.is_available():
        print(f"torch {torch.__version__} finds no CUDA device: --device cpu tries the script itself", file=sys.stderr)
        return 2

    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # of torch's profiler
    begin, table = time.perf_counter(), Table()
    for dtype in DTYPES:
        for length in args.lengths:
            compare_rule(table, 4, length, dtype, device)
    for length in (args.lengths[0], args.lengths[-1]):
        inputs = batch(4, length, torch.float32, device)
        count(table, "loss", f"4 x {length} float32", partial(step, cppo, inputs), device, most_waits=1)
    for dtype in DTYPES:
        logits, rest = compare_top_k(table, args.positions, args.vocabulary, dtype, device)
        of = f"{args.positions} x {args.vocabulary} {name(dtype)}"
        measure_top_k(table, of, logits, rest, device, args.repeats)
    shapes = [(rows, length) for rows, length in SHAPES if length <= args.lengths[-1]]
    measure_losses(table, shapes, device, args.repeats)

    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(
        f"{card}, torch {torch.__version__}, CUDA {torch.version.cuda}, {time.perf_counter() - begin:.0f} s\n\n{table}"
    )
    return int(table.failed)


if __name__ == "__main__":
    sys.exit(main())
