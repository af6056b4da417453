"""A report of runs, as the template takes it: which panels and tables it has; its texts stand in the templates."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from cppo_verl.analysis.inspect import token_text
from cppo_verl.analysis.report.config_differences import overrides
from cppo_verl.analysis.report.curves import (
    curve,
    drift_by_position,
    dumped,
    largest_by_position,
    logged,
    memory,
    product,
    stacked_phases,
    validation,
)
from cppo_verl.analysis.report.panels import Missing, Panel
from cppo_verl.analysis.report.runs import NO_DUMP, Line, ReportedRun, lines, reported, shown
from cppo_verl.analysis.report.summary import (
    MASKED,
    SHARE,
    STEP_SECONDS,
    benchmarks_of,
    effective_budget,
    setting_differences,
    summary,
)
from cppo_verl.analysis.report.token_panels import response_panel
from cppo_verl.analysis.text import Table
from cppo_verl.artifacts.run_reader import Run

NO_REGION = "no metrics of the trust region"
Items = list[Panel | Missing]


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


@dataclass(frozen=True)
class Report:
    """Everything on the page, except that its figures are still to be drawn."""

    runs: Sequence[ReportedRun]
    sections: Sequence[Section]
    summary: Table
    differences: Table | None
    notes: Sequence[str]

    @property
    def names(self) -> list[str]:
        return [item.name for item in self.runs]

    @property
    def has_dumps(self) -> bool:
        return any(item.dumped for item in self.runs)

    @property
    def overrides(self) -> list[str]:
        """What the command of a single run set."""
        return [shown(text) for text in overrides(self.runs[0].run)] if len(self.runs) == 1 else []

    @property
    def unknown_settings(self) -> list[str]:
        return [item.name for item in self.runs if not item.settings]


def report(runs: Sequence[Run], notes: Sequence[str] = (), tokenizer: str | None = None) -> Report:
    """
    Args:
        notes: what was skipped before.
        tokenizer: a folder; None for the tokenizer that each dump names.
    """
    items = reported(runs)
    drawn = lines(items)
    of_tokenizers: list[str] = []
    sections = [
        Section("scores", "Scores", _scores(items, drawn)),
        Section("policies", "Rollout and trainer", _policies(drawn)),
        Section("masks", "What the trust region takes away", _masks(drawn)),
        Section("divergence", "How far the policy moves from the rollouts", _divergence(drawn)),
        Section("responses", "Thresholds along single responses", _responses(items, tokenizer, of_tokenizers)),
        Section("cost", "Time and memory", _cost(drawn)),
    ]
    of_runs = [f"{item.name}: {note}" for item in items for note in item.notes]
    of_panels = [note for section in sections for panel in section.panels for note in panel.notes]
    said = tuple(shown(note) for note in dict.fromkeys([*notes, *of_runs, *of_panels, *of_tokenizers]))
    return Report(items, sections, summary(items), setting_differences(items), said)


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
        items.append(curve(name, title, lines, logged(key), f"{key} is not logged"))
    return items


def _policies(lines: Sequence[Line]) -> Items:
    difference, entropy = logged("training/rollout_probs_diff_mean"), logged("actor/entropy", "actor/entropy_loss")
    recomputed = "verl logs it only where it recomputes old log-probabilities"
    asked = "logged with actor_rollout_ref.actor.calculate_entropy=true"
    return [
        dumped("relative_error", "Relative log-probability error", lines, "relative_error", NO_DUMP, log=True),
        curve("probability_difference", "Probability difference, rollout and trainer", lines, difference, recomputed),
        curve("entropy", "Entropy (nats)", lines, entropy, asked),
        dumped("entropy_dumped", "Entropy estimate (nats)", lines, "entropy", NO_DUMP),
    ]


def _masks(lines: Sequence[Line]) -> Items:
    two = [line for line in lines if line.runs[0].has_two_constraints]
    no_share = f"neither {SHARE} nor actor/pg_clipfrac is logged"
    by_token, by_budget = (product(SHARE, f"trust_region/{name}_rejected_share") for name in ("token", "budget"))
    positive, negative = (logged(f"trust_region/{sign}/masked_share") for sign in ("positive", "negative"))
    return [
        *(
            curve(name, title, chosen, metric, without, percent=True)
            for name, title, chosen, metric, without in (
                ("masked", "Masked share of tokens", lines, MASKED, no_share),
                ("masked_by_token", "Masked by the token threshold", two, by_token, NO_REGION),
                ("masked_by_budget", "Masked by the prefix budget", two, by_budget, NO_REGION),
                ("masked_positive", "Masked share, positive advantage", lines, positive, NO_REGION),
                ("masked_negative", "Masked share, negative advantage", lines, negative, NO_REGION),
            )
        ),
        curve("delta_b", "Effective budget δ_b", two, effective_budget, "no prefix budget"),
    ]


def _divergence(lines: Sequence[Line]) -> Items:
    items: Items = []
    for when, title in (("first_update", "Mean D_t, first update"), ("later_updates", "Mean D_t, later updates")):
        key = f"trust_region/{when}/divergence"
        items.append(curve(f"divergence_{when}", title, lines, logged(key), f"{key} is not logged", log=True))
    return [*items, drift_by_position(lines), largest_by_position(lines)]


def _responses(runs: Sequence[ReportedRun], tokenizer_path: str | None, notes: list[str]) -> Items:
    items: Items = []
    for number, item in enumerate(runs, start=1):
        if item.dumped is None or not item.dumped.chosen:
            why = NO_DUMP if item.dumped is None else "its method has no thresholds along a response"
            items.append(Missing(item.name, why))
            continue
        for chosen in item.dumped.chosen:
            response, tokenizer = chosen.response, token_text.of_dump(chosen.header, tokenizer_path, notes)
            tokens = response.response[response.mask].tolist()
            known = token_text.texts(tokenizer, tokens)
            texts = [known[token] for token in tokens] if tokenizer else []
            items.append(response_panel(f"thresholds_{number}_{chosen.kind}", item.name, chosen, texts))
    return items


def _cost(lines: Sequence[Line]) -> Items:
    return [stacked_phases(lines), curve("time", "Seconds per step", lines, STEP_SECONDS, "not logged"), *memory(lines)]
