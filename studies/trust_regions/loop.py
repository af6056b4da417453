"""Trains the policies of several seeds side by side in plain torch, with the very losses that verl's actors call."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import ActorConfig

from cppo_verl.plugin.losses import Observed, loss_context
from studies.trust_regions import policy, task
from studies.trust_regions.policy import Parameters

POSITION_BINS = 8
"""Parts of equal length into which a response is cut for the masked share by position."""
ROUNDING = 1e-4
"""A weight that is short of rho_t A_t by less than this part is not masked: it was divided and multiplied again."""


@dataclass(frozen=True)
class Settings:
    """What a run depends on beside its seed, its first policy and its method; the defaults are those of all runs."""

    horizon: int
    """Tokens of each response."""
    updates: int
    """Updates a rollout batch."""
    learning_rate: float
    steps: int = 50
    prompts: int = 32
    samples: int = 4
    """Responses to each prompt."""
    clip_grad: float = 1.0
    rollout_dtype: torch.dtype = torch.float32
    """Precision of the rollout policy; training is in fp32."""
    staleness: int = 0
    """The rollout policy is that of so many rollout batches ago."""


class Batch(NamedTuple):
    """Responses of S seeds, B each, ordered by prompt."""

    prompts: Tensor
    """[S, B, 4]."""
    responses: Tensor
    """[S, B, T]."""
    log_mu: Tensor
    """[S, B, T]."""
    rewards: Tensor
    """[S, B]."""
    advantages: Tensor
    """GRPO's, [S, B]."""
    has_signal: Tensor
    """Whether the rewards of the response's prompt differ, [S, B]; where they do not, the update leaves it out."""

    def mini_batches(self, updates: int) -> list["Batch"]:
        return [Batch(*parts) for parts in zip(*(x.chunk(updates, 1) for x in self), strict=True)]


Measured = dict[str, Tensor]
"""What was measured, {name: [S, ...]}: sums over the tokens of an update, or of all updates of a step."""
Observer = Callable[[int, int, Batch, Tensor], None]
"""Is told the step, the update, its mini-batch and log pi [S, B, T]."""


def roll_out(parameters: Parameters, settings: Settings, generators: Sequence[torch.Generator]) -> Batch:
    """Let each seed's policy answer prompts that its generator draws."""
    count = settings.prompts * settings.samples
    prompts = torch.stack([task.prompts(settings.prompts, g) for g in generators])
    prompts = prompts.repeat_interleave(settings.samples, 1)
    uniforms = torch.stack([torch.rand(count, settings.horizon, generator=g) for g in generators])
    rollout = {name: p.detach().to(settings.rollout_dtype) for name, p in parameters.items()}
    responses, log_mu = policy.generate(rollout, prompts, uniforms)
    rewards = task.rewards(prompts, responses)
    groups = rewards.unflatten(1, (settings.prompts, settings.samples))
    deviation = groups.std(-1, keepdim=True)
    advantages = (groups - groups.mean(-1, keepdim=True)) / (deviation + 1e-6)
    has_signal = (deviation > 0).expand_as(groups)
    return Batch(prompts, responses, log_mu, rewards, advantages.flatten(1), has_signal.flatten(1))


def loss_slope(actor: ActorConfig, batch: Batch, log_pi: Tensor) -> tuple[Tensor, list[Observed]]:
    """Differentiate the sum over tokens of the actor's policy loss by log pi.

    Args:
        actor: verl's config with the method.
        batch: of S seeds, which are one batch to the loss: its rules look at one response at a time.
        log_pi: [S, B, T], without gradient.

    Returns:
        [S, B, T], zero where a prompt has no signal, and what the plug-in's losses observed, [S x B, T].
    """
    valid = batch.has_signal.unsqueeze(-1).expand_as(log_pi)
    if not valid.any():
        return torch.zeros_like(log_pi), []
    leaf = log_pi.flatten(0, 1).requires_grad_()
    observed: list[Observed] = []
    with loss_context(observed=observed):
        loss, _ = get_policy_loss_fn(actor.policy_loss.loss_mode)(
            old_log_prob=batch.log_mu.flatten(0, 1),
            log_prob=leaf,
            advantages=batch.advantages.unsqueeze(-1).expand_as(log_pi).flatten(0, 1),
            response_mask=valid.flatten(0, 1),
            loss_agg_mode="token-mean",
            config=actor,
        )
    (slope,) = torch.autograd.grad(loss * valid.sum(), leaf)
    return slope.view_as(log_pi), observed


def update(
    parameters: Parameters, optimizer: torch.optim.Optimizer, batch: Batch, actor: ActorConfig, clip_grad: float
) -> tuple[Tensor, Measured]:
    """Make one update of every seed's policy; return log pi [S, B, T] before it, and what was measured."""
    log_pi = policy.log_probs(parameters, batch.prompts, batch.responses)
    slope, observed = loss_slope(actor, batch, log_pi.detach())
    valid = batch.has_signal.unsqueeze(-1).expand_as(log_pi)
    tokens = valid.sum((1, 2))
    optimizer.zero_grad()
    log_pi.backward(slope / tokens.clamp_min(1).view(-1, 1, 1))
    log_pi = log_pi.detach()

    gradients = [p.grad for p in parameters.values() if p.grad is not None]
    norm = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
    scale = torch.where(norm.isfinite(), (clip_grad / (norm + 1e-6)).clamp_max(1), 0.0)
    for gradient in gradients:
        # nan times zero is nan.
        gradient.nan_to_num_(0, 0, 0).mul_(scale.view(-1, *[1] * (gradient.dim() - 1)))
    optimizer.step()

    unmasked = -(log_pi - batch.log_mu).exp() * batch.advantages.unsqueeze(-1)
    masked = valid & ((slope - unmasked).abs() > ROUNDING * unmasked.abs())
    deviation = torch.where(valid, (log_pi.exp() - batch.log_mu.exp()).abs(), 0.0)
    by_budget = torch.zeros_like(masked)
    for _, _, decision in observed:
        if decision.region.delta_b is not None:
            by_budget = masked & (decision.region.weighted_divergence <= decision.delta).view_as(masked)
    measured = {
        "tokens": tokens,
        "masked": masked.sum((1, 2)),
        "by_budget": by_budget.sum((1, 2)),
        "deviation": deviation.sum((1, 2)),
        "not_finite": (~norm.isfinite()).long(),
        "masked_at": torch.stack([part.sum((1, 2)) for part in masked.tensor_split(POSITION_BINS, -1)], -1),
    }
    return log_pi, measured


def train(
    first: Parameters,
    seeds: Sequence[int],
    settings: Settings,
    actor: ActorConfig,
    observe: Observer | None = None,
) -> list[Measured]:
    """Train the policies of all seeds from ``first``, [S, ...]; return what was measured in each step.

    A seed's run does not depend on the seeds beside it, but for shuffled weights, which all draw from one generator.
    """
    parameters = {name: p.clone().requires_grad_() for name, p in first.items()}
    # As verl's actors are configured: AdamW without weight decay, constant learning rate.
    optimizer = torch.optim.AdamW(parameters.values(), lr=settings.learning_rate, weight_decay=0.0, foreach=True)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    torch.manual_seed(seeds[0])
    policies = [parameters]
    steps = []
    for step in range(settings.steps):
        if settings.staleness:
            policies.append({name: p.detach().clone() for name, p in parameters.items()})
            policies = policies[-settings.staleness - 1 :] if step else policies[-1:]
        batch = roll_out(policies[0], settings, generators)
        totals: Measured = {}
        for number, mini_batch in enumerate(batch.mini_batches(settings.updates)):
            log_pi, measured = update(parameters, optimizer, mini_batch, actor, settings.clip_grad)
            totals = {name: totals.get(name, 0) + value for name, value in measured.items()}
            if observe:
                observe(step, number, mini_batch, log_pi)
        steps.append({"accuracy": batch.rewards.mean(1), **totals})
    return steps
