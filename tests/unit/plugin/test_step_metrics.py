"""Engine mismatch and policy drift, told apart by the update."""

import pytest

from cppo_verl.plugin.losses import METRIC_PREFIX
from cppo_verl.plugin.step_metrics import shares_by_update


def test_the_first_update_is_told_apart_from_the_later_ones():
    sums = {"all/tokens": [4.0, 2.0, 4.0], "all/divergence": [0.04, 0.2, 0.4]}
    sums |= {f"position_{b}/{name}": [0.0] * 3 for b in range(8) for name in ("tokens", "divergence")}
    sums |= {"position_3/tokens": [0.0, 1.0, 3.0], "position_3/divergence": [0.0, 0.1, 0.5]}
    metrics = shares_by_update({METRIC_PREFIX + key: value for key, value in sums.items()})
    assert metrics == pytest.approx(
        {
            "trust_region/first_update/divergence": 0.01,
            "trust_region/later_updates/divergence": 0.1,
            "trust_region/later_updates/divergence/position_3": 0.15,
        }
    )
    # The separate trainer's later mini-batches between two weight syncs.
    later = shares_by_update({METRIC_PREFIX + key: value for key, value in sums.items()}, first_updates=0)
    assert later == pytest.approx(
        {
            "trust_region/later_updates/divergence": 0.064,
            "trust_region/later_updates/divergence/position_3": 0.15,
        }
    )
    assert shares_by_update({"grad_norm": [1.0]}) == {}
