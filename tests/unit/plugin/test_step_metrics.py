"""Engine mismatch and policy drift, told apart by the update."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from transfer_queue import KVBatchMeta

from cppo_verl.core.metrics import RESPONSE_SUMS, TOKEN_SUMS
from cppo_verl.plugin.losses import ABSOLUTE_SUMS, METRIC_PREFIX, UPDATE_TOKENS
from cppo_verl.plugin.step_metrics import shares_by_update, step_shares


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
    assert shares_by_update({"grad_norm": [1.0]}) == {}


def test_the_relative_log_probability_error_is_that_of_the_first_update():
    log_mu, log_pi = [-0.5, -2.0, -1.5], [-0.6, -1.9, -1.7]
    error, size = sum(abs(a - b) for a, b in zip(log_pi, log_mu, strict=True)), 4.0
    sums = dict(zip(ABSOLUTE_SUMS, ([error, 9.0], [size, 10.0]), strict=True))
    assert shares_by_update(sums) == {"trust_region/first_update/relative_log_prob_error": pytest.approx(0.1)}


def test_the_shares_of_updates_of_unequal_size_are_those_of_all_their_tokens():
    """Of 10 tokens 9 are masked, of 90 none: 9 % of all, where the mean of the updates' shares is 45 %."""
    sums = {f"{METRIC_PREFIX}all/{name}": [0.0, 0.0] for name in (*TOKEN_SUMS, *RESPONSE_SUMS)}
    sums |= {f"{METRIC_PREFIX}all/tokens": [10.0, 90.0], f"{METRIC_PREFIX}all/masked": [9.0, 0.0]}
    metrics = step_shares(sums | {UPDATE_TOKENS: [10, 90]})
    assert metrics["trust_region/masked_share"] == metrics["actor/pg_clipfrac"] == pytest.approx(0.09)


def test_a_loss_of_verls_own_has_no_shares():
    assert step_shares(defaultdict(list)) == {}


def test_mini_batches_weigh_by_their_tokens_and_not_by_their_micro_batches():
    """verl reports the mean over micro-batches: 30 tokens for a mini-batch of 90 cut in three."""
    sums = {f"{METRIC_PREFIX}all/{name}": [0.0, 0.0] for name in (*TOKEN_SUMS, *RESPONSE_SUMS)}
    sums |= {f"{METRIC_PREFIX}all/tokens": [10.0, 30.0], f"{METRIC_PREFIX}all/masked": [9.0, 0.0]}
    metrics = step_shares(sums | {UPDATE_TOKENS: [10, 90]})
    assert metrics["trust_region/masked_share"] == pytest.approx(0.09)


def test_the_separate_trainer_reports_a_steps_shares_once(monkeypatch):
    """verl's own loop over the updates between two weight syncs and its aggregation, around updates of unequal size."""
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    from cppo_verl.plugin.trainer import TrustRegionTrainerSeparateAsync

    names = [f"{METRIC_PREFIX}all/{name}" for name in (*TOKEN_SUMS, *RESPONSE_SUMS)]
    updates = [
        dict.fromkeys(names, 0.0) | {names[0]: 10.0, names[1]: 9.0, UPDATE_TOKENS: 10},
        dict.fromkeys(names, 0.0) | {names[0]: 90.0, UPDATE_TOKENS: 90},
    ]
    trainer = object.__new__(TrustRegionTrainerSeparateAsync)
    trainer.config = OmegaConf.create(
        {"data": {"train_batch_size": 2}, "actor_rollout_ref": {"actor": {"policy_loss": {"mask_std_0": False}}}}
        | {"algorithm": {}}
    )
    trainer.parameter_sync_step, trainer.token_dump = 2, None

    def update(self, batch, metrics):
        sums = updates[self.local_trigger_step]
        self.actor_rollout_wg = SimpleNamespace(last_metrics={key: [value] for key, value in sums.items()})
        metrics.update(sums)
        return batch

    def once(self, metrics, timing_raw, size):
        return self._update_actor(
            KVBatchMeta(partition_id="train", keys=[str(self.local_trigger_step)], tags=[{}]), metrics
        )

    monkeypatch.setattr(PPOTrainer, "_update_actor", update)
    monkeypatch.setattr(TrustRegionTrainerSeparateAsync, "_step_once", once)
    monkeypatch.setattr(TrustRegionTrainerSeparateAsync, "prepare_step", lambda self: {})
    metrics = {}
    trainer.step(metrics, {})
    assert metrics["trust_region/masked_share"] == pytest.approx(0.09)
    assert not [key for key in metrics if key.startswith(METRIC_PREFIX)]
