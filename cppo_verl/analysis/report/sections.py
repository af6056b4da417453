"""Which panels a report has, section by section; the sections' texts stand in the template."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from cppo_verl.analysis.inspect import token_text
from cppo_verl.analysis.report.curves import (
    curve,
    drift_by_position,
    logged,
    memory,
    product,
    stacked_phases,
    validation,
)
from cppo_verl.analysis.report.panels import Missing, Panel
from cppo_verl.analysis.report.runs import NO_DUMP, Line, ReportedRun, shown
from cppo_verl.analysis.report.token_panels import largest_by_position, over_steps, response_panel

SHARE = "trust_region/masked_share"
MASKED = logged(SHARE, "actor/pg_clipfrac")
STEP_SECONDS = logged("timing_s/step", "perf/time_per_step")
NO_REGION = "no metrics of the trust region"
Items = list[Panel | Missing]


def effective_budget(values: dict[str, float]) -> float | None:
    """The logged effective budget, which is zero if there is no budget."""
    return values.get("trust_region/effective_delta_b") or None


@dataclass(frozen=True)
class Section:
    """A section of the page."""

    id: str
    title: str
    items: Sequence[Panel | Missing]

    @property
    def panels(self) -> list[Panel]:
        return [item for item in self.items if isinstance(item, Panel)]

    @property
    def missing(self) -> dict[str, list[str]]:
        """{reason: titles of the figures that are missing for it}."""
        result = defaultdict(list)
        for item in self.items:
            if isinstance(item, Missing):
                result[item.reason].append(item.title)
        return dict(result)


Tokenizers = Callable[[str | None], PreTrainedTokenizerBase | None]
"""Loads the tokenizer that a dump names; None if it cannot be loaded."""


def sections(runs: Sequence[ReportedRun], lines: Sequence[Line], tokenizers: Tokenizers) -> list[Section]:
    return [
        Section("scores", "Scores", _scores(runs, lines)),
        Section("policies", "Rollout and trainer", _policies(lines)),
        Section("masks", "What the trust region takes away", _masks(lines)),
        Section("divergence", "How far the policy moves from the rollouts", _divergence(lines)),
        Section("responses", "Thresholds along single responses", _responses(runs, tokenizers)),
        Section("cost", "Time and memory", _cost(lines)),
    ]


def benchmarks_of(runs: Sequence[ReportedRun]) -> list[str]:
    """Everything that any run validated on."""
    return sorted({name for item in runs for values in item.run.accuracies().values() for name in values})


def _scores(runs: Sequence[ReportedRun], lines: Sequence[Line]) -> Items:
    benchmarks = benchmarks_of(runs)
    several = len(benchmarks) > 1
    items: Items = [validation(lines, benchmarks, "validation", "Validation accuracy, mean")] if several else []
    for number, benchmark in enumerate(benchmarks, start=1):
        name = f"validation_{number}" if several else "validation"
        items.append(validation(lines, [benchmark], name, f"Validation accuracy, {shown(benchmark)}"))
    items = items or [Missing("Validation accuracy", "no run validated")]
    for name, title, key in (
        ("reward", "Training reward", "critic/score/mean"),
        ("response_length", "Response length (tokens)", "response_length/mean"),
    ):
        items.append(curve(name, title, lines, logged(key), without=f"{key} is not logged"))
    return items


def _policies(lines: Sequence[Line]) -> Items:
    return [
        over_steps(
            "relative_error", "Relative log-probability error", lines, lambda d: d.relative_error, NO_DUMP, log=True
        ),
        curve(
            "probability_difference",
            "Probability difference, rollout and trainer",
            lines,
            logged("training/rollout_probs_diff_mean"),
            without="verl logs it only where it recomputes old log-probabilities",
        ),
        curve(
            "entropy",
            "Entropy (nats)",
            lines,
            logged("actor/entropy", "actor/entropy_loss"),
            without="logged with actor_rollout_ref.actor.calculate_entropy=true",
        ),
        over_steps("entropy_dumped", "Entropy estimate (nats)", lines, lambda d: d.entropy, NO_DUMP),
    ]


def _masks(lines: Sequence[Line]) -> Items:
    two = [line for line in lines if line.runs[0].has_two_constraints]
    by_token, by_budget = (product(SHARE, f"trust_region/{name}_rejected_share") for name in ("token", "budget"))
    no_share = f"neither {SHARE} nor actor/pg_clipfrac is logged"
    positive, negative = (logged(f"trust_region/{sign}/masked_share") for sign in ("positive", "negative"))
    return [
        curve("masked", "Masked share of tokens", lines, MASKED, without=no_share, percent=True),
        curve("masked_by_token", "Masked by the token threshold", two, by_token, without=NO_REGION, percent=True),
        curve("masked_by_budget", "Masked by the prefix budget", two, by_budget, without=NO_REGION, percent=True),
        curve("masked_positive", "Masked share, positive advantage", lines, positive, without=NO_REGION, percent=True),
        curve("masked_negative", "Masked share, negative advantage", lines, negative, without=NO_REGION, percent=True),
        curve("delta_b", "Effective budget δ_b", two, effective_budget, without="no prefix budget"),
    ]


def _divergence(lines: Sequence[Line]) -> Items:
    items: Items = []
    for when, title in (("first_update", "Mean D_t, first update"), ("later_updates", "Mean D_t, later updates")):
        key = f"trust_region/{when}/divergence"
        items.append(curve(f"divergence_{when}", title, lines, logged(key), without=f"{key} is not logged", log=True))
    return [*items, drift_by_position(lines), largest_by_position(lines)]


def _responses(runs: Sequence[ReportedRun], tokenizers: Tokenizers) -> Items:
    items: Items = []
    for number, item in enumerate(runs, start=1):
        if item.dumped is None or not item.dumped.chosen:
            why = NO_DUMP if item.dumped is None else "its method has no thresholds along a response"
            items.append(Missing(item.name, why))
            continue
        for chosen in item.dumped.chosen:
            response, tokenizer = chosen.response, tokenizers(chosen.header.get("tokenizer"))
            tokens = response.response[response.mask].tolist()
            known = token_text.texts(tokenizer, tokens)
            texts = [known[token] for token in tokens] if tokenizer else []
            items.append(response_panel(f"thresholds_{number}_{chosen.kind}", item.name, chosen, texts))
    return items


def _cost(lines: Sequence[Line]) -> Items:
    seconds = curve("time", "Seconds per step", lines, STEP_SECONDS, without="not logged")
    return [stacked_phases(lines), seconds, *memory(lines)]
