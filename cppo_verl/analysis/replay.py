"""Replays any shipped method on dumped tokens: what it would have decided about them, by calling its training loss.

A replay answers for the recorded tokens only. Had the method trained, its policy would have written other tokens at
later steps.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any, cast

import numpy as np
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.workers.config import ActorConfig, FSDPActorConfig

from cppo_verl.artifacts.token_dump import CODE, Decisions, Response
from cppo_verl.plugin.config import (
    METHOD_FOLDER,
    CPPOLossConfig,
    MethodConfig,
    NeighbourLossConfig,
    PrefixRatioLossConfig,
    TRMLossConfig,
)
from cppo_verl.plugin.constants import CLIP_RATIOS
from cppo_verl.plugin.losses import Observed, loss_context
from cppo_verl.plugin.preflight import refuse_pinned
from cppo_verl.plugin.token_recorder import token_columns

METHODS = sorted(file.stem for file in METHOD_FOLDER.glob("[!_]*.yaml"))
_CONFIGS = (MethodConfig, CPPOLossConfig, TRMLossConfig, PrefixRatioLossConfig, NeighbourLossConfig)
LOSSES = {f"{config.__module__}.{config.__name__}": config for config in _CONFIGS}
"""{``_target_``: the config class of a loss that a run of this plug-in can have}."""
_NAME = re.compile(r"[A-Za-z_][\w-]{0,63}", re.ASCII)
_LARGEST = 1e18
"""Numbers in the settings of a method are smaller, or infinite."""
_NEEDED: dict[str, type | tuple[type, ...]] = {"method": dict, "trust_region": dict, "divergence": str}
_NEEDED |= {"max_response_length": int, "clip_ratio_low": (int, float), "clip_ratio_high": (int, float)}
_NEEDED["clip_ratio_c"] = (int, float, NoneType)  # older dumps lack it
RESPONSES_PER_CALL = 64


@dataclass(frozen=True)
class Setting:
    """A method with its thresholds, ready to be replayed."""

    label: str
    actor: ActorConfig
    """verl's actor config, with the method as its ``policy_loss``."""

    @property
    def divergence(self) -> str | None:
        """The kind of D_t that it uses; None for a loss without one."""
        return getattr(self.actor.policy_loss, "divergence", None)


def lacking(header: dict) -> list[str]:
    """What a replay needs to know and the header of a dump lacks, or has as something else than it is."""
    return [key for key, kind in _NEEDED.items() if not isinstance(header.get(key), kind)]


def run_setting(header: dict) -> Setting:
    """The run's own setting, from the header of its dump, which lacks nothing.

    Raises:
        ValueError: the header names a class other than a loss's config, or holds what no such config does.
    """
    return Setting("the run's", _actor(header | {"policy_loss": header["method"]}))


def setting(text: str, header: dict) -> Setting:
    """A shipped method with the thresholds of the run that made the dump.

    Args:
        text: the method's name, then hydra overrides, separated by blanks: "cppo trust_region.delta=0.1".
        header: the dump's header; methods read their thresholds from its ``trust_region``.

    Raises:
        ValueError: there is no such method, or its config refuses the overrides.
    """
    method, *overrides = text.split() or [""]
    if method not in METHODS:
        raise ValueError(f"no method {method!r}; there are {', '.join(METHODS)}")
    # All that the methods' configs read from the rest of a run's config.
    known = [f"+data.max_response_length={header['max_response_length']}"]
    for key, value in _checked(header["trust_region"]).items():
        known.append(f"++trust_region.{key}={'null' if value is None else value}")
    try:
        GlobalHydra.instance().clear()
        with initialize_config_module("cppo_verl.config", version_base=None):
            config = compose(overrides=[f"+method={method}", *known, *overrides])
        actor = config.actor_rollout_ref.actor
        OmegaConf.set_struct(actor, False)
        del actor.policy_loss["preflight"]  # only a run can fill it
        replayed = Setting(text, _actor(cast(dict, OmegaConf.to_container(actor, resolve=True))))
        refuse_pinned(replayed.actor.policy_loss, method, config.trust_region, overrides)
        return replayed
    except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:
        raise ValueError(f"method {text!r}: {error}") from error


def _actor(settings: dict) -> ActorConfig:
    """verl's actor config with the method in ``policy_loss``, and the clip ratios if there are any.

    Nothing is instantiated by name: the header of a dump may be anybody's.
    """
    method = {key: value for key, value in settings["policy_loss"].items() if key != "preflight"}
    target = method.pop("_target_", None)
    if target not in LOSSES:
        raise ValueError(f"{target!r:.200} is not the config class of a policy loss: {', '.join(LOSSES)}")
    try:
        loss = LOSSES[target](**_checked(method))
    except TypeError as error:
        raise ValueError(str(error)) from error
    clips = {key: settings[key] for key in CLIP_RATIOS if settings.get(key) is not None}
    # Values the loss does not read are arbitrary.
    return FSDPActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=loss, **clips)


def _checked(settings: dict) -> dict[str, Any]:
    """The settings, which are numbers, names and nothing else, so that none of them can refer to anything.

    Raises:
        ValueError: a key or a value is of another kind.
    """
    for key, value in settings.items():
        name = isinstance(value, str) and _NAME.fullmatch(value)
        number = isinstance(value, int | float) and (abs(value) < _LARGEST or value == math.inf)
        if not (_NAME.fullmatch(key) and (value is None or name or number)):
            raise ValueError(f"{key!r:.99}: {value!r:.200} is no setting of a method: a number, a name or null")
    return settings


def is_replayable(setting: Setting, header: dict) -> bool:
    """Whether the dump has the D_t that the setting needs; log-probabilities do not give a top-K one."""
    return not (setting.divergence or "").startswith("topk_") or setting.divergence == header["divergence"]


def decisions(setting: Setting, responses: Sequence[Response]) -> Iterator[Decisions]:
    """Yield what the setting decides about each response, in order.

    Shuffled weights are drawn with a fixed seed, so every call yields the same.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for begin in range(0, len(responses), RESPONSES_PER_CALL):
            part = responses[begin : begin + RESPONSES_PER_CALL]
            columns, delta_b = _columns(setting, part)
            for row, response in enumerate(part):
                length = len(response.response)
                values = {name: np.where(response.mask, x[row, :length].numpy(), 0) for name, x in columns.items()}
                values["reason"] = values["reason"].astype(np.uint8)
                yield Decisions(delta_b=delta_b[row], **values)


def _columns(setting: Setting, responses: Sequence[Response]) -> tuple[dict[str, Tensor], list[float | None]]:
    """The columns of `Decisions` that the setting has, [B, L] each, and delta_b of each response."""
    log_pi, log_mu, advantages, divergence, mask = (
        torch.nn.utils.rnn.pad_sequence([torch.tensor(getattr(r, name)) for r in responses], batch_first=True)
        for name in ("log_pi", "log_mu", "advantage", "divergence", "mask")
    )
    log_pi.requires_grad_()
    loss_fn = get_policy_loss_fn(setting.actor.policy_loss.loss_mode)
    observed: list[Observed] = []
    with loss_context(divergence=divergence, observed=observed):
        loss, _ = loss_fn(
            old_log_prob=log_mu,
            log_prob=log_pi,
            advantages=advantages,
            response_mask=mask,
            loss_agg_mode="token-mean",
            config=setting.actor,
        )
    if observed:
        ((method, tokens, decision),) = observed
        columns = token_columns(method, tokens, decision)
        del columns["log_pi"]
        delta_b = decision.region.delta_b
        budgets = [None] * len(responses) if delta_b is None else delta_b.squeeze(-1).tolist()
        return columns, budgets
    # One of verl's own losses: its gradient tells what it leaves of rho_t A_t.
    (gradient,) = torch.autograd.grad(loss * mask.sum(), log_pi)
    unclipped = -(log_pi - log_mu).exp().detach() * advantages
    # Far below mu, rho_t underflows, and so may the gradient: that token is taken out, unless it had nothing to give.
    left = torch.where(advantages == 0, 1.0, (gradient / unclipped).nan_to_num(0.0)).clamp(0, 1)
    # Dividing the loss by the number of tokens, and multiplying again, has rounded the gradient.
    left = torch.where(left > 1 - 1e-4, 1.0, left)
    reason = torch.where(left < 1, CODE["clipped"], CODE["kept"])
    return {"update_mask": left, "reason": reason.masked_fill(~mask, 0)}, [None] * len(responses)
