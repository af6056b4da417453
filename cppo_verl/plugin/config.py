"""The hydra configs of the losses.

``verl.trainer.main_ppo`` instantiates the actor's dataclasses in ``validate_config``, before it touches Ray, and again
in each worker: what ``__post_init__`` refuses here never reaches a GPU.
"""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from verl.base_config import BaseConfig
from verl.trainer.ppo.core_algos import POLICY_LOSS_REGISTRY
from verl.utils.config import omega_conf_to_dataclass
from verl.workers.config import PolicyLossConfig

from cppo_verl.core.divergence import Kind
from cppo_verl.core.trust_region import Gate
from cppo_verl.plugin.constants import LOSS_MODES
from cppo_verl.plugin.preflight import (
    Preflight,
    mask_std_0_rules,
    refuse_overridden_variant,
    refuse_pinned,
    refuse_shared_process,
    refuse_uneven_mini_batches,
    top_k_rules,
    violations,
)

if TYPE_CHECKING:
    from typing_extensions import Self

Divergence = Literal["binary_tv", "binary_kl", "topk_tv", "topk_kl"]
Budget = Literal["adaptive", "fixed", "none"]
Weights = Literal["linear", "shuffled"]
PrefixRatio = Literal["minimum", "mean"]
Neighbour = Literal["kpop", "vaco"]

METHOD_FOLDER = Path(__file__).parents[1] / "config" / "method"


@dataclass(kw_only=True)
class DumpConfig(BaseConfig):
    """Which tokens a run dumps, from ``trust_region.dump``; see `cppo_verl.plugin.token_recorder`.

    Args:
        every: steps from one dump to the next; 0 for none.
        responses: how many are drawn at random from a step's batch, >= 1; all of them if it has fewer.
        megabytes: largest size of the folder in 10^6 bytes, > 0.
        folder: a path on the trainer's machine.
    """

    every: int
    responses: int
    megabytes: float
    folder: str

    def __post_init__(self) -> None:
        self.require(is_integer(self.every) and self.every >= 0, "every", "an integer >= 0")
        self.require(is_integer(self.responses) and self.responses >= 1, "responses", "an integer >= 1")
        self.require(is_number(self.megabytes) and self.megabytes > 0, "megabytes", "a number > 0")
        self.require(isinstance(self.folder, str) and self.folder != "", "folder", "a path")

    def require(self, ok: bool, name: str, permitted: str) -> None:
        if not ok:
            raise ValueError(f"trust_region.dump.{name}={getattr(self, name)!r} is not permitted: {permitted}")


@dataclass
class MethodConfig(PolicyLossConfig):
    """Hydra config of a method; as it stands, of those whose loss is verl's own.

    Args:
        mask_std_0: leave prompts whose responses all have the same reward out of the update and of the loss's
            denominators, without refilling.
        preflight: settings of the run that are checked at start-up, filled by interpolation; None outside of a run.
    """

    mask_std_0: bool = True
    preflight: Preflight | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> "Self":
        known = {f.name for f in fields(cls)}
        for key in kwargs.keys() - known:
            raise TypeError(f"policy_loss has no key {key!r} (got {key}={kwargs[key]!r}); it has {sorted(known)}")
        return super().__new__(cls)

    def __post_init__(self) -> None:
        refuse_shared_process()
        modes: tuple[str, ...] = (type(self).loss_mode,)
        if type(self) is MethodConfig:  # a rule of the plug-in needs its own config, all others are verl's
            modes = tuple(mode for mode in POLICY_LOSS_REGISTRY if mode not in LOSS_MODES)
        self.require(self.loss_mode in modes, "loss_mode", f"the method sets it, to one of {modes}; leave it out")
        self.require(isinstance(self.mask_std_0, bool), "mask_std_0", "true or false")
        if self.preflight is None:
            return
        self.require(
            isinstance(self.preflight, Preflight), "preflight", "the method fills it from the run; leave it out"
        )
        if HydraConfig.initialized():  # neither in a worker nor without hydra's command line
            hydra = HydraConfig.get()
            refuse_overridden_variant(hydra.overrides.task)
            refuse_pinned(self, hydra.runtime.choices.get("method"), self.preflight.trust_region, hydra.overrides.task)
        if self.mask_std_0:
            problems = violations(mask_std_0_rules(self.preflight, self.loss_mode))
            self.require(not problems, "mask_std_0", problems)
        # verl's distillation has a loss of its own, which hides the policy loss.
        dump = self.dump
        assert dump is not None  # because preflight is not
        distilled = dump.every and self.preflight.distillation
        dump.require(not distilled, "every", "0 with distillation.enabled=true")
        # Its ranks see other rows than their share of a mini-batch, by which a record's update is counted.
        scattered = dump.every and self.preflight.engine["dynamic_context_parallel"]
        dump.require(not scattered, "every", "0 with actor_rollout_ref.actor.megatron.dynamic_context_parallel=true")

    @property
    def dump(self) -> DumpConfig | None:
        """What the run keeps of its tokens; None outside of a run."""
        return None if self.preflight is None else DumpConfig(**self.preflight.trust_region["dump"])

    def require(self, ok: bool, name: str, permitted: str) -> None:
        if not ok:
            raise ValueError(f"policy_loss.{name}={getattr(self, name)!r} is not permitted: {permitted}")

    def require_number(self, name: str, high: float = math.inf, optional: bool = False) -> None:
        """``name`` must be a number in (0, high], or null where that has a meaning."""
        value = getattr(self, name)
        permitted = f"a number in (0, {high}]" + (", or null" if optional else "")
        self.require((optional and value is None) or (is_number(value) and 0 < value <= high), name, permitted)

    def require_choice(self, name: str, choices: object) -> None:
        self.require(getattr(self, name) in get_args(choices), name, f"one of {get_args(choices)}")


def check_method(config: DictConfig) -> None:
    """Refuse a run that has chosen a method and would not train, or not with its loss, or not as the method says.

    verl's ``validate_config`` calls it through `cppo_verl.register`: an override can take the loss's config away, and
    with it what would refuse the override.

    Raises:
        ValueError: with the key to leave alone or to change; hydra's InstantiationException for what the configs refuse
            themselves.
    """
    method = HydraConfig.get().runtime.choices.get("method") if HydraConfig.initialized() else None
    if "trust_region" not in config and not (METHOD_FOLDER / f"{method}.yaml").exists():
        return
    omega_conf_to_dataclass(config.actor_rollout_ref.rollout)
    key = "actor_rollout_ref.actor.policy_loss"
    node = OmegaConf.select(config, key)
    if isinstance(node, DictConfig):
        shipped = OmegaConf.select(OmegaConf.load(METHOD_FOLDER / "_common.yaml"), f"{key}.preflight")
        wanted = cast(dict, OmegaConf.to_container(OmegaConf.create(shipped, parent=config), resolve=True))
        filled = OmegaConf.select(node, "preflight")
        got = cast(dict, OmegaConf.to_container(filled, resolve=True)) if isinstance(filled, DictConfig) else {}
        for name in [*wanted, *got]:
            if got.get(name) != wanted.get(name):
                raise ValueError(
                    f"{key}.preflight.{name}={got.get(name)} hides the run's own {wanted.get(name)}: leave "
                    f"{key}.preflight out, the method fills it from the run's settings"
                )
    loss = instantiate(node, _convert_="partial")
    if not isinstance(loss, MethodConfig):
        raise ValueError(
            f"{key} has become {type(loss).__name__}, so the run would train without its method's loss: leave "
            f"{key} and its _target_ as the method sets them, or leave the method out of the command"
        )
    refuse_uneven_mini_batches(config)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass
class SurrogateConfig(MethodConfig):
    """Hydra config of the methods that mask the ratio-advantage surrogate.

    Args:
        ratio_cap: upper bound of the importance ratio in the surrogate, >= 1; null for none.
    """

    ratio_cap: float | None = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        cap = self.ratio_cap
        self.require(cap is None or (is_number(cap) and cap >= 1), "ratio_cap", "a number >= 1, or null for no cap")


@dataclass
class MaskedLossConfig(SurrogateConfig):
    """Hydra config that the methods with a choice of divergence share.

    Args:
        divergence: D_t; "binary_tv" is |pi - mu| of the sampled token, "binary_kl" its KL(mu || pi),
            "topk_tv" and "topk_kl" are those on mu's top_k most likely tokens, the sampled one and all others.
        top_k: K of "topk_tv" and "topk_kl", >= 1.
    """

    divergence: Divergence = "binary_tv"
    top_k: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_choice("divergence", Divergence)
        self.require(is_integer(self.top_k) and self.top_k >= 1, "top_k", "an integer >= 1")
        if self.captures and self.preflight is not None:
            problems = violations(top_k_rules(self.preflight, self.top_k))
            self.require(not problems, "divergence", problems)

    @property
    def partition(self) -> str:
        return self.divergence.partition("_")[0]

    @property
    def kind(self) -> Kind:
        return "tv" if self.divergence.endswith("_tv") else "kl"

    @property
    def captures(self) -> bool:
        """Whether D_t needs mu's most likely tokens from the rollout engine."""
        return self.partition == "topk"

    @property
    def largest_divergence(self) -> float:
        return 1 if self.kind == "tv" else math.inf


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
        gate: "hard" (10), "soft" (20), "sapo" or "penalty", see `cppo_verl.core.update_mask`.
        tau: sharpness of the gate "sapo".
    """

    loss_mode: str = "cppo"
    delta: float = 0.15
    delta_b: float = 0.02
    budget: Budget = "adaptive"
    budget_clamp: float = 2.0
    w_min: float = 0.8
    weights: Weights = "linear"
    horizon: int | None = None
    gate: Gate = "hard"
    tau: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_choice("budget", Budget)
        self.require_choice("weights", Weights)
        self.require_choice("gate", Gate)
        self.require_number("delta", self.largest_divergence)
        self.require_number("delta_b", self.largest_divergence)
        self.require(math.isfinite(self.delta_b), "delta_b", "a finite number; budget=none is without a prefix budget")
        self.require_number("w_min", 1)
        self.require_number("tau")
        whole = self.horizon is None or (is_integer(self.horizon) and self.horizon >= 1)
        self.require(whole, "horizon", "an integer >= 1, or null")
        self.require_number("budget_clamp")
        self.require(self.budget_clamp >= 1, "budget_clamp", "a number >= 1, the upper clamp over the lower")
        ignored = self.horizon is not None and self.weights == "shuffled"
        self.require(not ignored, "horizon", "null with weights=shuffled, which has no T")


@dataclass
class TRMLossConfig(MaskedLossConfig):
    """Hydra config of the policy loss ``trm``: whole responses are kept or dropped.

    Args:
        delta: threshold on max_t D_t, > 0; null leaves TRM-Max out.
        delta_avg: threshold on the mean of D_t, > 0; null leaves TRM-Avg out.
    """

    loss_mode: str = "trm"
    divergence: Divergence = "binary_kl"
    delta: float | None = 0.1
    delta_avg: float | None = 0.002

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_number("delta", self.largest_divergence, optional=True)
        self.require_number("delta_avg", self.largest_divergence, optional=True)
        self.require(self.delta is not None or self.delta_avg is not None, "delta", "a number where delta_avg is null")


@dataclass
class PrefixRatioLossConfig(MethodConfig):
    """Hydra config of the policy loss ``prefix_ratio``; its bounds are the actor's clip_ratio_low and _high.

    Its ratio "minimum" is MinPRO's, "mean" is PNPO's.
    """

    loss_mode: str = "prefix_ratio"
    ratio: PrefixRatio = "minimum"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_choice("ratio", PrefixRatio)


@dataclass
class NeighbourLossConfig(SurrogateConfig):
    """Hydra config of the policy loss ``neighbour``, see `cppo_verl.core.neighbours`.

    Args:
        rule: "kpop" drops a token, "vaco" those tokens of a response whose updates move rho_t away from one.
        delta: KPop's phi, or VACO's threshold on the mean of |rho_t - 1|, > 0.
    """

    loss_mode: str = "neighbour"
    rule: Neighbour = "kpop"
    delta: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_choice("rule", Neighbour)
        self.require_number("delta")
