"""The dump of tokens: what is recorded in verl's own ppo_loss, against the oracle; the file, whole and damaged."""

import logging
import math
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from token_dumps import CPPO, METHODS, actor, batch, damaged, dumped, expected, make_response, save, train, writer
from verl.utils import tensordict_utils as tu
from verl.workers.config import PolicyLossConfig
from verl.workers.utils.losses import ppo_loss

from cppo_verl.artifacts.token_dump import HEADER, REASONS, ROW_GROUP_SIZE, encode, read_tokens
from cppo_verl.plugin import token_recorder
from cppo_verl.plugin.config import CPPOLossConfig, NeighbourLossConfig, PrefixRatioLossConfig, TRMLossConfig
from cppo_verl.plugin.losses import loss_context

# --- what is recorded -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_reasons_and_numbers_agree_with_the_oracle(name, tmp_path):
    method = METHODS[name]
    data, log_pi, by_row = dumped(tmp_path, method)
    found = set()
    assert sorted(by_row) == [row for row in range(24) if row != 5]
    for row, (response,) in by_row.items():
        valid = data["response_mask"][row].bool().tolist()
        mu, adv = data["rollout_log_probs"][row].tolist(), data["advantages"][row].tolist()
        div, reason, sure, weighted, c, delta_b = expected(method, mu, log_pi[row].tolist(), adv, valid)
        assert response.update == row // 8
        assert response.key == f"prompt{row // 4}_{row % 4}_0" and response.uid == f"prompt{row // 4}"
        assert response.prompt.tolist() == data["prompts"][row].tolist()
        assert response.response.tolist() == data["responses"][row].tolist()
        assert response.mask.tolist() == valid
        assert response.position[response.mask].tolist() == list(range(1, sum(valid) + 1))
        np.testing.assert_array_equal(response.log_mu, mu)
        np.testing.assert_array_equal(response.log_pi, np.where(valid, log_pi[row], 0))
        np.testing.assert_array_equal(response.advantage, adv)
        np.testing.assert_allclose(response.divergence, div, atol=1e-6)
        if isinstance(method, CPPOLossConfig):
            np.testing.assert_allclose(response.weighted_divergence, weighted, atol=1e-6)
            np.testing.assert_allclose(response.threshold, c, atol=1e-5)
            assert response.delta_b == (None if delta_b is None else pytest.approx(delta_b, abs=1e-6))
        else:
            assert response.weighted_divergence is response.threshold is response.delta_b is None
        if type(method) is PolicyLossConfig:
            assert response.reason is response.update_mask is None
            continue
        got = [REASONS[code] for code in response.reason]
        assert [r for r, s in zip(got, sure, strict=True) if s] == [r for r, s in zip(reason, sure, strict=True) if s]
        rejected = np.isin(got, ["token", "budget", "response", "clipped"])
        if getattr(method, "gate", "hard") in ("hard", "soft"):
            assert ((response.update_mask < 1) == (rejected | ~response.mask)).all()
        assert (response.update_mask[~response.mask] == 0).all()
        found |= set(got)
    if type(method) is not PolicyLossConfig:
        rejections = {
            CPPOLossConfig: {"token", "towards_one"} | ({"budget"} if name != "dppo" else set()),
            TRMLossConfig: {"response"},
            PrefixRatioLossConfig: {"clipped"},
            NeighbourLossConfig: {"token" if name == "kpop" else "response"},
        }
        assert found == {"", "kept"} | rejections[type(method)]


def test_a_measured_divergence_is_recorded_as_it_was_measured(tmp_path):
    data, log_pi = batch()
    data, log_pi = tu.index_select_tensor_dict(data, [0, 1, 2, 3]), log_pi[:4]
    lengths = data["responses"].offsets().diff()
    measured = torch.rand(4, int(lengths.max()), generator=torch.Generator().manual_seed(1))
    with loss_context(divergence=measured):
        records = train(CPPO(divergence="topk_tv"), data, log_pi, [2], mini_batch=4)
    (record,) = records
    valid = data["response_mask"][2].bool()
    want = torch.where(valid, measured[2, : lengths[2]], 0)
    np.testing.assert_array_equal(record.columns["divergence"], want)


def test_only_drawn_responses_are_recorded_once_an_update_whatever_the_split(tmp_path):
    drawn = [0, 7, 8, 13, 23]
    for micro_batch in (2, 8):
        folder = tmp_path / str(micro_batch)
        _, _, by_row = dumped(folder, METHODS["cppo"], drawn, micro_batch=micro_batch, epochs=2)
        updates = {row: [response.update for response in responses] for row, responses in by_row.items()}
        assert updates == {row: [row // 8, row // 8 + 3] for row in drawn}
    assert token_recorder.take(None) == []


def test_a_step_without_a_dump_leaves_nothing(tmp_path):
    data, log_pi = batch()
    tu.assign_non_tensor(data, dp_size=1, batch_num_tokens=100, global_batch_size=24)
    packed = [
        torch.cat([torch.zeros(len(p) - 1), x, torch.zeros(1)]) for p, x in zip(data["prompts"], log_pi, strict=True)
    ]
    output = {"log_probs": torch.cat(packed)}
    loss = partial(ppo_loss, config=actor(CPPO()))
    plain = loss(model_output=output, data=data, dp_group=None)
    recorded = token_recorder.recording_loss(loss, model_output=output, data=data, dp_group=None)
    assert torch.equal(plain[0], recorded[0])
    assert token_recorder.take(None) == []


def test_ranks_that_share_their_rows_write_them_once(tmp_path):
    data, log_pi = batch()
    records = train(CPPO(), data, log_pi, [3, 9])
    keys = {3: "a_0_0", 9: "a_1_0"}
    writer(tmp_path).write(1, None, records + records, keys, tu.index_select_tensor_dict(data, [3, 9]))
    assert [r.key for r in read_tokens(tmp_path).responses] == ["a_0_0", "a_1_0"]


# --- which responses ------------------------------------------------------------------------------------------


def test_every_response_with_a_valid_token_is_as_likely_to_be_drawn():
    data, _ = batch(rows=60)
    times, steps = np.zeros(60), 2000
    for step in range(steps):
        drawn = token_recorder.draw(data["response_mask"], 8, step)
        assert len(set(drawn)) == 8 and drawn == sorted(drawn)
        times[drawn] += 1
    assert times[5] == 0
    share = 8 / 59
    spread = math.sqrt(steps * share * (1 - share))
    assert abs(np.delete(times, 5) - steps * share).max() < 4 * spread
    assert abs(times.reshape(-1, 10)[1:].sum(1) - 10 * steps * share).max() < 4 * math.sqrt(10) * spread


def test_a_draw_is_the_steps_own_and_takes_all_of_a_smaller_batch():
    mask = batch()[0]["response_mask"]
    before = torch.get_rng_state()
    assert token_recorder.draw(mask, 8, 5) == token_recorder.draw(mask, 8, 5) != token_recorder.draw(mask, 8, 6)
    assert token_recorder.draw(mask, 100, 5) == [row for row in range(24) if row != 5]
    assert token_recorder.draw(mask * 0, 8, 5) == []
    assert torch.equal(torch.get_rng_state(), before)


def test_steps_are_due_from_the_first_multiple_on(tmp_path):
    assert [step for step in range(1, 12) if writer(tmp_path, every=5).due(step)] == [5, 10]


# --- the bound ------------------------------------------------------------------------------------------------


def write(target, step, rows=(0, 1, 2)):
    data, log_pi = batch()
    keys = {row: f"a_{row}_0" for row in rows}
    records = train(CPPO(), data, log_pi, list(rows))
    target.write(step, None, records, keys, tu.index_select_tensor_dict(data, list(rows)))


def test_a_folder_does_not_grow_beyond_its_bound_and_the_log_says_so_once(tmp_path, caplog):
    write(writer(tmp_path), 1)
    size = (tmp_path / "step-000001.parquet").stat().st_size
    bounded = writer(tmp_path, megabytes=2.5 * size / 1e6)
    with caplog.at_level(logging.WARNING):
        write(bounded, 2)
        content = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
        assert sorted(content) == ["step-000001.parquet", "step-000002.parquet"]
        assert bounded.due(3) and caplog.records == []
        write(bounded, 3)
        assert not bounded.due(4)
    (record,) = caplog.records
    assert "trust_region.dump.megabytes=" in record.getMessage()
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == content


def test_a_step_trained_again_replaces_its_own_file_only(tmp_path):
    write(writer(tmp_path), 1)
    size = (tmp_path / "step-000001.parquet").stat().st_size
    write(writer(tmp_path), 2)
    again = writer(tmp_path, megabytes=2.1 * size / 1e6)  # room for two
    write(again, 2, rows=(6, 8))
    assert not again.full
    assert [(r.step, r.key) for r in read_tokens(tmp_path).responses] == [
        *((1, f"a_{row}_0") for row in (0, 1, 2)),
        *((2, f"a_{row}_0") for row in (6, 8)),
    ]


def test_a_folder_that_cannot_be_written_ends_the_dump_and_not_the_run(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    target = writer(tmp_path / "file")
    with caplog.at_level(logging.WARNING):
        write(target, 1)
    assert not target.due(2)
    assert "choose another trust_region.dump.folder" in caplog.text


# --- the file -------------------------------------------------------------------------------------------------


def test_a_file_gives_back_what_it_was_given(tmp_path):
    none = dict.fromkeys(("weighted_divergence", "threshold", "update_mask", "reason", "delta_b"))
    sent = [
        make_response(0),
        make_response(1, length=5, **none),
        make_response(2, length=5, mask=np.zeros(5, dtype=bool)),
    ]
    (tmp_path / "run" / "tokens").mkdir(parents=True)
    file = save(tmp_path / "run" / "tokens", 4, sent, method={"delta": 0.1}, tokenizer="m")
    for path in (file, file.parent, tmp_path / "run"):
        got = read_tokens(path)
        assert got.notes == []
        assert got.headers == {4: {"format": 1, "step": 4, "method": {"delta": 0.1}, "tokenizer": "m"}}
        for a, b in zip(sent, got.responses, strict=True):
            for name, value in vars(a).items():
                if isinstance(value, np.ndarray):
                    assert getattr(b, name).dtype == value.dtype
                    np.testing.assert_array_equal(getattr(b, name), value)
                else:
                    assert getattr(b, name) == value
    assert got.responses[0].position[:8].tolist() == [1, 2, 0, 0, 0, 3, 4, 5]


def test_the_file_is_compact(tmp_path):
    # nine columns of 4 bytes and two of one, most of them noise here, and as long a prompt
    assert encode([make_response(i, length=2000) for i in range(32)], {}).size < 32 * 2000 * 40


def test_no_dump_is_said_with_the_override_that_makes_one(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"no token dump at .*trust_region.dump.every=10"):
            read_tokens(path)


def test_dumps_of_several_folders_are_read_as_one_and_named(tmp_path):
    for folder, step in (("a", 1), ("b", 2)):
        (tmp_path / folder).mkdir()
        save(tmp_path / folder, step, [make_response(step=step)])
    got = read_tokens(tmp_path)
    assert [r.step for r in got.responses] == [1, 2]
    assert got.notes == [f"token dumps in 2 folders are read as one run's: {tmp_path / 'a'}, {tmp_path / 'b'}"]


@pytest.mark.parametrize(
    "part",
    [lambda x: x[: len(x) // 2], lambda x: b"", lambda x: x[:-1], lambda x: b"PAR1", lambda x: x[:-9] + x[-8:]],
    ids=["half", "empty", "last byte", "four bytes", "hole"],
)
def test_a_file_cut_off_is_named_and_the_others_are_read(tmp_path, part):
    for step in (1, 2, 3):
        save(tmp_path, step, [make_response(step=step)])
    damaged(tmp_path / "step-000002.parquet", part)
    got = read_tokens(tmp_path)
    assert [r.step for r in got.responses] == [1, 3]
    (note,) = got.notes
    assert note.startswith("step-000002.parquet: not readable, skipped (")


def test_changed_bytes_cost_their_part_of_a_file_only(tmp_path):
    n = 3 * ROW_GROUP_SIZE
    file = save(tmp_path, 4, [make_response(i, length=60) for i in range(n)])
    lost = set()
    for where in np.linspace(0.1, 0.7, 7):
        content = bytearray(file.read_bytes())
        content[int(where * len(content))] ^= 0x55
        other = tmp_path / "changed" / file.name
        other.parent.mkdir(exist_ok=True)
        other.write_bytes(content)
        got = read_tokens(other)
        updates = {r.update for r in got.responses}
        lost.add(n - len(updates))
        for r in got.responses:
            np.testing.assert_array_equal(r.log_pi, make_response(r.update, length=60).log_pi)
        assert got.notes == [f"{file.name}: {ROW_GROUP_SIZE} response(s) in a damaged part of the file were skipped"]
    assert lost == {ROW_GROUP_SIZE}


def test_another_version_and_other_files_are_named(tmp_path):
    save(tmp_path, 1, [make_response(step=1)])
    save(tmp_path, 2, [make_response(step=2)], format=2)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "step-000003.parquet")
    pq.write_table(
        pa.table({"a": [1]}).replace_schema_metadata({HEADER: b'{"format": 1}'}), tmp_path / "step-000004.parquet"
    )
    for step, header in ((5, b"{"), (7, b"[" * 100_000)):
        table = pa.table({"a": [1]}).replace_schema_metadata({HEADER: header})
        pq.write_table(table, tmp_path / f"step-{step:06d}.parquet")
    (tmp_path / "step-000006.parquet.123.tmp").write_text("being written")
    got = read_tokens(tmp_path)
    assert [r.step for r in got.responses] == [1]
    two, three, four, five, seven = got.notes
    assert two == "step-000002.parquet: of format 2, skipped; this version reads format 1"
    assert three == "step-000003.parquet: not a token dump, skipped"
    assert four.startswith("step-000004.parquet: columns missing or of another type ['advantage', 'delta_b', ")
    assert five.startswith("step-000005.parquet: not readable, skipped")
    assert seven.startswith("step-000007.parquet: not readable, skipped")


def test_responses_that_cannot_be_right_are_left_out_and_counted(tmp_path):
    length = 10
    bad = np.zeros(length, dtype=np.float32)
    bad[7] = math.nan
    strange = [
        make_response(1, length, log_pi=bad),
        make_response(2, length, log_pi=bad),
        make_response(3, length, divergence=bad + np.inf),
        make_response(4, length, score=math.nan),
        make_response(5, length, mask=np.ones(3, dtype=bool)),
        make_response(6, length, prompt=None),
        make_response(7, length, reason=np.full(length, 99, dtype=np.uint8)),
        make_response(9, length, log_mu=np.full(length, 0.002, np.float32)),
        make_response(9, length, divergence=np.full(length, -1e-3, np.float32)),
    ]
    save(tmp_path, 4, [make_response(0, length), *strange, make_response(8, length)])
    got = read_tokens(tmp_path)
    assert [r.update for r in got.responses] == [0, 8]
    assert got.notes == [
        f"step-000004.parquet: {n} response(s) with {fault} were skipped"
        for n, fault in (
            (2, "values of log_pi that are not finite"),
            (1, "values of divergence that are not finite"),
            (1, "values of score that are not finite"),
            (1, "mask of another length than the response"),
            (1, "no prompt"),
            (1, "unknown reasons"),
            (1, "log-probabilities above zero"),
            (1, "values of divergence below zero"),
        )
    ]
