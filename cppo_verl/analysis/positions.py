"""Positions in a response, in `POSITION_BINS` bins of equal width."""

import numpy as np

from cppo_verl.artifacts.token_dump import Response
from cppo_verl.core.metrics import POSITION_BINS

BIN_CENTRES = [(b + 0.5) / POSITION_BINS for b in range(POSITION_BINS)]
"""As t / T."""


def position_bins(response: Response) -> np.ndarray:
    """The bin of each generated token: b such that b T < POSITION_BINS t <= (b + 1) T, as in the logged metrics."""
    position = response.position[response.mask]
    return (position * POSITION_BINS - 1) // len(position)
