"""The policy losses, as verl calls them: keyword arguments, padded tensors [B, L], (loss, metrics) back."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
from verl.workers.config import ActorConfig

from cppo_verl.core import metrics, neighbours, surrogate, trust_region
from cppo_verl.core.divergence import Kind, binary_divergence
from cppo_verl.plugin.config import (
    CPPOLossConfig,
    MethodConfig,
    NeighbourLossConfig,
    PrefixRatioLossConfig,
    TRMLossConfig,
)

METRIC_PREFIX = "actor/trust_region/"
TOKEN_SUM_NAMES = [f"{METRIC_PREFIX}{group}/{name}" for name in metrics.TOKEN_SUMS for group in metrics.GROUPS]
TOKEN_SUM_NAMES += [
    f"{METRIC_PREFIX}position_{b}/{name}" for name in metrics.POSITION_SUMS for b in range(metrics.POSITION_BINS)
]
ABSOLUTE_SUMS = [f"{METRIC_PREFIX}update/absolute_{name}" for name in ("log_ratio", "log_mu")]
TOKEN_SUM_NAMES += ABSOLUTE_SUMS
RESPONSE_SUM_NAMES = [f"{METRIC_PREFIX}{group}/{name}" for name in metrics.RESPONSE_SUMS for group in metrics.GROUPS]
SUM_NAMES = TOKEN_SUM_NAMES + RESPONSE_SUM_NAMES
UPDATE_TOKENS = f"{METRIC_PREFIX}update/tokens"
"""Number of tokens of the update that a micro-batch is a part of, over all ranks."""
LOG_PROB_TOLERANCE = 1e-3
"""Log-probabilities are sums of rounded terms; more than this above zero is no rounding."""


class Tokens(NamedTuple):
    """A micro-batch as the rules see it: fp32, [B, L], zero outside the mask, without gradient."""

    log_pi: Tensor
    log_mu: Tensor
    log_ratio: Tensor
    advantages: Tensor
    mask: Tensor
    """True on valid tokens."""
    valid: Tensor
    """The mask as 0 and 1; a conversion for each use would cost as much as the arithmetic."""
    counted: tuple[Tensor, Tensor]
    """t, and T [B, 1]."""
    divergence: Tensor | None
    """D_t where it was measured in the forward pass, as the top-K divergences are."""


class Decision(NamedTuple):
    """What a rule decides about the tokens of a micro-batch."""

    weight: Tensor
    """What grad log pi_t is multiplied by, [B, L]; zero outside the mask."""
    update_mask: Tensor
    """M_t in [0, 1], for the metrics."""
    region: trust_region.TrustRegion
    divergence: Tensor
    delta: float
    """Token threshold; in the metrics it separates the two constraints that can reject a token."""
    p90: Tensor
    """0.9-quantile of D_t per response, [B, 1]."""


Observed = tuple[MethodConfig, Tokens, Decision]


class LossContext(NamedTuple):
    """What a policy loss of verl gets and gives beside its signature, which carries log-probabilities alone."""

    divergence: Tensor | None = None
    """D_t [B, L], where it was measured in the forward pass."""
    observed: list[Observed] | None = None
    """Where given, each policy loss of the plug-in appends what it decided; verl's own losses append nothing."""


NO_CONTEXT = LossContext()
_context: ContextVar[LossContext] = ContextVar("cppo_verl_loss_context", default=NO_CONTEXT)


@contextmanager
def loss_context(**changes: Any) -> Iterator[None]:
    """Policy losses called inside see the context around it with these fields of `LossContext` replaced."""
    token = _context.set(_context.get()._replace(**changes))
    try:
        yield
    finally:
        _context.reset(token)


def cppo(method: CPPOLossConfig, config: ActorConfig, tokens: Tokens) -> Decision:
    """CPPO; DPPO and the paper's ablations are values of its config."""
    divergence, p90 = _divergence(method.partition, method.kind, tokens)
    if method.weights == "shuffled":
        weights = trust_region.shuffled_weights(tokens.mask, method.w_min)
    else:
        weights = trust_region.position_weights(
            tokens.valid, method.w_min, horizon=method.horizon, counted=tokens.counted
        )
    delta_b: Tensor | float | None = None
    if method.budget == "adaptive":
        delta_b = trust_region.adaptive_budget(divergence, tokens.mask, method.delta_b, method.budget_clamp, p90)
    elif method.budget == "fixed":
        delta_b = method.delta_b
    delta, gate, log_ratio, advantages = method.delta, method.gate, tokens.log_ratio, tokens.advantages
    region = trust_region.build_trust_region(divergence, None, delta=delta, delta_b=delta_b, weights=weights)
    keep = trust_region.update_mask(region, log_ratio, advantages, delta=delta, gate=gate, tau=method.tau)
    weight = surrogate.surrogate_weight(log_ratio, advantages, keep, method.ratio_cap)
    # The penalty's weights leave [0, 1]; the metrics count what it takes off a weight of 1, at most all of it.
    reported = keep.clamp(0, 1) if gate == "penalty" else keep
    return Decision(weight, reported, region, divergence, delta, p90)


def trm(method: TRMLossConfig, config: ActorConfig, tokens: Tokens) -> Decision:
    """TRM-Max, TRM-Avg and both."""
    divergence, p90 = _divergence(method.partition, method.kind, tokens)
    keep = trust_region.response_mask_by_divergence(
        divergence, tokens.mask, delta=method.delta, delta_avg=method.delta_avg
    )
    delta = torch.inf if method.delta is None else method.delta
    region = trust_region.build_trust_region(divergence, None, delta=delta, delta_b=None, weights=tokens.valid)
    weight = surrogate.surrogate_weight(tokens.log_ratio, tokens.advantages, keep, method.ratio_cap)
    return Decision(weight, keep, region, divergence, delta, p90)


def prefix_ratio(method: PrefixRatioLossConfig, config: ActorConfig, tokens: Tokens) -> Decision:
    """MinPRO and PNPO; a token counts as masked where its ratio is clipped."""
    ratio_of = surrogate.minimum_prefix_ratio if method.ratio == "minimum" else surrogate.mean_prefix_ratio
    ratio = ratio_of(tokens.log_ratio, tokens.mask)
    low, high = config.clip_ratio_low, config.clip_ratio_high
    inside = ((ratio >= 1 - low) & (ratio <= 1 + high)).to(ratio.dtype)
    divergence, p90 = _divergence("binary", "tv", tokens)
    region = trust_region.build_trust_region(divergence, None, delta=torch.inf, delta_b=None, weights=tokens.valid)

    weight = surrogate.clipped_weight(ratio, tokens.advantages, low, high)
    return Decision(weight, inside, region, divergence, torch.inf, p90)


def neighbour(method: NeighbourLossConfig, config: ActorConfig, tokens: Tokens) -> Decision:
    """KPop and VACO; D_t in the metrics is the binary TV."""
    if method.rule == "kpop":
        keep = neighbours.kpop_mask(tokens.log_pi, tokens.log_mu, method.delta)
    else:
        keep = neighbours.vaco_mask(tokens.log_ratio, tokens.advantages, tokens.mask, method.delta)
    divergence, p90 = _divergence("binary", "tv", tokens)
    region = trust_region.build_trust_region(divergence, None, delta=torch.inf, delta_b=None, weights=tokens.valid)
    weight = surrogate.surrogate_weight(tokens.log_ratio, tokens.advantages, keep, method.ratio_cap)
    return Decision(weight, keep, region, divergence, torch.inf, p90)


def _divergence(partition: str, kind: Kind, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """D_t [B, L] and its 0.9-quantile per response [B, 1]."""
    if partition == "binary":
        divergence = binary_divergence(tokens.log_pi, tokens.log_mu, kind)
    elif tokens.divergence is not None:
        divergence = tokens.divergence
    else:
        raise RuntimeError(
            f"divergence={partition}_{kind} is measured in the forward pass, for which the plug-in's trainers arrange: "
            "set trainer.v1.trainer_mode=cppo_sync, or divergence=binary_tv"
        )
    return divergence, trust_region.quantile_of_largest(divergence, tokens.counted[1], 0.9)


def policy_loss(
    rule: Callable[[Any, ActorConfig, Tokens], Decision],
    config_type: type[MethodConfig],
    *,
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    config: ActorConfig,
    loss_agg_mode: str = "token-mean",
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """A rule's decisions as a policy loss of verl, averaged as verl's ``agg_loss`` does.

    Args:
        rule: one of this module's rules: method config, actor config and tokens to a decision.
        config_type: the class of the actor's ``policy_loss`` that the rule reads.
        old_log_prob, log_prob: log mu(y_t | s_t), the rollout engine's own, and log pi(y_t | s_t) with the gradient.
        advantages, response_mask: A_t, and true on valid tokens; values elsewhere are ignored.
        rollout_is_weights: must be None, the ratio to mu is already in the surrogate.

    Returns:
        The scalar loss, and sums under `METRIC_PREFIX` that the plug-in's trainer turns into shares.

    Raises:
        ValueError: on valid tokens, values that are not finite, log-probabilities above zero or a D_t below it;
            tensors of unequal shapes; importance weights.
        TypeError: a config that is not the method's own.
    """
    method = config.policy_loss
    if not isinstance(method, config_type):
        raise TypeError(
            f"loss_mode={config_type.loss_mode} needs its own config, but policy_loss is {type(method).__name__}: "
            "choose a method, e.g. +method=cppo, instead of setting actor_rollout_ref.actor.policy_loss.loss_mode"
        )
    if rollout_is_weights is not None:
        raise ValueError(
            "rollout_is_weights would apply the importance ratio to mu twice: "
            "set algorithm.rollout_correction.rollout_is=null"
        )
    shapes = {tuple(x.shape) for x in (old_log_prob, log_prob, advantages, response_mask)}
    if len(shapes) != 1 or log_prob.dim() != 2:
        raise ValueError(
            f"expected four tensors of one shape [B, L], got old_log_prob {tuple(old_log_prob.shape)}, log_prob "
            f"{tuple(log_prob.shape)}, advantages {tuple(advantages.shape)}, response_mask {tuple(response_mask.shape)}"
        )

    mask = response_mask.bool()
    largest = torch.finfo(torch.float32).max
    # verl's FSDP engine calls the loss under its model's autocast, which would round the products of the sums to bf16.
    with torch.no_grad(), without_autocast(log_prob.device.type):
        inputs = {"log_prob": log_prob, "old_log_prob": old_log_prob, "advantages": advantages}
        # A byte is converted several times as fast as a boolean on a CPU.
        valid = mask.view(torch.uint8).to(torch.float32)
        # Zero outside the mask. On valid tokens the largest number stands for what is not finite; the maximum shows it.
        cleaned = torch.stack([x.float() for x in inputs.values()]).nan_to_num_(largest, largest, largest).mul_(valid)
        log_pi, log_mu, advantages = cleaned.unbind()
        context = _context.get()
        measured = None if context.divergence is None else torch.where(mask, context.divergence, 0)
        counted = trust_region.count(valid)
        tokens = Tokens(log_pi, log_mu, log_pi - log_mu, advantages, mask, valid, counted, measured)
        decision = rule(method, config, tokens)
        if context.observed is not None:
            context.observed.append((method, tokens, decision))
        weight, update_mask, region, divergence, delta, p90 = decision
        columns = metrics.response_columns(region, advantages, counted[1], p90)
        reported = [
            metrics.token_sums(region, update_mask, divergence, tokens.log_ratio, advantages, valid, delta),
            metrics.position_sums(divergence, valid, counted).flatten(),
            torch.stack([tokens.log_ratio, log_mu]).abs_().sum((1, 2)),
            cleaned.amax((1, 2)),
            *(() if measured is None else [measured.amin().float().view(1)]),
            columns.flatten(),
        ]
        # One transfer to the host for everything.
        host = torch.cat(reported).cpu().numpy().astype(float)
    begin, end = len(TOKEN_SUM_NAMES), -columns.numel()
    sums = dict(zip(TOKEN_SUM_NAMES, host[:begin].tolist(), strict=True))
    pi_max, mu_max, a_max, *lowest = host[begin:end].tolist()

    # An infinite D_t shows in its sum.
    d_sum, num_tokens = (sums[f"{METRIC_PREFIX}all/{name}"] for name in ("divergence", "tokens"))
    sound = max(pi_max, mu_max) <= LOG_PROB_TOLERANCE and a_max < largest and math.isfinite(d_sum)
    if not sound or min(lowest, default=0) < 0:
        if measured is not None:
            inputs["divergence"] = measured
        for name, x in inputs.items():
            check_values(name, x, mask)
    of_responses = metrics.response_sums(host[end:].reshape(columns.shape))
    sums |= zip(RESPONSE_SUM_NAMES, of_responses.ravel().tolist(), strict=True)

    weighted = surrogate.WeightedLogProb.apply(log_prob, weight)
    batch = config.global_batch_info
    divisor = constant_divisor(loss_agg_mode, batch, mask.shape[1])
    if divisor:
        loss = weighted.sum() * (-batch.get("dp_size", 1) / divisor)
    elif num_tokens:
        loss = agg_loss(loss_mat=-weighted, loss_mask=valid, loss_agg_mode=loss_agg_mode, **batch)
    else:
        # A mini-batch without a valid token divides by zero in agg_loss; its loss and gradient are zero.
        loss = weighted.sum()
    return loss, sums | {UPDATE_TOKENS: batch.get("batch_num_tokens") or num_tokens}


def without_autocast(device: str) -> AbstractContextManager:
    """No autocast on this type of device inside. Where none is on, turning it off would only take time."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def constant_divisor(loss_agg_mode: str, batch: Mapping[str, Any], length: int) -> float | None:
    """What verl's ``agg_loss`` divides the loss of each token by, in the modes in which it is one number.

    With it the loss is a sum and a product, where ``agg_loss`` takes fifteen operations more.

    Args:
        loss_agg_mode: a mode of ``agg_loss``.
        batch: the actor's ``global_batch_info``.
        length: padded length of the responses.

    Returns:
        The number, without dp_size; None where it depends on the response, or ``batch`` lacks a number that it needs.
    """
    sequences = batch.get("global_batch_size")
    if loss_agg_mode == "token-mean":
        return batch.get("batch_num_tokens")
    if loss_agg_mode == "seq-mean-token-sum":
        return sequences
    if loss_agg_mode == "seq-mean-token-sum-norm" and sequences:
        return sequences * (batch.get("loss_scale_factor") or length)
    return None


register_policy_loss("cppo")(partial(policy_loss, cppo, CPPOLossConfig))
register_policy_loss("trm")(partial(policy_loss, trm, TRMLossConfig))
register_policy_loss("prefix_ratio")(partial(policy_loss, prefix_ratio, PrefixRatioLossConfig))
register_policy_loss("neighbour")(partial(policy_loss, neighbour, NeighbourLossConfig))


BORDERS = {
    "log_prob": (-math.inf, LOG_PROB_TOLERANCE, "finite and not above zero", "the trainer's forward pass"),
    "old_log_prob": (-math.inf, LOG_PROB_TOLERANCE, "finite and not above zero", "the rollout engine"),
    "advantages": (-math.inf, math.inf, "finite", "the advantage estimator or the reward"),
    "divergence": (
        0,
        math.inf,
        "finite and not below zero",
        "the trainer's logits: inf means that pi lacks a token which mu can sample, as divergence=topk_tv permits; nan "
        "that the actor's model has no such token",
    ),
}
"""Of each input of a loss: its smallest and its largest value, both in words, and where to look."""


def check_values(name: str, x: Tensor, mask: Tensor) -> None:
    """Raise ValueError if a valid token's value is outside its `BORDERS`, or not finite."""
    low, high, wanted, source = BORDERS[name]
    bad = ~(x.isfinite() & (x >= low) & (x <= high)) & mask
    if not bad.any():
        return
    row, column = bad.nonzero()[0].tolist()
    raise ValueError(
        f"{name} must be {wanted}: {int(bad.sum())} of {int(mask.sum())} valid tokens of this micro-batch are not, the "
        f"first {x[row, column].item()} at response {row}, column {column}; check {source}"
    )
