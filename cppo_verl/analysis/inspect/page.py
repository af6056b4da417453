"""What the page of `cppo_verl.analysis.inspect.command` holds: tables over all responses, and the tokens of some."""

import base64
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from cppo_verl.analysis import replay
from cppo_verl.analysis.inspect import token_text
from cppo_verl.analysis.inspect.masks import REJECTING, Masks, rejected
from cppo_verl.analysis.replay import Setting, Verdict
from cppo_verl.artifacts.token_dump import REASONS, Response, read_tokens
from cppo_verl.core.metrics import POSITION_BINS
from cppo_verl.plugin.config import CPPOLossConfig, TRMLossConfig

RUN = "run"
"""The run's own setting, among methods."""
MEGABYTES = 10
"""Of the responses in a page; longer ones are fewer."""
_READ = ("method", "divergence", "clip_ratio_low", "clip_ratio_high", "trust_region", "max_response_length")
_SIGNS = {(1.0,): "> 0", (-1.0,): "< 0", (0.0,): "= 0"}
_KEPT = [REASONS.index("kept"), REASONS.index("towards_one")]


@dataclass
class Look:
    """A dump, without what cannot be judged."""

    path: Path
    responses: list[Response]
    headers: dict[int, dict]
    """{step: header}."""
    notes: list[str]

    @property
    def header(self) -> dict:
        """The last step's, at whose thresholds methods are judged."""
        return self.headers[max(self.headers)]


def read(path: Path, steps: Sequence[int] | None = None) -> Look:
    """What can be judged of the dump at ``path``, or of some steps of it.

    Raises:
        FileNotFoundError: no dump there.
        ValueError: nothing in it is readable, or it lacks one of ``steps``.
    """
    dump = read_tokens(path)
    notes, headers = dump.notes, dict(dump.headers)
    for step, header in dump.headers.items():
        missing = [key for key in _READ if key not in header]
        missing += [key for key in ("method", "trust_region") if not isinstance(header.get(key, {}), dict)]
        if missing:
            notes.append(f"step {step}: its header lacks {', '.join(missing)}, skipped")
            del headers[step]
    responses = [r for r in dump.responses if r.step in headers]
    written = [r for r in responses if r.mask.any()]
    if len(written) < len(responses):
        notes.append(f"{len(responses) - len(written)} response(s) without a generated token were skipped")
    if not written:
        raise ValueError("\n".join([*notes, f"no response in {path} is readable"]))
    have = sorted({r.step for r in written})
    for step in steps or ():
        if step not in have:
            raise ValueError(f"no step {step} in {path}: it has {', '.join(map(str, have))}")
    written = [r for r in written if r.step in (steps or have)]
    headers = {step: headers[step] for step in (steps or have)}
    return Look(path, written, headers, notes)


# --- settings -------------------------------------------------------------------------------------------------


@dataclass
class Judged:
    """A setting and how to come by its verdicts."""

    label: str
    about: str
    """Kind of D_t and thresholds."""
    delta: Callable[[Response], float | None]
    """Token-level threshold; None for a rule without one."""
    verdicts: Callable[[list[Response]], list[Verdict]]


def settings(look: Look, methods: list[str] | None) -> list[Judged]:
    """The settings asked for, or all; what the dump cannot judge is noted.

    Raises:
        ValueError: no such method, or overrides that its config refuses.
    """
    asked = [RUN, *replay.METHODS] if methods is None else list(dict.fromkeys(methods))
    composed = [replay.setting(text, look.header) for text in asked if text != RUN]
    found, lacking, own = [], defaultdict(list), None
    if RUN in asked:
        own = _same_thresholds(look)
        try:
            found.append(_the_runs(look, composed if methods is None else []))
        except ValueError as error:
            look.notes.append(str(error))
    for setting in composed:
        if methods is None and found and own is not None and _equal(setting, own):
            continue  # the run's own, under its shipped name
        if not all(replay.can_judge(setting, header) for header in look.headers.values()):
            lacking[setting.divergence].append(setting.label)
            continue
        found.append(_judged(setting))
    has = "/".join(sorted({header["divergence"] for header in look.headers.values()}))
    for divergence, labels in lacking.items():
        binary = divergence.replace("topk", "binary")
        look.notes.append(
            f"{', '.join(labels)}: D_t is {divergence}, the dump has {has}, and log-probabilities do not make it; a "
            f"run with divergence={divergence} records it, --method '{labels[0]} divergence={binary}' judges by what "
            "is here"
        )
    return found


def _judged(setting: Setting) -> Judged:
    delta = getattr(setting.actor.policy_loss, "delta", None)
    return Judged(
        setting.label,
        _about(setting),
        lambda response: delta,
        lambda responses: list(replay.judge(setting, responses)),
    )


def _the_runs(look: Look, shipped: list[Setting]) -> Judged:
    """What the dump has recorded; of verl's own losses, which say nothing, what they do."""
    runs = {}
    for step, header in look.headers.items():
        try:
            runs[step] = replay.run_setting(header)
        except (HydraException, OmegaConfBaseException, ValueError, TypeError, KeyError, AttributeError) as error:
            line = str(error).splitlines()[0]
            raise ValueError(f"the run's own setting: not readable from the header of step {step} ({line})") from error

    names = dict.fromkeys(s.label for setting in runs.values() for s in shipped if _equal(s, setting))

    def verdicts(responses: list[Response]) -> list[Verdict]:
        by_step = defaultdict(list)
        for response in responses:
            by_step[response.step].append(response)
        judged = {}
        for step, part in by_step.items():
            recorded = all(r.reason is not None and r.update_mask is not None for r in part)
            of_step = map(_recorded, part) if recorded else replay.judge(runs[step], part)
            judged |= {id(r): v for r, v in zip(part, of_step, strict=True)}
        return [judged[id(response)] for response in responses]

    return Judged(
        f"this run ({', then '.join(names)})" if names else "this run",
        "; then ".join(dict.fromkeys(map(_about, runs.values()))),
        lambda response: getattr(runs[response.step].actor.policy_loss, "delta", None),
        verdicts,
    )


def _recorded(response: Response) -> Verdict:
    return Verdict(
        update_mask=response.update_mask,
        reason=response.reason,
        divergence=response.divergence,
        weighted_divergence=response.weighted_divergence,
        threshold=response.threshold,
        delta_b=response.delta_b,
    )


def _same_thresholds(look: Look) -> Setting | None:
    """The run's setting where all steps have the same; else what differs is noted."""
    by_text = defaultdict(list)
    flat = {step: _flat({k: v for k, v in header.items() if k != "step"}) for step, header in look.headers.items()}
    for step, values in flat.items():
        by_text[json.dumps(values, sort_keys=True)].append(step)
    last = flat[max(flat)]
    for steps in by_text.values():
        values = flat[steps[0]]
        differs = [k for k in sorted(values.keys() | last.keys()) if values.get(k) != last.get(k)]
        if differs:
            changes = ", ".join(f"{k} {values.get(k)} instead of {last.get(k)}" for k in differs)
            look.notes.append(
                f"step {', '.join(map(str, steps))}: dumped under other settings than step {max(flat)} ({changes}); "
                "the run's own masks are those recorded, all methods are judged at the last step's thresholds"
            )
    try:
        return replay.run_setting(look.header) if len(by_text) == 1 else None
    except Exception:  # said by `_the_runs`
        return None


def _flat(value, prefix: str = "") -> dict:
    if not isinstance(value, dict):
        return {prefix.removesuffix("."): value}
    return {key: x for name, part in value.items() for key, x in _flat(part, f"{prefix}{name}.").items()}


def _equal(a: Setting, b: Setting) -> bool:
    return all(
        getattr(a.actor, name) == getattr(b.actor, name)
        for name in ("policy_loss", "clip_ratio_low", "clip_ratio_high")
    )


def _about(setting: Setting) -> str:
    loss = setting.actor.policy_loss
    if isinstance(loss, CPPOLossConfig):
        about = f"{loss.divergence}, delta {loss.delta:g}"
        about += "" if loss.budget == "none" else f", delta_b {loss.delta_b:g} {loss.budget}"
        about += f", w_min {loss.w_min:g}" if loss.w_min < 1 else ""
        return about + ("" if loss.gate == "hard" else f", {loss.gate} gate")
    if isinstance(loss, TRMLossConfig):
        thresholds = [f"{name} {getattr(loss, name):g}" for name in ("delta", "delta_avg") if getattr(loss, name)]
        return ", ".join([loss.divergence, *thresholds])
    return f"clips below {1 - setting.actor.clip_ratio_low:g} and above {1 + setting.actor.clip_ratio_high:g}"


# --- tables ---------------------------------------------------------------------------------------------------


@dataclass
class Table:
    name: str
    title: str
    caption: str
    header: list[str]
    rows: list[list[str | float | None]]
    """Numbers are shares; None has no tokens."""
    full: float = 1.0
    """The share that has the full colour."""
    digits: int = 1
    titles: list[str] = field(default_factory=list)
    """Of the header's cells, where these are too short to say it."""

    def text(self) -> list[list[str]]:
        def percent(cell):
            return cell if isinstance(cell, str) else "–" if cell is None else f"{100 * cell:.{self.digits}f}"

        return [[percent(cell) for cell in row] for row in self.rows]


def _tables(judged: list[Judged], masks: Masks) -> list[Table]:
    names = [f"{n} {setting.label}" for n, setting in enumerate(judged, start=1)]
    share, by_reason, overlap = masks.share(), masks.share_by_reason(), masks.overlap()
    by_sign, by_bin, by_update = (masks.share_within(x) for x in (masks.sign, masks.bin, masks.update))
    smooth = any(shares["kept"] > 5e-5 for shares in by_reason)
    reasons = [*REJECTING, *(["kept"] if smooth else [])]
    signs = [(f"A {sign} 0", value) for sign, value in ((">", 1), ("<", -1), ("=", 0)) if value in by_sign]
    first = Table(
        "share",
        "Masked share and why",
        "Per cent of all generated tokens. A smooth gate that leaves M_t of an update counts as 1 - M_t of a token. "
        "The reasons add up to the masked share: token is w_t D_t > delta, budget is c_t < w_t D_t <= delta, response "
        "a whole response dropped, clipped a clipped ratio"
        + (", inside what a smooth gate takes of tokens within their thresholds" if smooth else "")
        + ". Towards one: tokens that violate a threshold and are kept, as their update moves the ratio towards one. "
        "Last, the masked share of the tokens of each advantage sign.",
        ["setting", "masked", *("inside" if r == "kept" else r for r in reasons), "towards one"]
        + [name for name, _ in signs]
        + ["D_t and thresholds"],
        [
            [name, share[i], *(by_reason[i][r] for r in reasons), by_reason[i]["towards_one"]]
            + [by_sign[value][i] for _, value in signs]
            + [judged[i].about]
            for i, name in enumerate(names)
        ],
    )
    position = Table(
        "position",
        "By position in the response",
        "Masked share, in per cent, of the tokens in each eighth of their response, t / T from first to last.",
        ["setting", *(f"{i}/{POSITION_BINS}–{i + 1}/{POSITION_BINS}" for i in by_bin)],
        [[name, *(values[i] for values in by_bin.values())] for i, name in enumerate(names)],
    )
    update = Table(
        "update",
        "By update of the step",
        "Masked share, in per cent. At update 0 the policy is still the one that wrote the responses: what is masked "
        "there is the mismatch of the two engines (and staleness, if the trainer is asynchronous); what comes on top "
        "later is the policy's drift.",
        ["setting", *(f"update {u}" for u in by_update)],
        [[name, *(values[i] for values in by_update.values())] for i, name in enumerate(names)],
    )
    both = Table(
        "overlap",
        "Overlap",
        "Of the tokens that the row's setting masks, the per cent that the column's setting masks too; columns are "
        "numbered as the rows.",
        ["setting", *(str(n) for n in range(1, len(judged) + 1))],
        [[name, *overlap[i]] for i, name in enumerate(names)],
        digits=0,
        titles=["", *names],
    )
    for table in (first, position, update):
        table.full = max([cell for row in table.rows for cell in row if isinstance(cell, float)] + [1e-9])
    return [first, position, update, both]


# --- the tokens of some responses -----------------------------------------------------------------------------


def choose(responses: Sequence[Response], verdicts: Sequence[Verdict], limit: int) -> list[int]:
    """Rows of responses worth a look: of every step and update in turn, those with the largest masked share first."""

    def worth(row: int) -> tuple:
        response = responses[row]
        return rejected(verdicts[row])[response.mask].mean(), response.divergence.max()

    groups = defaultdict(list)
    for row, response in enumerate(responses):
        groups[response.step, response.update].append(row)
    ranked = [sorted(rows, key=worth, reverse=True) for rows in groups.values()]
    chosen = []
    for place in range(max(map(len, ranked))):
        chosen += sorted((rows[place] for rows in ranked if place < len(rows)), key=worth, reverse=True)
    return chosen[:limit]


def _packed(response: Response, verdicts: Sequence[Verdict], deltas: Sequence[float | None]) -> dict:
    """For the page's script. Arrays of numbers stand once in ``arrays``, each as one number where all generated tokens
    have the same, else as base64 of little-endian fp32."""
    arrays, places = [], {}

    def put(values: np.ndarray | None) -> int | None:
        if values is None:
            return None
        values = values.astype("<f4")
        valid = values[response.mask]
        content = float(valid[0]) if (valid == valid[0]).all() else base64.b64encode(values.tobytes()).decode()
        if content not in places:
            places[content] = len(arrays)
            arrays.append(content)
        return places[content]

    def of_verdict(verdict: Verdict, delta: float | None) -> dict:
        hard = np.isin(verdict.reason, _KEPT) == verdict.update_mask
        return {
            "share": float(rejected(verdict)[response.mask].mean()),
            "reason": "".join(map(str, verdict.reason.tolist())),
            "left": None if hard[response.mask].all() else put(verdict.update_mask),
            "divergence": put(response.divergence if verdict.divergence is None else verdict.divergence),
            "weighted": put(verdict.weighted_divergence),
            "threshold": put(verdict.threshold),
            "delta": delta,
            "delta_b": verdict.delta_b,
        }

    return {
        "step": response.step,
        "update": response.update,
        "key": response.key,
        "score": response.score,
        "sign": _SIGNS.get(tuple(np.unique(np.sign(response.advantage[response.mask]))), "of both signs"),
        "prompt": response.prompt.tolist(),
        "ids": response.response.tolist(),
        "mask": None if response.mask.all() else "".join("01"[int(m)] for m in response.mask),
        "log_mu": put(response.log_mu),
        "log_pi": put(response.log_pi),
        "advantage": put(response.advantage),
        "verdicts": [of_verdict(*pair) for pair in zip(verdicts, deltas, strict=True)],
        "arrays": arrays,
    }


def page_values(look: Look, judged: list[Judged], limit: int, tokenizer_path: str | None) -> dict:
    """What the template takes; ``data`` is for its script. Adds to the look's notes."""
    responses = look.responses
    verdicts = [setting.verdicts(responses) for setting in judged]
    masks = Masks.of(responses, verdicts)
    shown, size = [], 0
    for row in choose(responses, verdicts[0], limit):
        packed = _packed(
            responses[row], [of_setting[row] for of_setting in verdicts], [s.delta(responses[row]) for s in judged]
        )
        size += len(json.dumps(packed))
        if shown and size > MEGABYTES * 1e6:
            look.notes.append(
                f"{len(shown)} responses fill the page's {MEGABYTES} MB; fewer settings (--method) make room for more"
            )
            break
        shown.append(packed)
    data = {
        "settings": [setting.label for setting in judged],
        "reasons": list(REASONS),
        **_texts(look, shown, tokenizer_path),
        "responses": shown,
    }
    steps, updates = sorted(look.headers), len(np.unique(masks.update))
    return {
        "dump": str(look.path),
        "summary": (
            f"{masks.rejected.shape[1]} generated tokens of {len(responses)} responses, "
            f"{'step' if len(steps) == 1 else 'steps'} {', '.join(map(str, steps))}, "
            f"{updates} {'update' if updates == 1 else 'updates'} a step; "
            f"D_t in the dump is {look.header['divergence']}"
        ),
        "number": len(responses),
        "settings": len(judged),
        "tables": _tables(judged, masks),
        "notes": look.notes,
        "data": data,
    }


def _texts(look: Look, shown: list[dict], tokenizer_path: str | None) -> dict:
    """``texts``, {id: what to show}, and ``special``, ids, of the tokens in the page."""
    path, tokenizer = tokenizer_path or look.header.get("tokenizer"), None
    if path is None:
        look.notes.append("the dump names no tokenizer: tokens are shown as ids; give --tokenizer FOLDER")
    else:
        try:
            tokenizer = token_text.load(path)
        except ValueError as error:
            look.notes.append(
                f"no tokenizer at {path} ({error}): tokens are shown as ids; give --tokenizer FOLDER for their text"
            )
    ids = {token for response in shown for token in [*response["prompt"], *response["ids"]]}
    special = ids.intersection(tokenizer.all_special_ids) if tokenizer else ()
    return {"texts": token_text.texts(tokenizer, sorted(ids)), "special": sorted(special)}
