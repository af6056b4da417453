"""The policy losses, as verl calls them: keyword arguments, padded tensors [B, L], (loss, metrics) back."""

import torch
from torch import Tensor
from verl.trainer.ppo.core_algos import agg_loss, register_policy_loss
from verl.workers.config import ActorConfig

from cppo_verl.diagnostics import GROUPS, RESPONSE_SUMS, TOKEN_SUMS, mask_sums
from cppo_verl.divergence import as_float32, binary_divergence
from cppo_verl.plugin.config import CPPOLossConfig
from cppo_verl.surrogate import masked_surrogate
from cppo_verl.trust_region import adaptive_budget, trust_region, update_mask

METRIC_PREFIX = "actor/trust_region/"
# Log-probabilities are sums of rounded terms; more than this above zero is no rounding.
LOG_PROB_TOLERANCE = 1e-3


@register_policy_loss("cppo")
def compute_policy_loss_cppo(
    old_log_prob: Tensor,
    log_prob: Tensor,
    advantages: Tensor,
    response_mask: Tensor,
    loss_agg_mode: str = "token-mean",
    config: ActorConfig | None = None,
    rollout_is_weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """CPPO's masked ratio-advantage surrogate, -(11) averaged by verl's ``agg_loss``.

    Args:
        old_log_prob: log mu(y_t | s_t), the rollout engine's own, [B, L].
        log_prob: log pi(y_t | s_t), carries the gradient, [B, L].
        advantages: A_t, [B, L].
        response_mask: valid tokens, [B, L]; whatever stands outside of it is ignored.
        loss_agg_mode: verl's; "token-mean" is the paper's.
        config: the actor's config; its ``policy_loss`` must be a `CPPOLossConfig`.
        rollout_is_weights: must be None, the ratio to mu is already in the surrogate.

    Returns:
        The scalar loss, and sums under `METRIC_PREFIX` that the plug-in's trainer turns into shares.

    Raises:
        ValueError: log-probabilities or advantages that are not finite, or log-probabilities above
            zero, on valid tokens; tensors of unequal shapes; importance weights.
        TypeError: a config that is not the method's own.
    """
    rule = getattr(config, "policy_loss", None)
    if not isinstance(rule, CPPOLossConfig):
        raise TypeError(
            f"loss_mode=cppo needs its own config, but policy_loss is {type(rule).__name__}: add +method=cppo to the "
            "command instead of setting actor_rollout_ref.actor.policy_loss.loss_mode"
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
    log_pi, log_mu, advantages = (torch.where(mask, as_float32(x), 0.0) for x in (log_prob, old_log_prob, advantages))
    log_mu, advantages = log_mu.detach(), advantages.detach()
    with torch.no_grad():
        log_ratio = log_pi - log_mu
        divergence = binary_divergence(log_pi, log_mu, "tv" if rule.divergence == "binary_tv" else "kl")
        delta_b = {"fixed": rule.delta_b, "none": None}.get(rule.budget)
        if rule.budget == "adaptive":
            delta_b = adaptive_budget(divergence, mask, rule.delta_b)
        region = trust_region(divergence, mask, delta=rule.delta, delta_b=delta_b, w_min=rule.w_min)
        keep = update_mask(region, log_ratio, advantages, delta=rule.delta, gate=rule.gate)
        sums = mask_sums(region, keep, divergence, log_ratio, advantages, mask, rule.delta)
        faults = torch.stack([_faults(log_pi), _faults(log_mu), (~advantages.isfinite()).sum()])
        # One transfer to the host for everything.
        *sums, n_pi, n_mu, n_advantages = torch.cat([sums.flatten(), faults]).tolist()

    for name, x, count in (
        ("log_prob", log_pi, n_pi),
        ("old_log_prob", log_mu, n_mu),
        ("advantages", advantages, n_advantages),
    ):
        if count:
            raise ValueError(_describe(name, x, mask, int(count)))

    loss_mat = masked_surrogate(log_pi, log_mu, advantages, keep, rule.ratio_cap)
    n_tokens = sums[0]
    if n_tokens:
        loss = agg_loss(
            loss_mat=loss_mat, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **config.global_batch_info
        )
    else:
        # A mini-batch without a valid token divides by zero in agg_loss; its loss and gradient are zero.
        loss = loss_mat.sum()
    names = [f"{METRIC_PREFIX}{group}/{name}" for group in GROUPS for name in TOKEN_SUMS + RESPONSE_SUMS]
    return loss, dict(zip(names, sums, strict=True))


def _faults(log_prob: Tensor) -> Tensor:
    # "not <=" is true for nan as well
    return (~(log_prob <= LOG_PROB_TOLERANCE) | log_prob.isinf()).sum()


def _describe(name: str, x: Tensor, mask: Tensor, count: int) -> str:
    bad = ~x.isfinite() if name == "advantages" else ~(x <= LOG_PROB_TOLERANCE) | x.isinf()
    row, column = bad.nonzero()[0].tolist()
    source = {
        "log_prob": "the trainer's forward pass",
        "old_log_prob": "the rollout engine",
        "advantages": "the advantage estimator or the reward",
    }[name]
    wanted = "finite" if name == "advantages" else "finite and not above zero"
    return (
        f"{name} must be {wanted}: {count} of {int(mask.sum())} valid tokens of this micro-batch are not, the first "
        f"{x[row, column].item()} at response {row}, column {column}; look at {source}"
    )
