"""What the page of a report shows: which panels and tables; its texts stand in the templates."""

from collections.abc import Sequence

from cppo_verl.analysis.inspect import token_text
from cppo_verl.analysis.report import curves
from cppo_verl.analysis.report.config_differences import overrides
from cppo_verl.analysis.report.curves import SHARE, curve, dumped, logged, product
from cppo_verl.analysis.report.panels import Missing, Panel
from cppo_verl.analysis.report.runs import NO_DUMP, Line, ReportedRun, lines, reported, shown
from cppo_verl.analysis.report.summary import benchmarks_of, setting_differences, summary
from cppo_verl.analysis.report.token_panels import response_panel
from cppo_verl.artifacts.run_reader import Run

Items = list[Panel | Missing]
DUMPED: dict = {"smooth": False, "points": 60}


def page_values(runs: Sequence[Run], notes: Sequence[str] = (), tokenizer: str | None = None) -> dict:
    """The values of the page's template, but for the drawn figures.

    Args:
        notes: what was skipped before.
        tokenizer: a folder; None for the tokenizer that each dump names.
    """
    items = reported(runs)
    drawn = lines(items)
    of_panels: list[str] = []
    sections = {
        "scores": _scores(items, drawn, of_panels),
        "policies": _policies(drawn),
        "masks": _masks(drawn),
        "divergence": _divergence(drawn),
        "responses": _responses(items, tokenizer, of_panels),
        "cost": _cost(drawn),
    }
    of_runs = [f"{item.name}: {note}" for item in items for note in item.notes]
    return {
        "names": [item.name for item in items],
        "has_dumps": any(item.dumped for item in items),
        "summary": summary(items),
        "differences": setting_differences(items),
        # What the command of a single run set.
        "overrides": [shown(text) for text in overrides(runs[0])] if len(runs) == 1 else [],
        "unknown_settings": [item.name for item in items if not item.settings],
        "sections": sections,
        "notes": [shown(note) for note in dict.fromkeys([*notes, *of_runs, *of_panels])],
    }


def _scores(runs: Sequence[ReportedRun], lines: Sequence[Line], notes: list[str]) -> Items:
    benchmarks = benchmarks_of(runs)
    groups = [("mean", benchmarks)] if len(benchmarks) > 1 else []
    groups += [(shown(benchmark), [benchmark]) for benchmark in benchmarks]
    validations = [
        curves.validation(lines, group, f"validation_{n}" if n else "validation", f"Validation accuracy, {what}", notes)
        for n, (what, group) in enumerate(groups)
    ]
    return [
        *(validations or [Missing("Validation accuracy", "no run validated")]),
        curve("reward", "Training reward", lines, "critic/score/mean"),
        curve("response_length", "Response length (tokens)", lines, "response_length/mean"),
    ]


def _policies(lines: Sequence[Line]) -> Items:
    difference, entropy = logged("training/rollout_probs_diff_mean"), logged("actor/entropy", "actor/entropy_loss")
    recomputed = "verl logs it only where it recomputes old log-probabilities"
    asked = "logged with actor_rollout_ref.actor.calculate_entropy=true"
    return [
        curve(
            "relative_error",
            "Relative log-probability error",
            lines,
            curves.relative_error,
            NO_DUMP,
            **DUMPED,
            log=True,
        ),
        curve("probability_difference", "Probability difference, rollout and trainer", lines, difference, recomputed),
        curve("entropy", "Entropy (nats)", lines, entropy, asked),
        curve("entropy_dumped", "Entropy estimate (nats)", lines, dumped("entropy"), NO_DUMP, **DUMPED),
    ]


def _masks(lines: Sequence[Line]) -> Items:
    two = [line for line in lines if line.runs[0].has_two_constraints]
    no_share, no_region = f"neither {SHARE} nor actor/pg_clipfrac is logged", "no metrics of the trust region"
    by_token, by_budget = (product(SHARE, f"trust_region/{name}_rejected_share") for name in ("token", "budget"))
    of_masked = logged("trust_region/budget_rejected_share")
    positive, negative = (logged(f"trust_region/{sign}/masked_share") for sign in ("positive", "negative"))
    return [
        curve("masked", "Masked share of tokens", lines, curves.MASKED, no_share, percent=True),
        curve("masked_by_token", "Masked by the token threshold", two, by_token, no_region, percent=True),
        curve("masked_by_budget", "Masked by the prefix budget", two, by_budget, no_region, percent=True),
        curve("budget_share", "Budget's share of the masked tokens", two, of_masked, no_region, percent=True),
        curve("masked_positive", "Masked share, positive advantage", lines, positive, no_region, percent=True),
        curve("masked_negative", "Masked share, negative advantage", lines, negative, no_region, percent=True),
        curve("delta_b", "Effective budget δ_b", two, curves.effective_budget, "no prefix budget"),
    ]


def _divergence(lines: Sequence[Line]) -> Items:
    first, later = (f"trust_region/{when}/divergence" for when in ("first_update", "later_updates"))
    return [
        curve("divergence_first_update", "Mean D_t, first update", lines, first, log=True),
        curve("divergence_later_updates", "Mean D_t, later updates", lines, later, log=True),
        curves.drift_by_position(lines),
        curves.largest_by_position(lines),
        *curves.deviation_by_token(lines),
    ]


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
    time = curve("time", "Seconds per step", lines, curves.STEP_SECONDS, "not logged")
    return [curves.stacked_phases(lines), time, *curves.memory(lines)]
