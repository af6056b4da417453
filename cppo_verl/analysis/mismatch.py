"""Whether the engines' mismatch alone would spend a run's trust region, before the run is started.

Runs the training command for one mini-batch, in a folder of its own, and reads what the loss saw at the first update,
where pi is mu but for the numerics of two engines. Nothing is saved.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf

from cppo_verl.analysis import replay
from cppo_verl.analysis.positions import position_bins
from cppo_verl.analysis.text import Table, number, percent, print_notes
from cppo_verl.artifacts.token_dump import Response, read_tokens
from cppo_verl.core import adaptive_budget, build_trust_region, position_weights
from cppo_verl.core.metrics import POSITION_BINS
from cppo_verl.doctor.checks import ConfigError, compose_command
from cppo_verl.evaluation.evaluate import holds_run
from cppo_verl.launch import trainer_process
from cppo_verl.plugin.config import CPPOLossConfig, check_method
from cppo_verl.plugin.constants import TRAINER_MODE_PREFIX

TOKENS, LOG = "tokens", "verl.log"
SMALL, SPENT, OUTSIDE = 0.1, 1.0, 0.01
"""Ours. Up to the first share of the prefix budget a mismatch is no matter; from the second share on, or with the third
as the share of tokens outside the region, the mismatch masks by itself."""
OTHER_POLICY = 0.1
"""A mean D_t that no rounding makes: about that of two unlike policies."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    output = "folder for the log and the tokens of this measurement (default: %(default)s)"
    parser.add_argument("--output", type=Path, default=Path("outputs/mismatch"), help=output)
    recorded = "read the first updates in this token dump of a run instead of starting one"
    parser.add_argument("--dump", type=Path, help=recorded)
    command = "after --: the arguments of verl.trainer.main_ppo that the run will have"
    parser.add_argument("command", nargs=argparse.REMAINDER, help=command)


def run(args: argparse.Namespace) -> int:
    """Print D_t by position beside the budget, and what to change.

    Returns:
        1 if the mismatch alone would mask, 2 if there is nothing to read or the command is refused, verl's exit code if
        verl failed, else 0.
    """
    command, config = [word for word in args.command if word != "--"], None
    try:
        if (args.dump is None) == (not command):
            raise ValueError("give either the arguments of a training command after --, or --dump FOLDER")
        if command:
            refuse_foreign(args.output.resolve())
            config = checked(compose_command(command))
            if code := measure(command, config, args.output.resolve()):
                return code
        dump = read_tokens(args.dump or args.output.resolve() / TOKENS)
        print_notes(dump.notes)
        responses = [r for r in dump.responses if r.update == 0 and r.mask.any()]
        if not responses:
            raise ValueError(f"no response of a first update in {dump.path}")
        header = dump.headers[responses[-1].step]
        rule = rule_of(header)
        of_kind = [r for r in responses if dump.headers[r.step].get("divergence") == header["divergence"]]
        if len(of_kind) < len(responses):
            left_out = f"{len(responses) - len(of_kind)} response(s) with another D_t than {header['divergence']}"
            print_notes([f"{left_out}, that of step {responses[-1].step}, are left out"])
        found = Mismatch.of(of_kind, rule)
    except (ConfigError, FileNotFoundError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"--output {args.output}: {error.strerror}; name a folder that can be written to", file=sys.stderr)
        return 2
    print(found.table().terminal(found.caption()))
    print("\n" + "\n".join(found.advice(config)))
    return int(found.masks)


def refuse_foreign(output: Path) -> None:
    """Raise ValueError if the folder holds anything but an earlier measurement, or is a part of a run's."""
    if output.exists() and any(output.iterdir()) and not (output / LOG).exists():
        raise ValueError(f"{output} holds what this command has not made: give another --output")
    if of_run := next(filter(holds_run, (output, *output.parents)), None):
        raise ValueError(
            f"{output} is within the run {of_run}, whose tokens they would count as: give another --output"
        )


def checked(config: DictConfig) -> DictConfig:
    """Return the config of a command that a run of the plug-in would start with; ValueError says why it would not."""
    if "trust_region" not in config:
        raise ValueError("the command has no method of the plug-in, and so no trust region: add +method=cppo to it")
    try:
        check_method(config)
    except Exception as error:  # hydra's, with ours as its cause
        raise ValueError(str(error.__cause__ or error)) from error
    return config


def measure(command: Sequence[str], config: DictConfig, output: Path) -> int:
    """Train the command for one mini-batch and dump its tokens into ``output``; return verl's exit code."""
    log = output / LOG
    output.mkdir(parents=True, exist_ok=True)
    for file in (output / TOKENS).glob("*"):
        file.unlink()
    print(f"verl generates and trains one mini-batch; its log is {log}", flush=True)
    return trainer_process.run_to_end([*command, *overrides(config, output)], log, dict(os.environ))


def overrides(config: DictConfig, output: Path) -> list[str]:
    """Return the overrides that turn a training command into one update of one mini-batch, kept as its tokens alone."""
    quoted = trainer_process.quoted
    actor, off = config.actor_rollout_ref.actor, ("val_before_train=false", "test_freq=-1", "save_freq=-1")
    given = [
        *(f"trainer.{key}" for key in (*off, "resume_mode=disable", "total_training_steps=1", "logger=[console]")),
        "trainer.validation_data_dir=null",
        "trainer.rollout_data_dir=null",
        f"trainer.default_local_dir={quoted(output / 'no-checkpoints')}",
        f"hydra.run.dir={quoted(output)}",
        "hydra.output_subdir=null",
        "trust_region.dump.every=1",
        "trust_region.dump.responses=256",
        "trust_region.dump.megabytes=100000",
        f"trust_region.dump.folder={quoted(output / TOKENS)}",
        # A model that solves nothing yet, or everything, would leave no token to look at.
        "actor_rollout_ref.actor.policy_loss.mask_std_0=false",
        "actor_rollout_ref.actor.ppo_epochs=1",
    ]
    if config.trainer.v1.trainer_mode != f"{TRAINER_MODE_PREFIX}separate_async":  # which divides its batch otherwise
        given.append(f"data.train_batch_size={actor.ppo_mini_batch_size}")
        if config.data.get("gen_batch_size") is not None:
            given.append("data.gen_batch_size=null")
    return given


def rule_of(header: dict) -> CPPOLossConfig:
    """The run's own method if it is CPPO's loss, else cppo with the run's thresholds and its divergence.

    The thresholds of a run are those of TV; for a KL of another loss they are the paper's, those of ``cppo_kl``.
    """
    if missing := replay.lacking(header):
        raise ValueError(f"the dump does not say what its run's {', '.join(missing)} was")
    rule = replay.run_setting(header).actor.policy_loss
    if not isinstance(rule, CPPOLossConfig):
        divergence = header["divergence"]
        method = "cppo_kl" if divergence.endswith("_kl") else "cppo"
        rule = replay.setting(f"{method} divergence={divergence}", header).actor.policy_loss
    assert isinstance(rule, CPPOLossConfig)
    return rule


class Mismatch(NamedTuple):
    """How much of the trust region the tokens of first updates take up."""

    rule: CPPOLossConfig
    responses: int
    tokens: pd.DataFrame
    """A row per token: its "bin" (see `position_bins`), "divergence" D_t, "spent" w_t D_t, "allowed" w_t delta_b (0
    without a prefix budget), and whether it is "beyond_delta" or "beyond_budget": w_t D_t > delta, or else > c_t."""

    @classmethod
    def of(cls, responses: Sequence[Response], rule: CPPOLossConfig) -> "Mismatch":
        """Apply the thresholds of ``rule`` to every token, whatever the direction of its update."""
        frames = []
        for response in responses:
            divergence = torch.tensor(response.divergence[response.mask], dtype=torch.float64)
            valid = torch.ones_like(divergence, dtype=torch.bool)
            weights = position_weights(valid, rule.w_min, torch.float64, rule.horizon)
            delta_b: torch.Tensor | float | None = None
            if rule.budget == "adaptive":
                delta_b = adaptive_budget(divergence, valid, rule.delta_b, rule.budget_clamp)
            elif rule.budget == "fixed":
                delta_b = rule.delta_b
            region = build_trust_region(divergence, valid, delta=rule.delta, delta_b=delta_b, weights=weights)
            spent = region.weighted_divergence
            columns = {
                "divergence": divergence,
                "spent": spent,
                "allowed": weights * (0 if region.delta_b is None else region.delta_b),
                "beyond_delta": spent > rule.delta,
                "beyond_budget": (spent > region.threshold) & (spent <= rule.delta),
            }
            frames.append(pd.DataFrame({"bin": position_bins(response)} | {k: x.numpy() for k, x in columns.items()}))
        return cls(rule, len(responses), pd.concat(frames, ignore_index=True))

    @property
    def spent(self) -> float:
        """Share of the prefix budget that the mismatch takes; 0 for a method without one."""
        return _spent(self.tokens) or 0.0

    @property
    def outside(self) -> float:
        """Share of the tokens that violate a constraint."""
        return float((self.tokens.beyond_delta | self.tokens.beyond_budget).mean())

    @property
    def masks(self) -> bool:
        return self.spent >= SPENT or self.outside >= OUTSIDE

    def table(self) -> Table:
        eighths = {f"{b}/{POSITION_BINS}–{b + 1}/{POSITION_BINS}": part for b, part in self.tokens.groupby("bin")}
        rows = [
            [
                name,
                f"{len(part):,}",
                number(part.divergence.mean(), 3),
                number(part.divergence.max(), 3),
                _spent(part),
                part.beyond_delta.mean(),
                part.beyond_budget.mean(),
            ]
            for name, part in [*eighths.items(), ("all", self.tokens)]
        ]
        header = ["position", "tokens", "mean D_t", "largest D_t", "of the budget", "beyond delta", "beyond the budget"]
        return Table("mismatch", "The engines' mismatch: D_t before any update", header, rows, digits=2)

    def caption(self) -> str:
        rule = self.rule
        budget = "no prefix budget" if rule.budget == "none" else f"delta_b={rule.delta_b:g} ({rule.budget})"
        return (
            f"{len(self.tokens):,} tokens of {self.responses} responses, by eighths of a response, beside "
            f"delta={rule.delta:g} and {budget}; D_t is {rule.divergence}. Of the tokens beyond a threshold those are "
            "masked whose update moves away from mu, about a half."
        )

    def advice(self, config: DictConfig | None) -> list[str]:
        """Say what the mismatch does to the run, and what to change if it does anything."""
        budget, mean = self.rule.budget != "none", self.tokens.divergence.mean()
        takes = f"takes {percent(self.spent)} of the prefix budget and " if budget else ""
        what = f"the mismatch alone {takes}puts {percent(self.outside, 2)} of the tokens outside the trust region"
        if not self.masks and self.spent <= SMALL:
            return [f"ok: {what}"]
        lines = [f"{'FAIL' if self.masks else 'warn'}: {what}", "", "what to change, most effective first:"]
        if mean > OTHER_POLICY:
            lines.append(
                f"- a mean D_t of {mean:.2g} is no rounding: the engines do not compute the same policy. Look for "
                "weights of one engine that are not the other's, a tool or template that changes tokens after they "
                "were sampled, an agent loop that samples at other settings than rollout.*"
            )
        lines += [f"- {line}" for line in precision(config)]
        if budget:
            room = float(f"{self.rule.delta_b + mean:.3g}")
            lines.append(
                f"- if the mismatch must stay, give it room: trust_region.delta_b={room:g} (delta_b and the mean D_t)"
            )
        return lines


def _spent(tokens: pd.DataFrame) -> float | None:
    allowed = tokens.allowed.sum()
    return float(tokens.spent.sum() / allowed) if allowed else None


def precision(config: DictConfig | None) -> list[str]:
    """What makes the engines' numerics differ in a run, most effective first; in general where it is not known."""
    if config is None:
        return ["compute in the same precision on both sides, in fp32 if it can be; no quantised weights or cache"]
    rollout, actor, lines = config.actor_rollout_ref.rollout, config.actor_rollout_ref.actor, []
    for key in (
        "quantization",
        f"engine_kwargs.{rollout.name}.quantization",
        f"engine_kwargs.{rollout.name}.kv_cache_dtype",
    ):
        if (value := OmegaConf.select(rollout, key)) not in (None, "auto"):
            lines.append(f"++actor_rollout_ref.rollout.{key}=null (it is {value})")
    if rollout.dtype != "float32":
        mixed = OmegaConf.select(actor, "fsdp_config.mixed_precision.param_dtype") or "bf16"  # verl's default
        own = mixed if actor.strategy.startswith("fsdp") else OmegaConf.select(actor, f"{actor.strategy}.dtype")
        lines.append(
            f"the same precision on both sides: the rollout computes in {rollout.dtype}, the actor in {own}. float16 "
            "rounds finer than bfloat16; actor_rollout_ref.rollout.dtype=float32 finer still"
        )
    recorded = rollout.get("enable_rollout_routing_replay", False)
    if not recorded and actor.strategy in ("megatron", "veomni"):
        lines.append(
            f"with a mixture of experts, replay the rollout's routes: actor_rollout_ref.actor.{actor.strategy}."
            "router_replay.mode=R3 actor_rollout_ref.rollout.enable_rollout_routing_replay=true"
        )
    return lines
