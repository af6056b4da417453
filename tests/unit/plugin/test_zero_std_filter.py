"""mask_std_0: which prompts stay out, and what is divided by without them."""

import numpy as np
import pytest
import torch
from verl import DataProto
from verl.trainer.config import AlgoConfig
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl.workers.config import FSDPActorConfig

from cppo_verl.plugin.config import MethodConfig
from cppo_verl.plugin.constants import LOSS_MODES
from cppo_verl.plugin.preflight import BESIDE_ADVANTAGES, OWN_SEQUENCE_MEANS, SPREAD_ESTIMATORS
from cppo_verl.plugin.zero_std_filter import changed_rows, leave_out, mini_batch_of_row, rows_with_spread


def rows(data):
    """Per response: its row and the (column, log mu, log pi, A) of its valid tokens."""
    for i, valid in enumerate(data["response_mask"].tolist()):
        columns = [t for t, v in enumerate(valid) if v]
        yield i, [(t, *(data[k][i, t].item() for k in ("old_log_prob", "log_prob", "advantages"))) for t in columns]


def test_prompts_of_one_reward_are_found():
    uids = ["a", "b", "a", "b", "c", "d", "d", "pad"]
    rewards = [1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    kept, share = rows_with_spread(uids, rewards, [u == "pad" for u in uids])
    # c has a single response and no standard deviation, the padding row is no prompt
    assert kept.tolist() == [True, False, True, False, True, False, False, True]
    assert share == pytest.approx(2 / 4)


def test_a_session_of_several_outputs_is_one_response_as_in_verls_grpo():
    # a: one session of two outputs. b: two sessions that end alike. c: two that end differently, in any order of rows.
    keys = ["a_0_0", "a_0_1", "b_0_0", "b_0_1", "b_1_0", "c_0_1", "c_0_0", "c_1_0"]
    uids, rewards = [key[0] for key in keys], [1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
    kept, share = rows_with_spread(uids, rewards, [False] * 8, keys)
    assert kept.tolist() == [True, True, False, False, False, True, True, True]
    assert share == pytest.approx(1 / 3)
    scores = torch.tensor(rewards).unsqueeze(-1)
    data = DataProto.from_dict(
        {"token_level_rewards": scores, "response_mask": torch.ones(8, 1)}, {"uid": np.array(uids, dtype=object)}
    )
    given = compute_advantage_for_multi_trajectories(data, keys, "grpo").batch["advantages"].abs().amax(-1) > 1e-5
    assert torch.equal(given | ~kept, kept | ~kept) and not given[~kept].any()


@pytest.mark.parametrize(
    ("estimator", "nothing"), [*((name, True) for name in SPREAD_ESTIMATORS), ("reinforce_plus_plus_baseline", False)]
)
def test_the_estimators_that_mask_std_0_takes_give_nothing_to_a_prompt_of_one_reward(estimator, nothing):
    """Two prompts of four responses of unequal length: one of one reward, one of two."""
    lengths = torch.tensor([1, 2, 3, 4, 4, 3, 2, 1])
    mask = (torch.arange(4) < lengths[:, None]).float()
    rewards = torch.zeros(8, 4)
    rewards[torch.arange(8), lengths - 1] = torch.tensor([1.0, 1, 1, 1, 0, 0, 0, 1])
    index = np.array([0] * 4 + [1] * 4)
    function = ADV_ESTIMATOR_REGISTRY[estimator]
    advantages, _ = function(token_level_rewards=rewards, response_mask=mask, index=index, config=AlgoConfig())
    assert advantages[4:].abs().max() > 0.1
    assert (advantages[:4].abs().max() < 1e-4) == nothing


def test_rows_fall_into_verls_mini_batches():
    import verl.utils.tensordict_utils as tu
    from tensordict import TensorDict

    rows, dp_size, mini_batch_size = 24, 2, 8
    got = torch.full((rows,), -1)
    for part in torch.arange(rows).chunk(dp_size):
        data = TensorDict({"row": part}, batch_size=len(part))
        for index, mini_batch in enumerate(tu.make_iterator(data, mini_batch_size // dp_size, epochs=1, seed=0)):
            got[mini_batch["row"]] = index
    assert torch.equal(mini_batch_of_row(rows, dp_size, mini_batch_size), got)


def nested_batch(lengths):
    from tensordict import TensorDict

    def field(value, dtype):
        return torch.nested.as_nested_tensor(
            [torch.full((n,), value, dtype=dtype) for n in lengths], layout=torch.jagged
        )

    fields = {"response_mask": field(1, torch.int64), "loss_mask": field(1, torch.int64)}
    return TensorDict(fields | {"advantages": field(0.5, torch.float32)}, batch_size=len(lengths))


def test_what_is_left_out_leaves_every_denominator():
    data = nested_batch([3, 1, 2, 4])
    kept = torch.tensor([True, False, True, True])
    masked = leave_out(data, kept, torch.tensor([0, 0, 1, 1]), seq_mean=True)
    assert [m.sum().item() for m in masked["response_mask"].unbind()] == [3, 0, 2, 4]
    assert [m.sum().item() for m in masked["loss_mask"].unbind()] == [3, 0, 2, 4]
    assert [a[0].item() for a in masked["advantages"].unbind()] == [1.0, 1.0, 0.5, 0.5]
    assert data["response_mask"].values().all()  # the original is what is put back


def test_a_mini_batch_with_nothing_left_divides_by_one_token_of_no_loss():
    data = nested_batch([3, 1, 2, 4])
    masked = leave_out(data, torch.tensor([False, False, True, True]), torch.tensor([0, 0, 1, 1]), seq_mean=False)
    assert [m.sum().item() for m in masked["response_mask"].unbind()] == [0, 0, 2, 4]
    assert [m.sum().item() for m in masked["loss_mask"].unbind()] == [1, 0, 2, 4]


@pytest.mark.parametrize("left_out", [True, False])
def test_a_mini_batch_of_padding_rows_with_or_without_a_prompt_left_out_divides_by_one_token(left_out):
    data = nested_batch([1, 1, 2, 4])
    for name in ("response_mask", "loss_mask"):
        data[name].values()[: 1 if left_out else 2] = 0  # verl's padding rows
    kept = torch.tensor([True, not left_out, True, True])
    masked = leave_out(data, kept, torch.tensor([0, 0, 1, 1]), seq_mean=False)
    assert [m.sum().item() for m in masked["response_mask"].unbind()] == [0, 0, 2, 4]
    assert [m.sum().item() for m in masked["loss_mask"].unbind()] == [1, 0, 2, 4]


@pytest.mark.parametrize(
    ("kept", "seq_mean", "rows"),
    [
        ([True, False, True, True], False, [1]),
        ([True, False, True, True], True, [0, 1]),  # the rest of a mini-batch weighs more
        ([False, False, True, True], False, [0, 1]),
        ([True, True, True, True], False, []),
    ],
)
def test_the_rows_that_differ_are_found(kept, seq_mean, rows):
    data = nested_batch([3, 1, 2, 4])
    masked = leave_out(data, torch.tensor(kept), torch.tensor([0, 0, 1, 1]), seq_mean=seq_mean)
    assert changed_rows(data, masked).tolist() == rows


def test_the_token_that_is_counted_for_padding_rows_alone_is_a_change():
    data = nested_batch([1, 1, 2, 4])
    for name in ("response_mask", "loss_mask"):
        data[name].values()[:2] = 0
    masked = leave_out(data, torch.ones(4, dtype=torch.bool), torch.tensor([0, 0, 1, 1]), seq_mean=False)
    assert changed_rows(data, masked).tolist() == [0]


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
@pytest.mark.parametrize("loss_mode", sorted(POLICY_LOSS_REGISTRY.keys() - {*LOSS_MODES, "bypass_mode"}))
def test_verls_losses_with_prompts_left_out_have_the_gradient_of_those_removed_or_are_refused(loss_mode, mode):
    """A mini-batch of two micro-batches, with a third of the rows left out, of which one has more than the other."""
    g, lengths = torch.Generator().manual_seed(0), [8, 5, 7, 8, 3, 6, 8, 8, 1, 4, 8, 7]
    mask = torch.arange(8) < torch.tensor(lengths)[:, None]
    log_mu = -3 * torch.rand(12, 8, generator=g)
    log_pi = (log_mu + torch.randn(12, 8, generator=g)).clamp_max(-0.01)
    advantages = (2 * torch.randn(12, 1, generator=g)) * mask
    kept = torch.tensor([True] * 5 + [False] + [True] * 3 + [False] * 3)
    data = nested_batch(lengths)
    data["advantages"].values()[:] = advantages[mask]
    masked = leave_out(data, kept, torch.zeros(12, dtype=torch.int64), seq_mean=mode.startswith("seq-mean"))
    fields = (masked.get(name, data[name]).unbind() for name in ("response_mask", "advantages"))
    left, scaled = (torch.nn.utils.rnn.pad_sequence(field, batch_first=True) for field in fields)

    def gradient(advantages, mask, rows, sequences):
        """Of ``rows``, the first six of all in one micro-batch and the others in another."""
        loss = MethodConfig(loss_mode=loss_mode, clip_cov_ratio=0.2, kl_cov_ratio=0.2, dro_beta=1.0)
        config = FSDPActorConfig(strategy="fsdp2", rollout_n=1, ppo_micro_batch_size_per_gpu=1, policy_loss=loss)
        config.global_batch_info.update(
            dp_size=1, batch_num_tokens=int(mask[rows].sum()), global_batch_size=sequences, loss_scale_factor=None
        )
        leaf = log_pi.clone().requires_grad_()
        for part in (rows[rows < 6], rows[rows >= 6]):
            torch.manual_seed(0)  # clip_cov draws
            POLICY_LOSS_REGISTRY[loss_mode](
                old_log_prob=log_mu[part],
                log_prob=leaf[part],
                advantages=advantages[part],
                response_mask=mask[part],
                loss_agg_mode=mode,
                config=config,
            )[0].backward()
        return leaf.grad[kept]

    same = torch.allclose(
        gradient(scaled, left.bool(), torch.arange(12), 12),
        gradient(advantages, mask, kept.nonzero().flatten(), int(kept.sum())),
        rtol=1e-4,
        atol=1e-7,
    )
    assert same == (loss_mode not in (BESIDE_ADVANTAGES if mode.startswith("seq-mean") else OWN_SEQUENCE_MEANS))
