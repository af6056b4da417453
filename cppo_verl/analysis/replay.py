"""What any method of the harness would have done with dumped tokens: the training's own losses, called again.

The tokens are those that the run's policies wrote; under a method that had masked others, later steps would have
written other tokens.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor
from verl.trainer.ppo.core_algos import get_policy_loss_fn
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import ActorConfig

import cppo_verl.config
from cppo_verl.artifacts.token_dump import REASONS, Response
from cppo_verl.plugin.losses import Observed, loss_context
from cppo_verl.plugin.preflight import refuse_pinned
from cppo_verl.plugin.token_recorder import seen_by_rule

METHODS = sorted(file.stem for file in (Path(cppo_verl.config.__path__[0]) / "method").glob("[!_]*.yaml"))
RESPONSES_AT_ONCE = 64


@dataclass(frozen=True)
class Setting:
    """A method with its thresholds."""

    label: str
    actor: ActorConfig
    """verl's, with the method as its ``policy_loss``."""

    @property
    def divergence(self) -> str | None:
        """Kind of D_t; None for a loss without one."""
        return getattr(self.actor.policy_loss, "divergence", None)


@dataclass(eq=False)
class Verdict:
    """What a setting makes of one response; arrays have an entry a response token, 0 where the mask is false."""

    update_mask: np.ndarray
    """M_t in [0, 1]; of verl's own losses, the part of rho_t A_t that is left in the gradient."""
    reason: np.ndarray
    """Positions in `REASONS`."""
    divergence: np.ndarray | None
    """D_t of the setting's kind; None for verl's own losses."""
    weighted_divergence: np.ndarray | None
    """w_t D_t; None but for CPPO and what is a value of it."""
    threshold: np.ndarray | None
    """c_t (8); likewise."""
    delta_b: float | None
    """In force; None without a budget."""


def run_setting(header: dict) -> Setting:
    """The setting that a dump's header tells of.

    Raises:
        ValueError: its class is no loss's config; hydra would call whatever a file names.
    """
    for target in re.findall(r'"_target_": "(.*?)"', json.dumps(header["method"])):
        if not re.fullmatch(r"(cppo_verl\.plugin|verl\.workers)\.config\.\w+Config", target):
            raise ValueError(f"{target} is no config of a policy loss")
    return Setting("the run's", _actor(header | {"policy_loss": header["method"]}))


def setting(text: str, header: dict) -> Setting:
    """A method of the harness as it would run in the place of the dump's own.

    Args:
        text: the method and, after blanks, hydra overrides: "cppo trust_region.delta=0.1".
        header: of the dump; its ``trust_region`` holds for every method that has such thresholds.

    Raises:
        ValueError: no such method, or overrides that its config refuses.
    """
    method, *overrides = text.split() or [""]
    if method not in METHODS:
        raise ValueError(f"no method {method!r}; there are {', '.join(METHODS)}")
    # Of the rest of a run's config, methods read this.
    known = [f"+data.max_response_length={header['max_response_length']}"]
    known += [f"++trust_region.{key}={value}" for key, value in header["trust_region"].items()]
    try:
        GlobalHydra.instance().clear()
        with initialize_config_module("cppo_verl.config", version_base=None):
            config = compose(overrides=[f"+method={method}", *known, *overrides])
        actor = config.actor_rollout_ref.actor
        OmegaConf.set_struct(actor, False)
        del actor.policy_loss["preflight"]  # only a run can fill it
        replayed = Setting(text, _actor(OmegaConf.to_container(actor, resolve=True)))
        refuse_pinned(replayed.actor.policy_loss, method, config.trust_region, overrides)
        return replayed
    except (HydraException, OmegaConfBaseException, ValueError, TypeError) as error:
        raise ValueError(f"method {text!r}: {error}") from error


def _actor(settings: dict) -> ActorConfig:
    # What a loss does not read is as good as any.
    config = {
        "_target_": "verl.workers.config.FSDPActorConfig",
        "strategy": "fsdp2",
        "rollout_n": 1,
        "ppo_micro_batch_size_per_gpu": 1,
    }
    read = {key: settings[key] for key in ("policy_loss", "clip_ratio_low", "clip_ratio_high") if key in settings}
    return omega_conf_to_dataclass(OmegaConf.create(config | read))


def can_judge(setting: Setting, header: dict) -> bool:
    """Whether the dump has the D_t that the setting needs: top-K divergences are not made of log-probabilities."""
    return not (setting.divergence or "").startswith("topk_") or setting.divergence == header["divergence"]


def judge(setting: Setting, responses: list[Response]) -> Iterator[Verdict]:
    """What the setting makes of each response, one verdict each, in order.

    Shuffled weights are drawn with a seed of their own, the same at every call.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for begin in range(0, len(responses), RESPONSES_AT_ONCE):
            part = responses[begin : begin + RESPONSES_AT_ONCE]
            columns, delta_b = _columns(setting, part)
            for row, response in enumerate(part):
                length = len(response.response)
                # Zero outside the mask, as in the dump.
                values = {name: np.where(response.mask, x[row, :length].numpy(), 0) for name, x in columns.items()}
                values["reason"] = values["reason"].astype(np.uint8)
                for name in ("divergence", "weighted_divergence", "threshold"):
                    values.setdefault(name, None)
                yield Verdict(delta_b=delta_b[row], **values)


def _columns(setting: Setting, responses: list[Response]) -> tuple[dict[str, Tensor], list[float | None]]:
    """[B, L] each of what `Verdict` holds, and delta_b of each response."""
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
        columns = seen_by_rule(method, tokens, decision)
        del columns["log_pi"]
        delta_b = decision.region.delta_b
        budgets = [None] * len(responses) if delta_b is None else delta_b.squeeze(-1).tolist()
        return columns, budgets
    (gradient,) = torch.autograd.grad(loss * mask.sum(), log_pi)
    unclipped = -(log_pi - log_mu).exp().detach() * advantages
    left = torch.where(unclipped == 0, 1.0, gradient / unclipped).clamp(0, 1)
    # The gradient went through a division by the number of tokens and back.
    left = torch.where(left > 1 - 1e-4, 1.0, left)
    reason = torch.where(left < 1, REASONS.index("clipped"), REASONS.index("kept"))
    return {"update_mask": left, "reason": reason.masked_fill(~mask, 0)}, [None] * len(responses)
