"""What is checked of a run before Ray starts, beyond the loss's own settings.

The shipped methods hand the settings concerned to the loss's config by interpolation, as ``policy_loss.preflight``.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from verl.base_config import BaseConfig

from cppo_verl.plugin.constants import TOP_K_ROLLOUT, TRAINER_MODE_PREFIX, TRAINER_MODES
from cppo_verl.plugin.topk.codec import bytes_per_token

# hydra launchers that run several jobs of a sweep in one process, where verl starts Ray once.
SHARED_PROCESS_LAUNCHERS = (
    "hydra._internal.core_plugins.basic_launcher.BasicLauncher",
    "hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher",
)

TRUST_REGION_KEYS = ("delta", "delta_b", "budget", "partition", "dump")


@dataclass(kw_only=True)
class Preflight(BaseConfig):
    """Settings of the run that decide whether its loss measures what it should.

    D_t and rho_t compare pi with the policy that generated the tokens, so old_log_prob and mu's most likely tokens
    must be the rollout engine's own.

    Raises:
        ValueError: old_log_prob would be another policy's, or ``trust_region`` has an unknown key.
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
    shuffle: bool
    trust_region: dict

    def __post_init__(self):
        problems = violations(ROLLOUT_POLICY_RULES, self)
        if problems:
            raise ValueError("old_log_prob would not be the rollout policy's: " + " | ".join(problems))
        for key in self.trust_region.keys() - set(TRUST_REGION_KEYS):
            value = self.trust_region[key]
            raise ValueError(f"trust_region has no key {key!r} (got {key}={value!r}); it has {TRUST_REGION_KEYS}")

    @property
    def nearest_trainer_mode(self) -> str:
        """The plug-in's trainer for the mode that the run names, else its synchronous one."""
        mode = TRAINER_MODE_PREFIX + self.trainer_mode
        return mode if mode in TRAINER_MODES else TRAINER_MODES[0]


class Rule(NamedTuple):
    """What a setting of the run may be, and what to say where it is something else."""

    field: str
    """Of `Preflight`."""
    setting: str
    """Its dotted key in the run's config."""
    permitted: Callable[[Preflight], bool]
    reason: str
    """Why another value breaks the run; a format string over ``run``, the `Preflight`."""
    fix: str = "{setting}=true"
    """The override that mends it; a format string likewise."""


def violations(rules: tuple[Rule, ...], run: Preflight) -> list[str]:
    """One sentence for each rule that the run breaks, with the override that mends it."""
    return [
        f"{rule.setting}={getattr(run, rule.field)} {rule.reason.format(run=run)}; "
        f"set {rule.fix.format(run=run, setting=rule.setting)}"
        for rule in rules
        if not rule.permitted(run)
    ]


CORRECTION, ROLLOUT, ACTOR = "algorithm.rollout_correction.", "actor_rollout_ref.rollout.", "actor_rollout_ref.actor."
TRUNCATES = "truncates the sampling distribution, so the trainer's log-probabilities describe a different distribution"
CORRECTS = "corrects for the mismatch that the ratio to mu already carries"

ROLLOUT_POLICY_RULES = (
    Rule(
        "use_v1",
        "trainer.use_v1",
        lambda run: run.use_v1,
        "selects the legacy trainer, which replaces the policy loss in bypass mode",
    ),
    Rule(
        "trainer_mode",
        "trainer.v1.trainer_mode",
        lambda run: run.trainer_mode in TRAINER_MODES,
        f"is not one of the plug-in's trainers {', '.join(TRAINER_MODES)}",
        "{setting}={run.nearest_trainer_mode}",
    ),
    Rule(
        "bypass_mode",
        CORRECTION + "bypass_mode",
        lambda run: run.bypass_mode,
        "recomputes old_log_prob with the trainer's weights",
    ),
    Rule("rollout_is", CORRECTION + "rollout_is", lambda run: run.rollout_is is None, CORRECTS, "{setting}=null"),
    Rule("rollout_rs", CORRECTION + "rollout_rs", lambda run: run.rollout_rs is None, CORRECTS, "{setting}=null"),
    Rule(
        "calculate_log_probs",
        ROLLOUT + "calculate_log_probs",
        lambda run: run.calculate_log_probs,
        "does not record the rollout engine's log-probabilities",
    ),
    Rule("temperature", ROLLOUT + "temperature", lambda run: run.temperature > 0, "is greedy", "{setting}=1"),
    Rule(
        "logprobs_mode",
        ROLLOUT + "logprobs_mode",
        lambda run: run.logprobs_mode in ("processed_logprobs", *(["raw_logprobs"] if run.temperature == 1 else [])),
        "records another distribution than the one sampled at temperature {run.temperature}",
        "{setting}=processed_logprobs",
    ),
    Rule("top_p", ROLLOUT + "top_p", lambda run: run.top_p == 1, TRUNCATES, "{setting}=1"),
    Rule("top_k", ROLLOUT + "top_k", lambda run: run.top_k in (-1, 0), TRUNCATES, "{setting}=-1"),
)
"""What makes old_log_prob the log-probability under mu."""


def top_k_rules(top_k: int) -> tuple[Rule, ...]:
    """What a divergence on mu's ``top_k`` most likely tokens needs beyond `ROLLOUT_POLICY_RULES`."""
    binary = " or divergence=binary_tv"
    return (
        Rule(
            "rollout_name",
            ROLLOUT + "name",
            lambda run: run.rollout_name in ("vllm", TOP_K_ROLLOUT),
            "cannot return mu's most likely tokens",
            "{setting}=vllm" + binary,
        ),
        Rule(
            "max_logprobs",
            ROLLOUT + "engine_kwargs.vllm.max_logprobs",
            lambda run: run.max_logprobs == -1 or run.max_logprobs >= top_k,
            f"is below top_k={top_k}",
            f"++{{setting}}={top_k}",
        ),
        Rule(
            "strategy",
            ACTOR + "strategy",
            lambda run: run.strategy in ("fsdp", "fsdp2"),
            "is an engine whose logits the top-K divergences do not read",
            "{setting}=fsdp2" + binary,
        ),
        Rule(
            "use_fused_kernels",
            "actor_rollout_ref.model.use_fused_kernels",
            lambda run: not run.use_fused_kernels,
            "leaves no logits to take D_t from",
            "{setting}=false" + binary,
        ),
        Rule(
            "pad_to_length",
            ACTOR + "fsdp_config.pad_to_length",
            lambda run: not run.pad_to_length,
            "is refused by verl's engine together with its logits hook",
            "{setting}=false" + binary,
        ),
        Rule(
            "distillation",
            "distillation.enabled",
            lambda run: not run.distillation,
            "uses verl's only logits hook",
            "{setting}=false" + binary,
        ),
    )


def refuse_pinned(
    loss: BaseConfig, method: str | None, trust_region: Mapping[str, Any], overrides: Sequence[str]
) -> None:
    """Raise ValueError if the command line sets a key of ``trust_region`` that the method pins to another value.

    A config file may set such a key for all methods, as a recipe's scale does: the preset's own value then stands. On
    the command line a key is meant for this run, which must not go on with another value.

    Args:
        loss: the loss's config.
        method: its name in the hydra group.
        trust_region: the run's.
        overrides: the command line's.
    """
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    given = {key for override in parsed for key in _keys(override.key_or_group, override.value())}
    problems = []
    for key in ("delta", "delta_b", "budget", "partition"):
        value = trust_region.get(key)
        if f"trust_region.{key}" in given and value != loss.get(key, value):
            way_out = f"{ACTOR}policy_loss.{key}={value}"
            if key == "partition":
                way_out = f"divergence={value}_{loss['kind']}"
            problems.append(
                f"method={method} pins {key}={loss[key]}, so trust_region.{key}={value} would be ignored: "
                f"set {way_out} instead, or use a method that reads trust_region.{key}, such as method=cppo"
            )
    if problems:
        raise ValueError(" | ".join(problems))


def _keys(key: str, value: Any) -> list[str]:
    """Dotted keys of the leaves that an override sets."""
    if isinstance(value, dict):
        return [leaf for name, part in value.items() for leaf in _keys(f"{key}.{name}", part)]
    return [key]


def refuse_shared_process() -> None:
    """Raise ValueError in a job of a sweep that shares its process with other jobs."""
    if not HydraConfig.initialized():
        return
    hydra = HydraConfig.get()
    if hydra.mode == RunMode.MULTIRUN and hydra.launcher._target_ in SHARED_PROCESS_LAUNCHERS:
        raise ValueError(
            f"{hydra.launcher._target_} runs the jobs of a sweep in one process, where verl starts Ray once: "
            "add hydra/launcher=processes hydra.sweep.dir=FOLDER"
        )


def captured_bytes(config: DictConfig) -> str:
    """What the transport of mu's most likely tokens costs, for a run with a top-K divergence."""
    top_k = config.actor_rollout_ref.actor.policy_loss.top_k
    responses = config.data.train_batch_size * config.actor_rollout_ref.rollout.n
    per_token = bytes_per_token(top_k)
    most = responses * config.data.max_response_length * per_token
    return (
        f"mu's {top_k} most likely tokens: {per_token} bytes a response token, at most {most / 1e6:,.1f} MB a step of "
        f"{responses} responses"
    )


def local_files(config: DictConfig) -> list[str]:
    """The run's model and data files that are paths of the machine itself, as "key=path".

    A path without a leading "/", "." or "~" may be a model on the hub, and one with "://" is remote: verl finds these.
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
