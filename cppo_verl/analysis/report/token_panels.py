"""Panels of single responses from the token dumps of the runs."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from cppo_verl.analysis.html.page import caption
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
    assert delta is not None
    columns = {"weighted": response.weighted_divergence, "threshold": response.threshold, "reason": response.reason}
    tokens = pd.DataFrame({"t": response.position, **columns})[response.mask]
    drawn, excerpt = _drawn(tokens), "".join(texts)
    lowest, highest = drawn["threshold"].min(), drawn["weighted"].max()
    text = caption(
        "tokens_of_response",
        response=response,
        advantage=response.advantage[response.mask][0],
        tokens=len(tokens),
        by_budget=(tokens["reason"] == CODE["budget"]).sum(),
        by_token=(tokens["reason"] == CODE["token"]).sum(),
        drawn=len(drawn),
        excerpt=excerpt[:EXCERPT] + ("…" if len(excerpt) > EXCERPT else ""),
        highest=highest if highest > 4 * delta else None,
        lowest=lowest if lowest < -2 * delta else None,
    )
    title = f"{run}: {KINDS[chosen.kind]}"
    return TokenPanel(name=name, title=title, text=text, delta=delta, tokens=drawn, total=len(tokens), texts=texts)


def _drawn(tokens: pd.DataFrame) -> pd.DataFrame:
    """One token per stretch of the response: the one with the largest w_t D_t, of the masked ones if there are any."""
    stretch = np.arange(len(tokens)) * min(BARS, len(tokens)) // len(tokens)
    ranked = tokens.assign(stretch=stretch, masked=tokens["reason"].isin([CODE["budget"], CODE["token"]]))
    return ranked.sort_values(["masked", "weighted"]).groupby("stretch").tail(1).sort_values("t")
