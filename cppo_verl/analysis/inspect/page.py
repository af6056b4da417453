"""What the page of `inspect` shows: tables over all responses, and the tokens of some of them."""

import base64
import json
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import pandas as pd

from cppo_verl.analysis.inspect import token_text
from cppo_verl.analysis.inspect.methods import Method
from cppo_verl.analysis.inspect.tables import Masks, tables
from cppo_verl.analysis.text import counted
from cppo_verl.artifacts.token_dump import DECISION_COLUMNS, REASONS, REJECTING, Decisions, Response, TokenDump

MEGABYTES = 10
"""Most that the responses may take in a page; of longer responses there are fewer."""
_SIGNS = {(1.0,): "> 0", (-1.0,): "< 0", (0.0,): "= 0"}
_ARRAYS = tuple(name for name in DECISION_COLUMNS if name != "reason")


def page_values(dump: TokenDump, methods: Sequence[Method], limit: int, tokenizer_path: str | None) -> dict:
    """The values of the page's template; ``data`` is for its script. Adds to the dump's notes.

    Args:
        limit: most responses to show token by token.
    """
    responses = dump.responses
    rows = most_masked(responses, methods[0].decide(responses), limit)
    kept: dict[int, list[Decisions]] = {row: [] for row in rows}

    def decided(method: Method) -> Iterator[Decisions]:
        for row, decision in enumerate(method.decide(responses)):
            if row in kept:
                kept[row].append(decision)
            yield decision

    masks = Masks.of(responses, map(decided, methods))
    shown: list[dict] = []
    size = 0
    for row in rows:
        response = responses[row]
        packed = _packed(response, kept[row], [method.delta(response) for method in methods])
        size += len(json.dumps(packed))
        if shown and size > MEGABYTES * 1e6:
            dump.notes.append(
                f"{len(shown)} responses fill the page's {MEGABYTES} MB; fewer methods (--method) make room for more"
            )
            break
        shown.append(packed)
    data = {
        "methods": [method.label for method in methods],
        "reasons": list(REASONS),
        "columns": _ARRAYS,
        **_texts(dump, shown, tokenizer_path),
        "responses": shown,
    }
    steps, updates = sorted(dump.headers), masks.groups["update"].nunique()
    return {
        "dump": str(dump.path),
        "summary": (
            f"{counted(len(masks.rejected), 'generated token')} of {counted(len(responses), 'response')}, "
            f"step{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}, {counted(updates, 'update')} per step; "
            f"D_t in the dump is {dump.header['divergence']}"
        ),
        "number": len(responses),
        "methods": len(methods),
        "tables": tables(methods, masks),
        "notes": dump.notes,
        "data": data,
    }


def most_masked(responses: Sequence[Response], decisions: Iterable[Decisions], limit: int) -> list[int]:
    """Rows of the responses to show: from every step and update in turn, those with the largest masked share first."""
    rows = [
        (response.step, response.update, decided.rejected[response.mask].mean(), response.divergence.max())
        for response, decided in zip(responses, decisions, strict=True)
    ]
    ranked = pd.DataFrame(rows, columns=["step", "update", "share", "largest"])
    ranked = ranked.sort_values(["share", "largest"], ascending=False)
    place = ranked.groupby(["step", "update"]).cumcount()
    return place.sort_values(kind="stable").index[:limit].tolist()


def _packed(response: Response, decisions: Sequence[Decisions], deltas: Sequence[float | None]) -> dict:
    """A response for the page's script.

    Arrays of numbers are stored once in ``arrays`` and referred to by their place in it: as one number if all
    generated tokens have the same finite value, otherwise as base64 of little-endian fp32.
    """
    arrays: list[float | str] = []

    def put(values: np.ndarray | None) -> int | None:
        if values is None:
            return None
        values = values.astype("<f4")
        valid = values[response.mask]
        content = (
            float(valid[0])
            if (valid == valid[0]).all() and np.isfinite(valid[0])
            else base64.b64encode(values.tobytes()).decode()
        )
        if content not in arrays:
            arrays.append(content)
        return arrays.index(content)

    def of_method(decided: Decisions, delta: float | None) -> dict:
        columns = {name: getattr(decided, name) for name in _ARRAYS}
        if decided.divergence is None:
            columns["divergence"] = response.divergence
        if (decided.rejected == decided.has_reason(*REJECTING))[response.mask].all():
            columns["update_mask"] = None  # the reasons tell it
        return {
            "share": float(decided.rejected[response.mask].mean()),
            "reason": "".join(map(str, np.asarray(decided.reason))),
            # JSON knows no infinity, and a threshold that bounds nothing is none.
            "delta": None if delta is None or np.isinf(delta) else delta,
            "delta_b": None if decided.delta_b is None or np.isinf(decided.delta_b) else decided.delta_b,
        } | {name: put(values) for name, values in columns.items()}

    return {
        **{name: getattr(response, name) for name in ("step", "update", "key", "score")},
        **{name: put(getattr(response, name)) for name in ("log_mu", "log_pi", "advantage")},
        "sign": _SIGNS.get(tuple(np.unique(np.sign(response.advantage[response.mask]))), "of both signs"),
        "prompt": response.prompt.tolist(),
        "ids": response.response.tolist(),
        "mask": None if response.mask.all() else "".join("01"[int(m)] for m in response.mask),
        "decisions": [of_method(*pair) for pair in zip(decisions, deltas, strict=True)],
        "arrays": arrays,
    }


def _texts(dump: TokenDump, shown: Sequence[dict], tokenizer_path: str | None) -> dict:
    """``texts``, {token id: text to show}, and ``special``, the ids of special tokens, of the tokens in the page."""
    tokenizer = token_text.of_dump(dump.header, tokenizer_path, dump.notes)
    ids = {token for response in shown for token in [*response["prompt"], *response["ids"]]}
    special = ids.intersection(tokenizer.all_special_ids) if tokenizer else ()
    return {"texts": token_text.texts(tokenizer, sorted(ids)), "special": sorted(special)}
