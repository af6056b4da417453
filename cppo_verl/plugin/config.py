"""The hydra configs of the losses, and the checks that stop a run before Ray starts.

``verl.trainer.main_ppo`` instantiates the actor's dataclasses in ``validate_config``, before it
touches Ray, and again in each worker: what ``__post_init__`` refuses here never reaches a GPU.
"""

import math
import os
from dataclasses import dataclass, fields
from functools import partial
from typing import Literal, get_args

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from verl.base_config import BaseConfig
from verl.workers.config import PolicyLossConfig

from cppo_verl.core.trust_region import Gate
from cppo_verl.plugin.topk.codec import bytes_per_token

TRAINER_MODE_PREFIX = "cppo_"
TRAINER_MODES = tuple(TRAINER_MODE_PREFIX + mode for mode in ("sync", "colocate_async", "separate_async"))

# What the trainer turns vLLM, and verl's agent loops, into where D_t is a top-K divergence.
TOP_K_ROLLOUT = "vllm_top_k"
TOP_K_AGENT_LOOP_MANAGER = "cppo_verl.plugin.topk.agent_loop.TopKAgentLoopManager"

# hydra launchers that run several points of a sweep in one process, where verl starts Ray once.
SHARED_PROCESS_LAUNCHERS = (
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
)

Divergence = Literal["binary_tv", "binary_kl", "topk_tv", "topk_kl"]
Budget = Literal["adaptive", "fixed", "none"]
Weights = Literal["linear", "shuffled"]
PrefixRatio = Literal["minimum", "mean"]


@dataclass(kw_only=True)
class RolloutPolicy(BaseConfig):
    """Where old_log_prob, and mu's most likely tokens, will come from. D_t and rho_t are measured against
    the policy that generated the tokens, so both must be the rollout engine's own.

    The shipped method configs fill each field by interpolation from the setting of the run of that
    name; the fields are not meant to be set by hand.
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
    rollout_name: str
    max_logprobs: int
    strategy: str
    use_fused_kernels: bool
    pad_to_length: bool
    distillation: bool

    def __post_init__(self):
        problems = self.problems()
        if problems:
            raise ValueError("old_log_prob would not be the rollout policy's: " + " | ".join(problems))

    def problems(self) -> list[str]:
        """One sentence a setting that breaks mu, each with the override that mends it."""
        found = []
        require = partial(_require, found)
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

    def top_k_problems(self, top_k: int) -> list[str]:
        """The same for what the top-K divergences need beyond it."""
        found = []
        require = partial(_require, found)
        actor, rollout = "actor_rollout_ref.actor.", "actor_rollout_ref.rollout."
        binary = "divergence=binary_tv"
        require(
            self.rollout_name in ("vllm", TOP_K_ROLLOUT),
            rollout + "name",
            self.rollout_name,
            "cannot return mu's most likely tokens",
            f"{rollout}name=vllm or {binary}",
        )
        require(
            self.max_logprobs == -1 or self.max_logprobs >= top_k,
            rollout + "engine_kwargs.vllm.max_logprobs",
            self.max_logprobs,
            f"is below top_k={top_k}",
            f"++{rollout}engine_kwargs.vllm.max_logprobs={top_k}",
        )
        require(
            self.strategy in ("fsdp", "fsdp2"),
            actor + "strategy",
            self.strategy,
            "is an engine whose logits the top-K divergences do not read",
            f"{actor}strategy=fsdp2 or {binary}",
        )
        require(
            not self.use_fused_kernels,
            "actor_rollout_ref.model.use_fused_kernels",
            self.use_fused_kernels,
            "leaves no logits to take D_t from",
            f"actor_rollout_ref.model.use_fused_kernels=false or {binary}",
        )
        require(
            not self.pad_to_length,
            actor + "fsdp_config.pad_to_length",
            self.pad_to_length,
            "is refused by verl's engine together with a look at the logits",
            f"{actor}fsdp_config.pad_to_length=false or {binary}",
        )
        require(
            not self.distillation,
            "distillation.enabled",
            self.distillation,
            "uses the engine's only look at the logits",
            f"distillation.enabled=false or {binary}",
        )
        return found


def _require(found: list[str], ok: bool, setting: str, value, reason: str, fix: str) -> None:
    if not ok:
        found.append(f"{setting}={value} {reason}; set {fix}")


@dataclass(kw_only=True)
class DumpConfig(BaseConfig):
    """What of its tokens a run keeps, see `cppo_verl.plugin.token_recorder`; filled by interpolation from
    ``trust_region.dump``.

    Args:
        every: steps from one dump to the next; 0 for none.
        responses: how many are drawn at random from a batch, >= 1; all where it has no more.
        megabytes: size (10^6 bytes) that the folder is not let grow beyond, > 0.
        folder: on the machine that the trainer runs on.
    """

    every: int
    responses: int
    megabytes: float
    folder: str

    def __post_init__(self):
        for name, low in (("every", 0), ("responses", 1)):
            value = getattr(self, name)
            is_integer = isinstance(value, int) and not isinstance(value, bool)
            self.require(is_integer and value >= low, name, f"an integer >= {low}")
        is_number = isinstance(self.megabytes, int | float) and not isinstance(self.megabytes, bool)
        self.require(is_number and self.megabytes > 0, "megabytes", "a number > 0")
        self.require(isinstance(self.folder, str) and self.folder != "", "folder", "a path")

    def require(self, ok: bool, name: str, permitted: str) -> None:
        if not ok:
            raise ValueError(f"trust_region.dump.{name}={getattr(self, name)!r} is not permitted: {permitted}")


@dataclass
class MethodConfig(PolicyLossConfig):
    """Hydra config of a method of the harness; as it stands, of those whose loss is verl's own.

    Args:
        mask_std_0: leave prompts whose responses all have the same reward out of the update and of the
            loss's denominators, without refilling.
        shuffle: the actor's setting, filled by interpolation.
        mu: where old_log_prob will come from, filled by interpolation.
        dump: what the run keeps of its tokens, filled by interpolation.
    """

    mask_std_0: bool = True
    shuffle: bool = False
    mu: RolloutPolicy | None = None
    dump: DumpConfig | None = None

    def __new__(cls, *args, **kwargs):
        known = {f.name for f in fields(cls)}
        for key in kwargs.keys() - known:
            raise TypeError(f"policy_loss has no key {key!r} (got {key}={kwargs[key]!r}); it has {sorted(known)}")
        return super().__new__(cls)

    def __post_init__(self):
        refuse_shared_process()
        self.require(isinstance(self.mask_std_0, bool), "mask_std_0", "true or false")
        # Which rows share a mini-batch, and so a denominator, is drawn in the workers then.
        self.require(not (self.mask_std_0 and self.shuffle), "mask_std_0", "false with actor.shuffle=true")
        if self.dump is not None and self.dump.every and self.mu is not None:
            # verl's distillation has a loss of its own, which hides the policy loss.
            self.dump.require(not self.mu.distillation, "every", "0 with distillation.enabled=true")

    def require(self, ok: bool, name: str, permitted: str) -> None:
        if not ok:
            raise ValueError(f"policy_loss.{name}={getattr(self, name)!r} is not permitted: {permitted}")

    def require_number(self, name: str, low: float, high: float = math.inf, optional: bool = False) -> None:
        """``name`` must be a number in (low, high], or null where that has a meaning."""
        value = getattr(self, name)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        permitted = f"a number in ({low}, {high}]" + (", or null" if optional else "")
        self.require((optional and value is None) or (is_number and low < value <= high), name, permitted)

    def require_choice(self, name: str, choices) -> None:
        self.require(getattr(self, name) in get_args(choices), name, f"one of {get_args(choices)}")


def refuse_shared_process() -> None:
    """Raise ValueError in a point of a sweep that shares its process with other points."""
    if not HydraConfig.initialized():  # in a worker, or without hydra's command line
        return
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN and hydra.launcher._target_ in SHARED_PROCESS_LAUNCHERS:
        raise ValueError(
            f"{hydra.launcher._target_} runs the points of a sweep in one process, where verl starts Ray once: "
            "add hydra/launcher=processes hydra.sweep.dir=FOLDER"
        )


@dataclass
class MaskedLossConfig(MethodConfig):
    """What the masked methods share: the divergence and the surrogate.

    Args:
        divergence: D_t; "binary_tv" is |pi - mu| of the sampled token, "binary_kl" its KL(mu || pi),
            "topk_tv" and "topk_kl" are those on mu's top_k most likely tokens, the sampled one and all others.
        top_k: K of "topk_tv" and "topk_kl", >= 1.
        ratio_cap: upper bound of the importance ratio in the surrogate, >= 1; null for none.
    """

    divergence: str = "binary_tv"
    top_k: int = 20
    ratio_cap: float | None = 20.0

    def __post_init__(self):
        super().__post_init__()
        self.require_choice("divergence", Divergence)
        is_integer = isinstance(self.top_k, int) and not isinstance(self.top_k, bool)
        self.require(is_integer and self.top_k >= 1, "top_k", "an integer >= 1")
        if self.captures and self.mu is not None:
            problems = self.mu.top_k_problems(self.top_k)
            self.require(not problems, "divergence", " | ".join(problems))
        cap = self.ratio_cap
        is_number = isinstance(cap, int | float) and not isinstance(cap, bool)
        self.require(cap is None or (is_number and cap >= 1), "ratio_cap", "a number >= 1, or null for no cap")

    @property
    def captures(self) -> bool:
        """Whether D_t needs mu's most likely tokens from the rollout engine."""
        return self.divergence.startswith("topk_")

    @property
    def largest_divergence(self) -> float:
        return 1 if self.divergence.endswith("_tv") else math.inf


@dataclass
class CPPOLossConfig(MaskedLossConfig):
    """Hydra config of the policy loss ``cppo``; DPPO and the paper's ablations are values of it.

    Args:
        delta: token-level threshold on w_t D_t, > 0 and for TV at most 1.
        delta_b: prefix-average threshold, > 0; the lower clamp of the adaptive budget.
        budget: "adaptive" is (22) per response, "fixed" takes delta_b as it is, "none" leaves only
            the token threshold.
        budget_clamp: upper clamp of the adaptive budget, in units of delta_b, >= 1; the paper's is 2.
        w_min: position weight of a response's last token, in (0, 1]; 1 weighs all tokens alike.
        weights: "linear" (9), or "shuffled" within each response.
        horizon: T of (9) for all responses alike; null for each one's own length.
        gate: "hard" (10), "soft" (20), "sapo" or "penalty", see `cppo_verl.update_mask`.
        tau: sharpness of the gate "sapo".
    """

    loss_mode: str = "cppo"
    delta: float = 0.15
    delta_b: float = 0.02
    budget: str = "adaptive"
    budget_clamp: float = 2.0
    w_min: float = 0.8
    weights: str = "linear"
    horizon: int | None = None
    gate: str = "hard"
    tau: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        self.require_choice("budget", Budget)
        self.require_choice("weights", Weights)
        self.require_choice("gate", Gate)
        self.require_number("delta", 0, self.largest_divergence)
        self.require_number("delta_b", 0, self.largest_divergence)
        self.require_number("w_min", 0, 1)
        self.require_number("tau", 0)
        self.require_number("horizon", 0, optional=True)
        self.require_number("budget_clamp", 0)
        self.require(self.budget_clamp >= 1, "budget_clamp", "a number >= 1, the upper clamp over the lower")
        self.require(
            self.horizon is None or self.weights == "linear", "horizon", "null with weights=shuffled, which has no T"
        )


@dataclass
class TRMLossConfig(MaskedLossConfig):
    """Hydra config of the policy loss ``trm``: whole responses are kept or dropped.

    Args:
        delta: threshold on max_t D_t, > 0; null leaves TRM-Max out.
        delta_avg: threshold on the mean of D_t, > 0; null leaves TRM-Avg out.
    """

    loss_mode: str = "trm"
    divergence: str = "binary_kl"
    delta: float | None = 0.1
    delta_avg: float | None = 0.002

    def __post_init__(self):
        super().__post_init__()
        self.require_number("delta", 0, self.largest_divergence, optional=True)
        self.require_number("delta_avg", 0, self.largest_divergence, optional=True)
        self.require(self.delta is not None or self.delta_avg is not None, "delta", "a number where delta_avg is null")


@dataclass
class PrefixRatioLossConfig(MethodConfig):
    """Hydra config of the policy loss ``prefix_ratio``; its bounds are the actor's clip_ratio_low and _high.

    Args:
        ratio: "minimum" is MinPRO's, "mean" is PNPO's.
    """

    loss_mode: str = "prefix_ratio"
    ratio: str = "minimum"

    def __post_init__(self):
        super().__post_init__()
        self.require_choice("ratio", PrefixRatio)


def captured_bytes(config: DictConfig) -> str:
    """What mu's most likely tokens cost on their way, for a run with a top-K divergence."""
    top_k = config.actor_rollout_ref.actor.policy_loss.top_k
    responses = config.data.train_batch_size * config.actor_rollout_ref.rollout.n
    per_token = bytes_per_token(top_k)
    most = responses * config.data.max_response_length * per_token
    return (
        f"mu's {top_k} most likely tokens: {per_token} bytes a response token, at most {most / 1e6:,.1f} MB a step of "
        f"{responses} responses"
    )


def local_files(config: DictConfig) -> list[str]:
    """The run's model and data that name a place on the machine itself, as "key=path".

    A path without a leading "/", "." or "~" may be a model on the hub, one with "://" is remote: these
    are verl's to find.
    """
    found = []
    for key in ("actor_rollout_ref.model.path", "data.train_files", "data.val_files"):
        paths = OmegaConf.select(config, key)
        for path in [paths] if isinstance(paths, str) else paths or []:
            if path.startswith(("/", "./", "../", "~")):
                found.append(f"{key}={path}")
    return found


def missing_files(config: DictConfig) -> list[str]:
    """Those of `local_files` that are not on this machine."""
    return [x for x in local_files(config) if not os.path.exists(os.path.expanduser(x.partition("=")[2]))]
