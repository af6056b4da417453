"""First policies: supervised training on noisy demonstrations, until the policy is right about a third of the time."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from cppo_verl.artifacts.atomic import replacing
from studies.trust_regions import policy, task
from studies.trust_regions.policy import Parameters

SHAPE = policy.Shape(vocabulary=len(task.VOCABULARY))
TARGET = 0.25
"""Sampled accuracy at which a seed's warm-up ends; it is looked at every 25 steps, so most end above it."""
LEARNING_RATE = 3e-3
MAX_STEPS = 2000
"""Of a stage."""
LOOK_EVERY = 25


class Stage(NamedTuple):
    """Long answers are not learnt from scratch: the rule is learnt on short ones, then on longer ones."""

    length: int
    batch: int
    noise: float


STAGES = (Stage(16, 32, 0.02), Stage(64, 8, 0.005), Stage(192, 4, 0.002))


def first_policies(horizon: int, seeds: Sequence[int], folder: Path) -> Parameters:
    """Return the seeds' first policies for responses of ``horizon`` tokens, [S, ...].

    Those that ``folder`` lacks are made and kept there.

    Raises:
        RuntimeError: a seed has not reached `TARGET` after `MAX_STEPS`.
    """
    files = {seed: folder / f"first-{horizon}-{seed}.pt" for seed in seeds}
    if missing := [seed for seed in seeds if not files[seed].exists()]:
        folder.mkdir(parents=True, exist_ok=True)
        for seed, parameters in _warm_up(horizon, missing).items():
            with replacing(files[seed]) as (file,):
                torch.save(parameters, file)
    loaded = [torch.load(files[seed]) for seed in seeds]
    return {name: torch.stack([one[name] for one in loaded]) for name in loaded[0]}


def _warm_up(horizon: int, seeds: Sequence[int]) -> dict[int, Parameters]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    parameters = {name: p.requires_grad_() for name, p in policy.initialise(SHAPE, seeds).items()}
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01, foreach=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 100))
    reached: dict[int, Parameters] = {}
    for stage in STAGES:
        if stage.length > horizon:
            break
        reached = {}
        for step in range(MAX_STEPS):
            shown = torch.stack([task.demonstrations(stage.batch, stage.length, stage.noise, g) for g in generators])
            log_p = policy.log_probs(parameters, shown[..., : task.ORDER], shown[..., task.ORDER :])
            optimizer.zero_grad()
            (-log_p.mean((1, 2))).sum().backward()
            _clip(parameters)
            optimizer.step()
            schedule.step()
            if step % LOOK_EVERY == LOOK_EVERY - 1:
                for s, accuracy in enumerate(_accuracy(parameters, stage.length, generators)):
                    if accuracy >= TARGET and seeds[s] not in reached:
                        reached[seeds[s]] = {name: p[s].detach().clone() for name, p in parameters.items()}
            if len(reached) == len(seeds):
                break
        else:
            late = sorted(set(seeds) - reached.keys())
            raise RuntimeError(f"seeds {late} are below {TARGET} at {stage.length} tokens after {MAX_STEPS} steps")
    return reached


def _clip(parameters: Parameters, largest: float = 1.0) -> None:
    """Scale each seed's gradient to a norm of at most ``largest``."""
    gradients = [p.grad for p in parameters.values() if p.grad is not None]
    norm = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
    scale = (largest / (norm + 1e-6)).clamp_max(1)
    for gradient in gradients:
        gradient.mul_(scale.view(-1, *[1] * (gradient.dim() - 1)))


def _accuracy(parameters: Parameters, length: int, generators: Sequence[torch.Generator], samples: int = 128) -> list:
    prompts = torch.stack([task.prompts(samples, g) for g in generators])
    uniforms = torch.stack([torch.rand(samples, length, generator=g) for g in generators])
    responses, _ = policy.generate(parameters, prompts, uniforms)
    return task.rewards(prompts, responses).mean(1).tolist()
