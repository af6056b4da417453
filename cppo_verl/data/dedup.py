"""Repeated prompts within a file, and training problems that are validation problems.

Two prompts are equal if they agree after `normalise`. A reworded problem counts as another one.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any


def normalise(text: str) -> str:
    """Return ``text`` in Unicode NFC, without byte order marks, with every run of white space as one blank."""
    return " ".join(unicodedata.normalize("NFC", text.replace("\ufeff", "")).split())


def text_of(messages: Iterable[dict]) -> str:
    """Return the contents of a prompt's messages, one paragraph each."""
    return "\n\n".join(message["content"] for message in messages)


def deduplicate(rows: Iterable[dict]) -> tuple[list[dict], dict[str, Any]]:
    """Return the first row of each prompt that has a single answer, and the counts.

    A prompt that comes with more than one answer is dropped: no reward for it can be right. A few are known in the
    public DAPO-Math-17k. The counts are ``{"read", "duplicates", "conflicting", "deduplicated"}``, where read =
    duplicates + len(conflicting) + deduplicated and ``conflicting`` lists the dropped prompts with their answers.
    """
    first: dict[str, dict] = {}
    answers: dict[str, dict[str, None]] = {}
    read = 0
    for row in rows:
        read += 1
        prompt = normalise(text_of(row["prompt"]))
        first.setdefault(prompt, row)
        answers.setdefault(prompt, {})[row["reward_model"]["ground_truth"]] = None
    kept = [row for prompt, row in first.items() if len(answers[prompt]) == 1]
    conflicting = [{"prompt": p, "answers": list(found)} for p, found in answers.items() if len(found) > 1]
    duplicates = read - len(first)
    return kept, {"read": read, "duplicates": duplicates, "conflicting": conflicting, "deduplicated": len(kept)}


def contaminated(train: Sequence[str], held_out: Iterable[Sequence[str]]) -> list[bool]:
    """Return which of the prompts ``train`` pose a problem that a prompt in one of the files ``held_out`` poses."""
    known = {problem for prompts in held_out for problem in problems(prompts)}
    return [problem in known for problem in problems(train)]


def problems(prompts: Sequence[str]) -> list[str]:
    """Return the normalised problem in each prompt of one file, without the instructions around it.

    Files word their instructions differently, so whole prompts of two files are hardly ever equal. The first and the
    last paragraph count as instructions if more than half of the file's distinct prompts share them.
    """
    split = [[normalise(p) for p in re.split(r"\n\s*\n", prompt) if p.strip()] for prompt in prompts]
    distinct = {tuple(paragraphs) for paragraphs in split}
    for end in (0, -1):
        counts = Counter(paragraphs[end] for paragraphs in distinct)
        for paragraphs in split:
            if len(paragraphs) > 1 and 2 * counts[paragraphs[end]] > len(distinct) > 1:
                paragraphs.pop(end)
    return [" ".join(paragraphs) for paragraphs in split]
