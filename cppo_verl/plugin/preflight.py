"""What is checked of a run before Ray starts, beyond the loss's own settings.

The shipped methods hand the settings concerned to the loss's config by interpolation, as ``policy_loss.preflight``.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

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
        problems = violations(rollout_policy_rules(self), self)
        if problems:
            raise ValueError("old_log_prob would not be the rollout policy's: " + " | ".join(problems))
        for key in self.trust_region.keys() - set(TRUST_REGION_KEYS):
            value = self.trust_region[key]
            raise ValueError(f"trust_region has no key {key!r} (got {key}={value!r}); it has {TRUST_REGION_KEYS}")


class Rule(NamedTuple):
    """Whether a setting of the run is permitted, and what to say where it is not."""

    setting: str
    """Its dotted key in the run's config; with hydra's "++" where the config may lack it."""
    permitted: bool
    reason: str
    """Why the value breaks the run."""
    fix: str = "true"
    """The value that mends it, and what else does."""


def violations(rules: list[Rule], run: Preflight) -> list[str]:
    """One sentence for each rule that the run breaks, with the override that mends it."""
    problems = []
    for rule in rules:
        if not rule.permitted:
            field = rule.setting.rpartition(".")[2]
            value = getattr(run, {"name": "rollout_name", "enabled": "distillation"}.get(field, field))
            problems.append(f"{rule.setting.lstrip('+')}={value} {rule.reason}; set {rule.setting}={rule.fix}")
    return problems


CORRECTION, ROLLOUT, ACTOR = "algorithm.rollout_correction.", "actor_rollout_ref.rollout.", "actor_rollout_ref.actor."
TRUNCATES = "truncates the sampling distribution, so the trainer's log-probabilities describe a different distribution"
CORRECTS = "corrects for the mismatch that the ratio to mu already carries"


def rollout_policy_rules(run: Preflight) -> list[Rule]:
    """What makes old_log_prob the log-probability under mu."""
    modes = ("processed_logprobs", *(["raw_logprobs"] if run.temperature == 1 else []))
    other_mode = f"records another distribution than the one sampled at temperature {run.temperature}"
    other_trainer = f"is not one of the plug-in's trainers {', '.join(TRAINER_MODES)}"
    nearest = f"{TRAINER_MODE_PREFIX}{run.trainer_mode}"
    trainer = nearest if nearest in TRAINER_MODES else TRAINER_MODES[0]
    return [
        Rule("trainer.use_v1", run.use_v1, "is the legacy trainer, which replaces the policy loss in bypass mode"),
        Rule("trainer.v1.trainer_mode", run.trainer_mode in TRAINER_MODES, other_trainer, trainer),
        Rule(CORRECTION + "bypass_mode", run.bypass_mode, "recomputes old_log_prob with the trainer's weights"),
        Rule(CORRECTION + "rollout_is", run.rollout_is is None, CORRECTS, "null"),
        Rule(CORRECTION + "rollout_rs", run.rollout_rs is None, CORRECTS, "null"),
        Rule(ROLLOUT + "calculate_log_probs", run.calculate_log_probs, "drops the rollout engine's log-probabilities"),
        Rule(ROLLOUT + "temperature", run.temperature > 0, "is greedy", "1"),
        Rule(ROLLOUT + "logprobs_mode", run.logprobs_mode in modes, other_mode, "processed_logprobs"),
        Rule(ROLLOUT + "top_p", run.top_p == 1, TRUNCATES, "1"),
        Rule(ROLLOUT + "top_k", run.top_k in (-1, 0), TRUNCATES, "-1"),
    ]


def top_k_rules(run: Preflight, top_k: int) -> list[Rule]:
    """What a divergence on mu's ``top_k`` most likely tokens needs beyond `rollout_policy_rules`."""
    vllm, fsdp, false = (f"{value} or divergence=binary_tv" for value in ("vllm", "fsdp2", "false"))
    most, fused = f"++{ROLLOUT}engine_kwargs.vllm.max_logprobs", "actor_rollout_ref.model.use_fused_kernels"
    returns = run.rollout_name in ("vllm", TOP_K_ROLLOUT)
    enough = run.max_logprobs == -1 or run.max_logprobs >= top_k
    unread = "is an engine whose logits the top-K divergences do not read"
    refused = "is refused by verl's engine together with its logits hook"
    return [
        Rule(ROLLOUT + "name", returns, "cannot return mu's most likely tokens", vllm),
        Rule(most, enough, f"is below top_k={top_k}", str(top_k)),
        Rule(ACTOR + "strategy", run.strategy in ("fsdp", "fsdp2"), unread, fsdp),
        Rule(fused, not run.use_fused_kernels, "leaves no logits to take D_t from", false),
        Rule(ACTOR + "fsdp_config.pad_to_length", not run.pad_to_length, refused, false),
        Rule("distillation.enabled", not run.distillation, "uses verl's only logits hook", false),
    ]


def refuse_pinned(
    loss: BaseConfig, method: str | None, trust_region: Mapping[str, Any], overrides: Sequence[str]
) -> None:
    """Raise ValueError if the command line sets a key of ``trust_region`` that the method pins to another value.

    A config file may set such a key for all methods, as a recipe's scale does: the preset's own value then stands. On
    the command line a key is meant for this run, which must not go on with another value.
    """
    given: set[str] = set()
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        group, _, key = override.key_or_group.partition(".")
        if group == "trust_region":
            given.update([key] if key else cast(dict, override.value()))
    problems = []
    for key in ("delta", "delta_b", "budget", "partition"):
        value = trust_region.get(key)
        if key in given and value != loss.get(key, value):
            way_out = f"{ACTOR}policy_loss.{key}={value}"
            if key == "partition":
                way_out = f"divergence={value}_{loss['kind']}"
            problems.append(
                f"method={method} pins {key}={loss[key]}, so trust_region.{key}={value} would be ignored: "
                f"set {way_out} instead, or use a method that reads trust_region.{key}, such as method=cppo"
            )
    if problems:
        raise ValueError(" | ".join(problems))


def refuse_overridden_variant(overrides: Sequence[str]) -> None:
    """Raise ValueError if the command appends a variant before the method, which would override a part of it."""
    appended = [text.partition("=")[0] for text in overrides if text.startswith(("+variant=", "+method="))]
    if appended == ["+variant", "+method"]:
        raise ValueError("+method=... after +variant=... overrides a part of it: put +variant=... after +method=...")


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
