"""What a report says of runs: their summary, in which settings they differ, and the figures in their sections."""

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from cppo_verl.analysis.html.figures import Figure, plain
from cppo_verl.analysis.inspect import token_text
from cppo_verl.analysis.report.curves import (
    Absent,
    curve,
    drift_by_position,
    lines,
    logged,
    memory,
    product,
    series,
    stacked_phases,
    validation,
)
from cppo_verl.analysis.report.settings import ABSENT, differences, method, overrides, same_but_for_seeds, settings
from cppo_verl.analysis.report.token_figures import Dumped, largest_by_position, over_steps, reduced, threshold_picture
from cppo_verl.artifacts.run_reader import Run
from cppo_verl.artifacts.token_dump import read_tokens
from cppo_verl.evaluation.statistics import select

LAST = 10
"""Steps that the summary's reward is the mean of."""
NO_DUMP = "no dumped tokens, trust_region.dump.every=10 dumps some"
MASKED = logged("trust_region/masked_share", "actor/pg_clipfrac")
STEP_SECONDS = logged("timing_s/step", "perf/time_per_step")


def effective_budget(values: dict[str, float]) -> float | None:
    """What is logged as zero without a budget."""
    return values.get("trust_region/delta_b") or None


def shown(text: str) -> str:
    """Text from data as a page and a picture can hold it, whatever a file's name is made of."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


@dataclass
class Section:
    """Of the page."""

    id: str
    title: str
    text: str
    """How its figures are to be read."""
    items: list[Figure | Absent]
    """Figures, and what stands in the place of one."""

    @property
    def figures(self) -> list[Figure]:
        return [item for item in self.items if isinstance(item, Figure)]

    @property
    def absent(self) -> dict[str, list[str]]:
        """{reason: titles of the figures that are not there for it}."""
        result = defaultdict(list)
        for item in self.items:
            if isinstance(item, Absent):
                result[item.reason].append(item.title)
        return result


class Overview:
    def __init__(self, runs: Sequence[Run], notes: Sequence[str], tokenizer: str | None):
        """
        Args:
            notes: what was passed over before.
            tokenizer: a folder; None for the one that each dump names.
        """
        self.runs, self.tokenizer = runs, tokenizer
        self.names = [shown(name) for name in unique_names(runs)]
        self.settings = [settings(item) for item in runs]
        self.benchmarks = sorted({name for item in runs for values in item.accuracies().values() for name in values})
        self.lines = lines(self._groups())
        self._notes = list(notes)
        self._tokenizers = {}
        self.dumped = self._read_dumps()
        self.sections = [
            self._scores(),
            self._policies(),
            self._masks(),
            self._divergence(),
            self._responses(),
            self._cost(),
        ]
        self.summary = self._summary()

    @property
    def figures(self) -> list[Figure]:
        return [figure for section in self.sections for figure in section.figures]

    @property
    def notes(self) -> list[str]:
        of_runs = [f"{name}: {note}" for name, item in zip(self.names, self.runs, strict=True) for note in item.notes]
        return [shown(note) for note in [*self._notes, *of_runs]]

    @property
    def overrides(self) -> list[str]:
        """Of a single run."""
        return [shown(text) for text in overrides(self.runs[0])] if len(self.runs) == 1 else []

    @property
    def unknown_settings(self) -> list[str]:
        return [name for name, known in zip(self.names, self.settings, strict=True) if not known]

    def _groups(self) -> list[tuple[str, list[Run]]]:
        """(name, runs) of each line: runs of a label that differ in nothing but seeds are one."""
        groups = []
        for number, item in enumerate(self.runs):
            for members in groups:
                other = members[0]
                known = self.settings[other] and self.settings[number]
                if known and self.runs[other].label == item.label and same_but_for_seeds(known, self.settings[other]):
                    members.append(number)
                    break
            else:
                groups.append([number])
        of_label = Counter(self.runs[members[0]].label for members in groups)
        named = []
        for members in groups:
            label = self.runs[members[0]].label
            name = shown(label) if of_label[label] == 1 else self.names[members[0]]
            count = f" ({len(members)} runs)" if len(members) > 1 else ""
            named.append((name + count, [self.runs[number] for number in members]))
        return named

    def _read_dumps(self) -> dict[int, Dumped]:
        """{id of a run: what its dump says}, one run after the other: all at once could be more than the memory."""
        result = {}
        for name, item in zip(self.names, self.runs, strict=True):
            dump = None
            if item.path.is_dir():
                try:
                    dump = read_tokens(item.path)
                    item.notes += dump.notes
                except FileNotFoundError:
                    pass
            if dump is not None and dump.responses:
                result[id(item)] = reduced(dump)
            else:
                self._notes.append(f"{name}: {NO_DUMP}")
        return result

    def _has_two_constraints(self, run: Run) -> bool:
        """TRM and the prefix ratios reject tokens by other rules, under the same metrics."""
        flat = self.settings[self.runs.index(run)]
        return flat.get("actor_rollout_ref.actor.policy_loss.loss_mode", "cppo") == "cppo"

    def _thresholds(self) -> dict[int, dict]:
        """{id of a run: delta and w_min}, of those whose loss has them, whatever their budget."""
        result = {}
        for item, flat in zip(self.runs, self.settings, strict=True):
            loss = {
                key: flat.get(f"actor_rollout_ref.actor.policy_loss.{key}") for key in ("loss_mode", "delta", "w_min")
            }
            try:
                if loss["loss_mode"] == "cppo":
                    result[id(item)] = {key: float(loss[key]) for key in ("delta", "w_min")}
            except (TypeError, ValueError):
                continue
        return result

    def _scores(self) -> Section:
        several = len(self.benchmarks) > 1
        items = [validation(self.lines, self.benchmarks, "validation", "Validation accuracy, mean")] if several else []
        for number, benchmark in enumerate(self.benchmarks, start=1):
            name = f"validation_{number}" if several else "validation"
            title = plain(f"Validation accuracy, {shown(benchmark)}")
            items.append(validation(self.lines, [benchmark], name, title))
        items = items or [Absent("Validation accuracy", "no run validated")]
        for name, title, caption, key in (
            ("reward", "Training reward", "Mean score of the responses that a step trains on.", "critic/score/mean"),
            (
                "response_length",
                "Response length (tokens)",
                "Mean over a step's responses. A jump or a collapse often comes before one of the reward.",
                "response_length/mean",
            ),
        ):
            items.append(curve(name, title, caption, self.lines, logged(key), without=f"{key} is not logged"))
        text = "How good the policy gets, on problems it does not train on and on those it does."
        return Section("scores", "Scores", text, items)

    def _policies(self) -> Section:
        error = over_steps(
            "relative_error",
            "Relative log-probability error",
            "|log π − log μ| between trainer and rollout engine over |log μ|, both summed over the dumped tokens of a "
            "batch's first update, when the trainer has not yet changed π.",
            self.lines,
            {key: dumped.relative_error for key, dumped in self.dumped.items()},
            NO_DUMP,
            log=True,
        )
        difference = curve(
            "probability_difference",
            "Probability difference, rollout and trainer",
            "Mean of verl's |π − μ| with both engines' probabilities of the same policy.",
            self.lines,
            logged("training/rollout_probs_diff_mean"),
            without="verl logs it only where it recomputes old log-probabilities",
        )
        entropy = curve(
            "entropy",
            "Entropy (nats)",
            "Of the policy, a token. Towards zero it stops exploring.",
            self.lines,
            logged("actor/entropy", "actor/entropy_loss"),
            without="logged with actor_rollout_ref.actor.calculate_entropy=true",
        )
        estimate = over_steps(
            "entropy_dumped",
            "Entropy estimate (nats)",
            "Mean of −log μ over the dumped tokens: an estimate of the rollout policy's entropy a token, noisy "
            "with few tokens.",
            self.lines,
            {key: dumped.entropy for key, dumped in self.dumped.items()},
            NO_DUMP,
        )
        text = (
            "Two engines compute the same policy's probabilities; what they differ by looks like a policy update that "
            "nobody made."
        )
        return Section("policies", "Rollout and trainer", text, [error, difference, entropy, estimate])

    def _masks(self) -> Section:
        two_constraints = [line for line in self.lines if self._has_two_constraints(line.runs[0])]
        share, budget = "trust_region/masked_share", "trust_region/budget_rejected_share"
        no_region = "no metrics of the trust region"
        items = [
            curve(name, title, caption, drawn, metric, without=without, percent=True)
            for name, title, caption, drawn, metric, without in (
                (
                    "masked",
                    "Masked share of tokens",
                    "Tokens of a step whose gradient is taken away; of verl's own losses, those that are clipped.",
                    self.lines,
                    MASKED,
                    f"neither {share} nor actor/pg_clipfrac is logged",
                ),
                (
                    "masked_by_token",
                    "Masked by the token threshold",
                    "Share of all tokens: w_t D_t is above δ, and the update moves away from the rollout policy.",
                    two_constraints,
                    product(share, "trust_region/token_rejected_share"),
                    no_region,
                ),
                (
                    "masked_by_budget",
                    "Masked by the prefix budget",
                    "Share of all tokens: δ alone would have let them pass, but what came before them in the response "
                    "had used the budget up.",
                    two_constraints,
                    product(share, budget),
                    no_region,
                ),
                (
                    "masked_positive",
                    "Masked share, positive advantage",
                    "Of the tokens of responses better than their group: how many are kept from growing likelier.",
                    self.lines,
                    logged("trust_region/positive/masked_share"),
                    no_region,
                ),
                (
                    "masked_negative",
                    "Masked share, negative advantage",
                    "Of the tokens of worse ones: how many are kept from growing less likely.",
                    self.lines,
                    logged("trust_region/negative/masked_share"),
                    no_region,
                ),
            )
        ]
        caption = "Prefix-average threshold in force, mean over responses; an adaptive one follows their D_t."
        items.append(
            curve(
                "delta_b",
                "Effective budget δ_b",
                caption,
                two_constraints,
                effective_budget,
                without="no prefix budget",
            )
        )
        text = "Masked share: tokens whose gradient the trust region took away."
        return Section("masks", "What the trust region takes away", text, items)

    def _divergence(self) -> Section:
        items = []
        for when, title, caption in (
            (
                "first_update",
                "Mean D_t, first update",
                "The engines' mismatch (in asynchronous training, staleness too).",
            ),
            ("later_updates", "Mean D_t, later updates", "Drift since the rollout, and the mismatch in it."),
        ):
            key = f"trust_region/{when}/divergence"
            without = f"{key} is not logged"
            items.append(
                curve(f"divergence_{when}", title, caption, self.lines, logged(key), without=without, log=True)
            )
        thresholds = self._thresholds()
        by_position = {key: dumped.by_position for key, dumped in self.dumped.items()}
        items.append(drift_by_position(self.lines, by_position, thresholds))
        items.append(largest_by_position(self.lines, by_position, thresholds))
        text = (
            "D_t: distance between rollout and current policy at a token. At a batch's first update it is the engines' "
            "mismatch, later the policy's drift."
        )
        return Section("divergence", "How far the policy moves from the rollouts", text, items)

    def _responses(self) -> Section:
        items = []
        for number, (name, item) in enumerate(zip(self.names, self.runs, strict=True), start=1):
            dumped = self.dumped.get(id(item))
            if dumped is None or not dumped.chosen:
                why = NO_DUMP if dumped is None else "its method has no thresholds along a response"
                items.append(Absent(name, why))
                continue
            for kind, response, header in dumped.chosen:
                tokenizer = self._load(self.tokenizer or header.get("tokenizer"))
                tokens = response.response[response.mask].tolist()
                texts = [token_text.texts(tokenizer, [token])[token] for token in tokens] if tokenizer else []
                items.append(threshold_picture(f"thresholds_{number}_{kind}", name, kind, response, header, texts))
        text = (
            "Each bar is a token's w_t D_t. Above the dashed line it is over the token threshold, above the green one "
            "over what the prefix before it leaves; either masks it (marked at the top), unless its update moves it "
            "back towards the rollout policy. Of each run's dump: the response with most tokens masked by the budget, "
            "the one with most by the token threshold, and one without."
        )
        return Section("responses", "Thresholds along single responses", text, items)

    def _cost(self) -> Section:
        seconds = curve("time", "Seconds a step", "Without validation.", self.lines, STEP_SECONDS, without="not logged")
        items = [stacked_phases(self.lines), seconds, *memory(self.lines)]
        return Section("cost", "Time and memory", "Where the seconds and the gigabytes go.", items)

    def _load(self, path: str | None):
        """The tokenizer at ``path``, or None, which is noted."""
        if path not in self._tokenizers:
            self._tokenizers[path], why = None, "the dump names none"
            try:
                if isinstance(path, str):
                    self._tokenizers[path] = token_text.load(path)
            except ValueError as error:
                why = f"{path}: {error}"
            if self._tokenizers[path] is None:
                self._notes.append(f"no tokenizer ({why}), tokens are shown without text: give --tokenizer FOLDER")
        return self._tokenizers[path]

    def _summary(self) -> tuple[list[str], list[list[str]]]:
        header = [
            "run", "method", "seed", "steps", "best", "at step", "last", "smoothed", f"reward, last {LAST}",
            "masked", "of it by budget", "δ_b", "time a step", "total",
        ]  # fmt: skip
        rows = []
        for name, item in zip(self.names, self.runs, strict=True):
            last_step = max((step for step in item.steps), default=0)
            steps = f"{last_step} of {item.t_stop}" if item.t_stop else str(last_step)
            score = select(item.accuracies(), self.benchmarks, item.t_stop) if self.benchmarks else None
            reward = series(item, logged("critic/score/mean"))[1][-LAST:]
            masked = series(item, MASKED)[1]
            split = self._has_two_constraints(item)
            budget = by_budget_share(item) if split else None
            delta_b = series(item, effective_budget)[1]
            time = series(item, STEP_SECONDS)[1]
            total = math.fsum(time) + math.fsum(series(item, logged("timing_s/testing"))[1])
            rows.append(
                [
                    name,
                    shown(method(item)),
                    ABSENT if item.seed is None else shown(str(item.seed)),
                    steps,
                    *(
                        (percent(score.mean), str(score.step), percent(score.last), percent(score.smoothed))
                        if score
                        else (ABSENT,) * 4
                    ),
                    f"{fmean(reward):.3f}" if reward else ABSENT,
                    percent(fmean(masked)) if masked else ABSENT,
                    ABSENT if budget is None else percent(budget),
                    f"{fmean(delta_b):.3g}" if delta_b else ABSENT,
                    duration(median(time)) if time else ABSENT,
                    duration(total) if time else ABSENT,
                ]
            )
        return header, rows

    @property
    def differences(self) -> tuple[list[str], list[list[str]]] | None:
        """Header and rows; None with fewer than two known configs."""
        known = [(name, flat) for name, flat in zip(self.names, self.settings, strict=True) if flat]
        if len(known) < 2:
            return None
        rows = [[key, *values] for key, values in differences([flat for _, flat in known]).items()]
        return ["setting", *(name for name, _ in known)], [[shown(cell) for cell in row] for row in rows]


def unique_names(runs: Sequence[Run]) -> list[str]:
    """Labels; those of several runs with their folder's name, or its path where that is not enough."""
    folders = [run.path if run.path.is_dir() else run.path.parent for run in runs]
    names = [run.label for run in runs]
    for further in ([folder.resolve().name for folder in folders], [run.path for run in runs]):
        count = Counter(names)
        names = [
            f"{run.label} ({what})" if count[name] > 1 else name
            for run, name, what in zip(runs, names, further, strict=True)
        ]
    return names


def by_budget_share(run: Run) -> float | None:
    """Of all tokens that the run has masked, those that the budget rejected; None where nothing was masked."""
    masked = math.fsum(series(run, logged("trust_region/masked_share"))[1])
    rejected = series(run, product("trust_region/masked_share", "trust_region/budget_rejected_share"))[1]
    return math.fsum(rejected) / masked if masked > 0 else None


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
