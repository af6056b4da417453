"""The position bins of the pages are those of the logged metrics."""

import numpy as np
import pytest
import torch
from token_dumps import make_response

from cppo_verl.analysis.positions import BIN_CENTRES, position_bins
from cppo_verl.core.metrics import POSITION_BINS, position_sums


@pytest.mark.parametrize("length", [6, 7, 8, 11, 64, 100])
def test_bins_hold_the_tokens_that_the_logged_metrics_count_in_them(length):
    response = make_response(length=length)
    counts, _ = position_sums(torch.tensor(response.divergence)[None], torch.tensor(response.mask)[None].float())
    assert np.bincount(position_bins(response), minlength=POSITION_BINS).tolist() == counts.tolist()


def test_centres_are_in_the_middle_of_the_bins():
    assert [round(POSITION_BINS * centre - 0.5) for centre in BIN_CENTRES] == list(range(POSITION_BINS))
