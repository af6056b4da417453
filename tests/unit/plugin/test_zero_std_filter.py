"""mask_std_0: which prompts stay out, and what is divided by without them."""

import pytest
import torch

from cppo_verl.plugin.zero_std_filter import leave_out, mini_batch_of_row, rows_with_spread


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
