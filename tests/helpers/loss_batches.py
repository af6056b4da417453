"""Micro-batches for the policy losses, and calls of a loss through verl's registry."""

import math

import torch
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import FSDPActorConfig

from cppo_verl.plugin.config import CPPOLossConfig

DELTA, DELTA_B, W_MIN, CAP = 0.15, 0.02, 0.8, 20.0


def actor_config(tokens=None, sequences=None, dp_size=1, **rule):
    config = FSDPActorConfig(
        strategy="fsdp2",
        rollout_n=1,
        ppo_micro_batch_size_per_gpu=1,
        policy_loss=CPPOLossConfig(**{"delta": DELTA, "delta_b": DELTA_B, "w_min": W_MIN} | rule),
    )
    if tokens is not None:
        config.global_batch_info.update(
            dp_size=dp_size, batch_num_tokens=tokens, global_batch_size=sequences, loss_scale_factor=None
        )
    return config


def batch(seed=0, rows=12, width=40, drift=0.4):
    """Responses of length 0 to width, some with holes, on-policy in the first rows and far off in the last."""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, width + 1, (rows,), generator=g)
    lengths[0], lengths[1], lengths[2] = 0, 1, width
    mask = torch.arange(width) < lengths[:, None]
    mask[3:6] &= torch.rand(3, width, generator=g) > 0.3
    log_mu = -torch.rand(rows, width, generator=g) * 2
    scale = torch.linspace(0, drift, rows)[:, None]
    log_pi = (log_mu + scale * torch.randn(rows, width, generator=g)).clamp_max(-0.01)
    advantages = torch.randn(rows, 1, generator=g).expand(rows, width) * mask
    junk = torch.tensor([math.nan, math.inf, -math.inf, 5.0])[torch.randint(0, 4, (rows, width), generator=g)]
    return {
        "old_log_prob": torch.where(mask, log_mu, junk),
        "log_prob": torch.where(mask, log_pi, junk).requires_grad_(),
        "advantages": torch.where(mask, advantages, junk),
        "response_mask": mask,
    }


def call(data, config, loss_agg_mode="token-mean", **kwargs):
    loss_fn = get_policy_loss_fn("cppo")
    return loss_fn(loss_agg_mode=loss_agg_mode, config=config, rollout_is_weights=None, **data, **kwargs)
