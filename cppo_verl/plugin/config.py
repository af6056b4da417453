"""The hydra configs of the losses, and the checks that stop a run before Ray starts.

``verl.trainer.main_ppo`` instantiates the actor's dataclasses in ``validate_config``, before it
touches Ray, and again in each worker: what ``__post_init__`` refuses here never reaches a GPU.
"""

import os
from dataclasses import dataclass, field, fields
from typing import Literal, get_args

from omegaconf import DictConfig, OmegaConf
from verl.base_config import BaseConfig
from verl.workers.config import PolicyLossConfig

TRAINER_MODE_PREFIX = "cppo_"
TRAINER_MODES = tuple(TRAINER_MODE_PREFIX + mode for mode in ("sync", "colocate_async", "separate_async"))

Divergence = Literal["binary_tv", "binary_kl"]
Budget = Literal["adaptive", "fixed", "none"]
Gate = Literal["hard", "soft"]


@dataclass(kw_only=True)
class RolloutPolicy(BaseConfig):
    """Where old_log_prob will come from. D_t and rho_t are measured against the policy that generated
    the tokens, so old_log_prob must be the rollout engine's own log-probability of them.

    The shipped method configs fill each field by interpolation from the setting of the run that its
    name in `SETTINGS` says; the fields are not meant to be set by hand.
    """

    use_v1: bool
    trainer_mode: str
    bypass_mode: bool
    rollout_is: str | None
    rollout_rs: str | None
    calculate_log_probs: bool
    logprobs_mode: str
    temperature: float
    top_p: float
    top_k: int

    def __post_init__(self):
        problems = self.problems()
        if problems:
            raise ValueError("old_log_prob would not be the rollout policy's: " + " | ".join(problems))

    def problems(self) -> list[str]:
        """One sentence a setting that breaks mu, each with the override that mends it."""
        found = []

        def require(ok: bool, setting: str, value, reason: str, fix: str) -> None:
            if not ok:
                found.append(f"{setting}={value} {reason}; set {fix}")

        require(
            self.use_v1,
            "trainer.use_v1",
            self.use_v1,
            "selects the legacy trainer, which replaces the policy loss in bypass mode",
            "trainer.use_v1=true",
        )
        require(
            self.trainer_mode in TRAINER_MODES,
            "trainer.v1.trainer_mode",
            self.trainer_mode,
            "is not one of the plug-in's trainers " + ", ".join(TRAINER_MODES),
            f"trainer.v1.trainer_mode={TRAINER_MODE_PREFIX}{self.trainer_mode}"
            if TRAINER_MODE_PREFIX + self.trainer_mode in TRAINER_MODES
            else f"trainer.v1.trainer_mode={TRAINER_MODES[0]}",
        )
        correction = "algorithm.rollout_correction."
        require(
            self.bypass_mode,
            correction + "bypass_mode",
            self.bypass_mode,
            "recomputes old_log_prob with the trainer's weights",
            correction + "bypass_mode=true",
        )
        for name in ("rollout_is", "rollout_rs"):
            value = getattr(self, name)
            require(
                value is None,
                correction + name,
                value,
                "corrects for the mismatch that the ratio to mu already carries",
                correction + name + "=null",
            )
        rollout = "actor_rollout_ref.rollout."
        require(
            self.calculate_log_probs,
            rollout + "calculate_log_probs",
            self.calculate_log_probs,
            "does not record the rollout engine's log-probabilities",
            rollout + "calculate_log_probs=true",
        )
        require(self.temperature > 0, rollout + "temperature", self.temperature, "is greedy", rollout + "temperature=1")
        require(
            self.logprobs_mode == "processed_logprobs"
            or (self.logprobs_mode == "raw_logprobs" and self.temperature == 1),
            rollout + "logprobs_mode",
            self.logprobs_mode,
            f"records another distribution than the one sampled at temperature {self.temperature}",
            rollout + "logprobs_mode=processed_logprobs",
        )
        require(
            self.top_p == 1,
            rollout + "top_p",
            self.top_p,
            "samples from a truncated softmax, which the trainer's log-probabilities are not of",
            rollout + "top_p=1",
        )
        require(
            self.top_k in (-1, 0),
            rollout + "top_k",
            self.top_k,
            "samples from a truncated softmax, which the trainer's log-probabilities are not of",
            rollout + "top_k=-1",
        )
        return found


@dataclass
class CPPOLossConfig(PolicyLossConfig):
    """Hydra config of the policy loss ``cppo``.

    Args:
        delta: token-level threshold on w_t D_t, > 0 and for TV at most 1.
        delta_b: prefix-average threshold, > 0; the lower clamp of the adaptive budget.
        budget: "adaptive" is (22) per response, "fixed" takes delta_b as it is, "none" leaves only
            the token threshold.
        w_min: position weight of a response's last token, in (0, 1]; 1 weighs all tokens alike.
        divergence: D_t; "binary_tv" is |pi - mu| of the sampled token, "binary_kl" its KL(mu || pi).
        gate: "hard" (10) or "soft" (20).
        ratio_cap: upper bound of the importance ratio in the surrogate, >= 1; null for none.
    """

    loss_mode: str = "cppo"
    delta: float = 0.15
    delta_b: float = 0.02
    budget: str = "adaptive"
    w_min: float = 0.8
    divergence: str = "binary_tv"
    gate: str = "hard"
    ratio_cap: float | None = 20.0
    mu: RolloutPolicy | None = field(default=None)

    def __new__(cls, *args, **kwargs):
        known = {f.name for f in fields(cls)}
        for key in kwargs.keys() - known:
            raise TypeError(f"policy_loss has no key {key!r} (got {key}={kwargs[key]!r}); it has {sorted(known)}")
        return super().__new__(cls)

    def __post_init__(self):
        def require(ok: bool, name: str, permitted: str) -> None:
            if not ok:
                raise ValueError(f"policy_loss.{name}={getattr(self, name)!r} is not permitted: {permitted}")

        upper = 1 if self.divergence == "binary_tv" else float("inf")
        require(self.divergence in get_args(Divergence), "divergence", f"one of {get_args(Divergence)}")
        require(self.budget in get_args(Budget), "budget", f"one of {get_args(Budget)}")
        require(self.gate in get_args(Gate), "gate", f"one of {get_args(Gate)}")
        require(_number(self.delta) and 0 < self.delta <= upper, "delta", f"a number in (0, {upper}]")
        require(_number(self.delta_b) and 0 < self.delta_b <= upper, "delta_b", f"a number in (0, {upper}]")
        require(_number(self.w_min) and 0 < self.w_min <= 1, "w_min", "a number in (0, 1]")
        require(
            self.ratio_cap is None or (_number(self.ratio_cap) and self.ratio_cap >= 1),
            "ratio_cap",
            "a number >= 1, or null for no cap",
        )


def _number(x) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def missing_files(config: DictConfig) -> list[str]:
    """The run's model and data that name a place on this machine and are not there, as "key=path".

    A path without a leading "/", "." or "~" may be a model on the hub, one with "://" is remote: these
    are verl's to find.
    """
    missing = []
    for key in ("actor_rollout_ref.model.path", "data.train_files", "data.val_files"):
        paths = OmegaConf.select(config, key)
        for path in [paths] if isinstance(paths, str) else paths or []:
            local = path.startswith(("/", "./", "../", "~"))
            if local and not os.path.exists(os.path.expanduser(path)):
                missing.append(f"{key}={path}")
    return missing
