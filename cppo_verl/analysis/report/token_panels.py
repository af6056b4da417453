"""Panels of single responses from the token dumps of the runs."""

from collections.abc import Sequence

import numpy as np

from cppo_verl.analysis.report.dump_summary import KINDS, ChosenResponse, token_threshold
from cppo_verl.analysis.report.panels import TokenPanel
from cppo_verl.artifacts.token_dump import CODE

BARS = 300
"""Most tokens drawn of one response."""
EXCERPT = 160
"""Characters of a response in its caption."""


def response_panel(name: str, run: str, chosen: ChosenResponse, texts: Sequence[str]) -> TokenPanel:
    """w_t D_t of each token of a response against the thresholds.

    Args:
        run: its name in the title.
        texts: the response's generated tokens as text; empty without a tokenizer.
    """
    response, delta = chosen.response, token_threshold(chosen.header)
    weighted, threshold, reason = response.weighted_divergence, response.threshold, response.reason
    assert delta is not None and weighted is not None and threshold is not None and reason is not None
    mask = response.mask
    weighted, threshold, reason = weighted[mask], threshold[mask], reason[mask]
    drawn = np.arange(len(weighted)) if len(weighted) <= BARS else _drawn(weighted, reason)
    lowest, highest = float(threshold[drawn].min()), float(weighted[drawn].max())
    excerpt = "".join(texts)
    facts = {
        "response": response,
        "advantage": float(response.advantage[mask][0]),
        "tokens": len(weighted),
        "by_budget": int((reason == CODE["budget"]).sum()),
        "by_token": int((reason == CODE["token"]).sum()),
        "drawn": len(drawn),
        "excerpt": excerpt[:EXCERPT] + ("…" if len(excerpt) > EXCERPT else ""),
        "highest": highest if highest > 4 * delta else None,
        "lowest": lowest if lowest < -2 * delta else None,
    }
    return TokenPanel(
        name=name,
        title=f"{run}: {KINDS[chosen.kind]}",
        caption="tokens_of_response",
        facts=facts,
        response=response,
        delta=delta,
        drawn=drawn,
        texts=texts,
    )


def _drawn(weighted: np.ndarray, reason: np.ndarray) -> np.ndarray:
    """One token per stretch of the response: the one with the largest w_t D_t, of the masked ones if there are any."""
    masked = np.isin(reason, (CODE["budget"], CODE["token"]))
    result = []
    for part in np.array_split(np.arange(len(weighted)), BARS):
        among = part[masked[part]] if masked[part].any() else part
        result.append(among[np.argmax(weighted[among])])
    return np.array(result)
