"""The policy losses, as verl calls them: keyword arguments, padded tensors [B, L], (loss, metrics) back."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
from verl.workers.config import ActorConfig

from cppo_verl.core.divergence import as_float32, binary_divergence
from cppo_verl.core.metrics import (
    GROUPS,
    POSITION_BINS,
    POSITION_SUMS,
    RESPONSE_SUMS,
    TOKEN_SUMS,
    mask_sums,
    position_sums,
)
from cppo_verl.core.surrogate import (
    WeightedLogProb,
    clipped_weight,
    mean_prefix_ratio,
    minimum_prefix_ratio,
    surrogate_weight,
)
from cppo_verl.core.trust_region import (
    TrustRegion,
    adaptive_budget,
    build_trust_region,
    masked_quantile,
    position_weights,
    response_mask_by_divergence,
    shuffled_weights,
    update_mask,
)
from cppo_verl.plugin.config import CPPOLossConfig, MaskedLossConfig, MethodConfig, PrefixRatioLossConfig, TRMLossConfig

METRIC_PREFIX = "actor/trust_region/"
SUM_NAMES = [f"{METRIC_PREFIX}{group}/{name}" for group in GROUPS for name in TOKEN_SUMS + RESPONSE_SUMS]
SUM_NAMES += [f"{METRIC_PREFIX}position_{b}/{name}" for name in POSITION_SUMS for b in range(POSITION_BINS)]
# Log-probabilities are sums of rounded terms; more than this above zero is no rounding.
LOG_PROB_TOLERANCE = 1e-3


class Tokens(NamedTuple):
    """A micro-batch as the rules see it: fp32, [B, L], zero outside the mask, without gradient."""

    log_pi: Tensor
    log_mu: Tensor
    log_ratio: Tensor
    advantages: Tensor
    mask: Tensor
    """True on valid tokens."""
    valid: Tensor
    """The mask in fp32: conversions cost as much as the arithmetic does."""
    divergence: Tensor | None
    """D_t where the trainer has measured it in the forward pass, which the top-K divergences need."""


_measured: ContextVar[Tensor | None] = ContextVar("cppo_verl_measured_divergence", default=None)


@contextmanager
def measured_divergence(divergence: Tensor) -> Iterator[None]:
    """Policy losses taken inside see this D_t [B, L]: verl hands them no more than log-probabilities."""
    token = _measured.set(divergence)
    try:
        yield
    finally:
        _measured.reset(token)


class Decision(NamedTuple):
    """What a rule makes of a micro-batch."""

    weight: Tensor
    """What grad log pi_t is multiplied by, [B, L]; zero outside the mask."""
    update_mask: Tensor
    """M_t in [0, 1], for the metrics."""
    region: TrustRegion
    divergence: Tensor
    delta: float
    """Token threshold that tells apart, in the metrics, what rejected a token."""
    p90: Tensor
    """0.9-quantile of D_t per response, [B, 1]."""


Rule = Callable[[MethodConfig, ActorConfig, Tokens], Decision]
Observed = tuple[MethodConfig, Tokens, Decision]

_observed: ContextVar[list[Observed] | None] = ContextVar("cppo_verl_observed_decisions", default=None)


@contextmanager
def observed_decisions() -> Iterator[list[Observed]]:
    """What the policy losses taken inside decided, one entry a micro-batch; verl's own losses leave none."""
    observed = []
    token = _observed.set(observed)
    try:
        yield observed
    finally:
        _observed.reset(token)


def cppo(method: CPPOLossConfig, config: ActorConfig, tokens: Tokens) -> Decision:
    """CPPO, and as values of its config DPPO and the ablations."""
    divergence, p90 = _divergence(method.divergence, tokens)
    weights = (
        shuffled_weights(tokens.mask, method.w_min)
        if method.weights == "shuffled"
        else position_weights(tokens.valid, method.w_min, horizon=method.horizon)
    )
    delta_b = {"fixed": method.delta_b, "none": None}.get(method.budget)
    if method.budget == "adaptive":
        delta_b = adaptive_budget(divergence, tokens.mask, method.delta_b, method.budget_clamp, p90)
    region = build_trust_region(divergence, tokens.mask, delta=method.delta, delta_b=delta_b, weights=weights)
    keep = update_mask(
        region, tokens.log_ratio, tokens.advantages, delta=method.delta, gate=method.gate, tau=method.tau
    )
    # The penalty's weights leave [0, 1]; what it rejects is what it takes away, down to nothing.
    reported = keep.clamp(0, 1) if method.gate == "penalty" else keep
    return Decision(_masked(method, tokens, keep), reported, region, divergence, method.delta, p90)


def trm(method: TRMLossConfig, config: ActorConfig, tokens: Tokens) -> Decision:
    """TRM-Max, TRM-Avg and both."""
    divergence, p90 = _divergence(method.divergence, tokens)
    keep = response_mask_by_divergence(divergence, tokens.mask, delta=method.delta, delta_avg=method.delta_avg)
    delta = torch.inf if method.delta is None else method.delta
    region = build_trust_region(divergence, tokens.mask, delta=delta, delta_b=None)
    return Decision(_masked(method, tokens, keep), keep, region, divergence, delta, p90)


def prefix_ratio(method: PrefixRatioLossConfig, config: ActorConfig, tokens: Tokens) -> Decision:
    """MinPRO and PNPO; a token counts as masked where its ratio is clipped."""
    ratio = {"minimum": minimum_prefix_ratio, "mean": mean_prefix_ratio}[method.ratio](tokens.log_ratio, tokens.mask)
    low, high = config.clip_ratio_low, config.clip_ratio_high
    inside = ((ratio >= 1 - low) & (ratio <= 1 + high)).to(ratio.dtype)
    divergence, p90 = _divergence("tv", tokens)
    region = build_trust_region(divergence, tokens.mask, delta=torch.inf, delta_b=None)

    weight = clipped_weight(ratio, tokens.advantages, low, high)
    return Decision(weight, inside, region, divergence, torch.inf, p90)


def _divergence(kind: str, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """D_t [B, L] and its 0.9-quantile per response [B, 1]."""
    if kind.startswith("topk_"):
        divergence = tokens.divergence
        if divergence is None:
            raise RuntimeError(f"divergence={kind} is measured in the forward pass by the plug-in's trainers")
    else:
        divergence = binary_divergence(tokens.log_pi, tokens.log_mu, kind.removeprefix("binary_"))
    return divergence, masked_quantile(divergence, tokens.mask, 0.9)


def _masked(method: MaskedLossConfig, tokens: Tokens, keep: Tensor) -> Tensor:
    """The one surrogate of all masked methods: two of them differ in the mask alone."""
    return surrogate_weight(tokens.log_ratio, tokens.advantages, keep, method.ratio_cap)


def policy_loss(
    rule: Rule,
    config_type: type[MethodConfig],
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """A rule as a policy loss of verl: averaged by verl's ``agg_loss``.

    Args:
        rule: one of this module's.
        config_type: what the actor's ``policy_loss`` must be for it.
        old_log_prob: log mu(y_t | s_t), the rollout engine's own, [B, L].
        log_prob: log pi(y_t | s_t), carries the gradient, [B, L].
        advantages: A_t, [B, L].
        response_mask: valid tokens, [B, L]; whatever stands outside of it is ignored.
        loss_agg_mode: verl's; "token-mean" is the paper's.
        config: the actor's config.
        rollout_is_weights: must be None, the ratio to mu is already in the surrogate.

    Returns:
        The scalar loss, and sums under `METRIC_PREFIX` that the plug-in's trainer turns into shares.

    Raises:
        ValueError: log-probabilities or advantages that are not finite, or log-probabilities above
            zero, on valid tokens; tensors of unequal shapes; importance weights.
        TypeError: a config that is not the method's own.
    """
    method = getattr(config, "policy_loss", None)
    if not isinstance(method, config_type):
        raise TypeError(
            f"loss_mode={rule.__name__} needs its own config, but policy_loss is {type(method).__name__}: choose a "
            "method, e.g. +method=cppo, instead of setting actor_rollout_ref.actor.policy_loss.loss_mode"
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
    with torch.no_grad():
        inputs = {"log_prob": log_prob, "old_log_prob": old_log_prob, "advantages": advantages}
        valid = mask.to(torch.float32)
        # Zero outside the mask, whatever stands there; nan_to_num hides no fault, see below.
        log_pi, log_mu, advantages = (as_float32(x).nan_to_num(0, 0, 0).mul_(valid) for x in inputs.values())
        measured = _measured.get()
        if measured is not None:
            measured = torch.where(mask, measured, 0)
        tokens = Tokens(log_pi, log_mu, log_pi - log_mu, advantages, mask, valid, measured)
        decision = rule(method, config, tokens)
        if (observed := _observed.get()) is not None:
            observed.append((method, tokens, decision))
        sums = mask_sums(
            decision.region,
            decision.update_mask,
            decision.divergence,
            tokens.log_ratio,
            advantages,
            valid,
            decision.delta,
            decision.p90,
        )
        positions = position_sums(decision.divergence, valid)
        # The largest value shows nan, +inf and what is above zero, the sum -inf.
        extremes = torch.stack([f(x).float() for x in inputs.values() for f in (torch.amax, torch.sum)])
        # One transfer to the host for everything.
        *sums, pi_max, pi_sum, mu_max, mu_sum, a_max, a_sum = torch.cat(
            [sums.flatten(), positions.flatten(), extremes]
        ).tolist()

    sound = all(map(math.isfinite, (pi_max, pi_sum, mu_max, mu_sum, a_max, a_sum)))
    if not sound or max(pi_max, mu_max) > LOG_PROB_TOLERANCE:  # perhaps in the padding only
        for name, x in inputs.items():
            check_values(name, x, mask)

    loss_mat = WeightedLogProb.apply(log_prob, decision.weight)
    n_tokens = sums[0]
    if n_tokens:
        loss = agg_loss(loss_mat=loss_mat, loss_mask=valid, loss_agg_mode=loss_agg_mode, **config.global_batch_info)
    else:
        # A mini-batch without a valid token divides by zero in agg_loss; its loss and gradient are zero.
        loss = loss_mat.sum()
    return loss, dict(zip(SUM_NAMES, sums, strict=True))


for _rule, _config_type in ((cppo, CPPOLossConfig), (trm, TRMLossConfig), (prefix_ratio, PrefixRatioLossConfig)):
    register_policy_loss(_rule.__name__)(partial(policy_loss, _rule, _config_type))


def check_values(name: str, x: Tensor, mask: Tensor) -> None:
    """Raise ValueError if a valid token's value is not finite or, of a log-probability, above zero."""
    bad = ~x.isfinite() if name == "advantages" else ~(x <= LOG_PROB_TOLERANCE) | x.isinf()
    bad &= mask
    if not bad.any():
        return
    row, column = bad.nonzero()[0].tolist()
    source = {
        "log_prob": "the trainer's forward pass",
        "old_log_prob": "the rollout engine",
        "advantages": "the advantage estimator or the reward",
    }[name]
    wanted = "finite" if name == "advantages" else "finite and not above zero"
    raise ValueError(
        f"{name} must be {wanted}: {int(bad.sum())} of {int(mask.sum())} valid tokens of this micro-batch are not, the "
        f"first {x[row, column].item()} at response {row}, column {column}; look at {source}"
    )
