"""A task whose answers have a length that is set: continue y_t = (y_{t-1} + y_{t-4}) mod 10 for T digits.

The prompt is the first four digits. An answer is right if every digit follows the rule. Each digit decides about those
after it, so an early error makes the rest another sequence.
"""

from typing import Any

import torch
from torch import Tensor

ORDER = 4
"""Number of digits in a prompt: the rule adds the last digit and the one so many places back."""
VOCABULARY = (*"0123456789", "<pad>", "<eos>", "<unk>")
"""Token ids are places in this tuple, so that a digit's id is the digit."""


def prompts(count: int, generator: torch.Generator) -> Tensor:
    """Return token ids of random prompts, [count, 4]."""
    return torch.randint(10, (count, ORDER), generator=generator)


def answers(prompts: Tensor, length: int) -> Tensor:
    """Return the right answers [..., length] to prompts [..., 4]."""
    digits = list(prompts.unbind(-1))
    for _ in range(length):
        digits.append((digits[-1] + digits[-ORDER]) % 10)
    return torch.stack(digits[ORDER:], -1)


def demonstrations(count: int, length: int, noise: float, generator: torch.Generator) -> Tensor:
    """Return prompts with answers, [count, 4 + length], in which each digit is random with probability ``noise``.

    The digits after a wrong one follow the rule again.
    """
    digits = list(prompts(count, generator).unbind(-1))
    wrong = torch.rand(length, count, generator=generator) < noise
    random = torch.randint(10, (length, count), generator=generator)
    for t in range(length):
        digits.append(torch.where(wrong[t], random[t], (digits[-1] + digits[-ORDER]) % 10))
    return torch.stack(digits, -1)


def rewards(prompts: Tensor, responses: Tensor) -> Tensor:
    """Return 1 for a right answer and 0 for a wrong one, [...], for prompts [..., 4] and responses [..., T]."""
    return (responses == answers(prompts, responses.shape[-1])).all(-1).float()


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """The same reward, as verl's trainer asks for it: of the decoded response and the right answer."""
    return float(solution_str == ground_truth)
