"""What a rollout server remembers for the watch, and how long the watch waits."""

import asyncio
import errno
import threading
import time
from types import SimpleNamespace

import pytest
import verl.trainer.ppo.v1.replay_buffer

from cppo_verl.plugin import health
from cppo_verl.plugin.health import Watch, engine_fault, remember_failed_syncs
from cppo_verl.plugin.trainer import TrustRegionTrainerSync


def test_a_failed_weight_sync_is_remembered_and_another_call_is_not():
    class Server:
        async def collective_rpc(self, method, timeout=None):
            raise MemoryError(method, timeout)

    remember_failed_syncs(SimpleNamespace(vLLMHttpServer=Server))
    server = Server()
    for method, fault in (("reset", None), ("update_weights_from_ipc", "a weight sync has failed in {}: MemoryError")):
        with pytest.raises(MemoryError, match=f"'{method}', 3"):
            asyncio.run(server.collective_rpc(method, timeout=3))
        assert engine_fault(server) == fault


@pytest.mark.parametrize(
    "limits, still, since_asked, longest, key",
    [
        ((7200, 600), 7201, 0, 0, "stall_seconds"),
        ((7200, 600), 7199, 0, 5000, None),
        ((7200, 600), 601, 601, 10, "stop_seconds"),
        ((7200, 600), 5000, 599, 10, None),
        # a part of this run has taken longer before
        ((7200, 600), 1100, 1100, 600, None),
        ((7200, 600), 1201, 1201, 600, "stop_seconds"),
        ((None, None), 1e9, 1e9, 0, None),
    ],
)
def test_a_run_that_stands_still_gets_less_time_once_it_is_asked_to_stop(limits, still, since_asked, longest, key):
    stall_seconds, stop_seconds = limits
    watch = Watch(lambda: None, stall_seconds, lambda: "", lambda: False, stop_seconds)
    assert (f"(trainer.{key})" in (watch._stall(still, since_asked, longest) or "")) == (key is not None)


def test_a_run_ends_also_where_its_folder_is_gone_and_its_log_has_no_room(monkeypatch):
    def fail(code, *_, **__):
        raise OSError(code, errno.errorcode[code])

    monkeypatch.setattr(health, "INTERVAL", 0.01)
    monkeypatch.setattr(health, "_actors", dict)
    monkeypatch.setattr(health, "_exit_later", lambda: None)  # it would end this process
    monkeypatch.setattr(health, "print", lambda *a, **k: fail(errno.ENOSPC), raising=False)
    watch = Watch(lambda: None, 0.05, lambda: fail(errno.ESTALE), lambda: False, None)
    with pytest.raises(RuntimeError, match=r"no progress for 0\.05 s .*; the run ends; how to .*ESTALE"), watch:
        time.sleep(10)


def test_a_run_that_fails_while_the_fault_behind_it_is_told_ends_with_that_fault(monkeypatch):
    monkeypatch.setattr(health, "INTERVAL", 0.2)
    monkeypatch.setattr(health, "_actors", dict)
    monkeypatch.setattr(health, "_exit_later", lambda: None)
    telling = threading.Event()
    watch = Watch(lambda: None, 0.1, lambda: telling.set() or f"failed: {watch.over.wait(60)}", lambda: False, None)
    with pytest.raises(RuntimeError, match=r"no progress for 0\.1 s .*; the run ends; failed: True"), watch:
        assert telling.wait(60)
        raise KeyError("of something that came of it")


@pytest.fixture
def replay_buffer(compose):
    trainer = TrustRegionTrainerSync.__new__(TrustRegionTrainerSync)
    trainer.config = compose("+method=cppo", "+platform=cpu")
    trainer.trainer_mode = "sync"
    return trainer._build_replay_buffer()


def test_a_validation_of_which_every_prompt_has_failed_ends_with_the_place_to_look(replay_buffer, monkeypatch):
    """verl refuses such a batch in synchronous training alone."""
    stored = {uid: {"is_prompt": True, "status": "failure", "global_steps": 1} for uid in ("p", "q")}
    queue = SimpleNamespace(kv_list=lambda: {"val": dict(stored)}, kv_clear=lambda **which: None)
    monkeypatch.setattr(verl.trainer.ppo.v1.replay_buffer, "tq", queue)
    asked = dict(global_steps=1, partition_id="val", batch_size=2)
    with pytest.raises(RuntimeError, match="every prompt of a batch has failed: the first 'Error in _run_prompt'"):
        replay_buffer.sample(**asked)

    stored["q"]["status"] = "finished"
    stored["q_0_0"] = {"seq_len": 3}
    assert replay_buffer.sample(**asked)[0].keys == ["q_0_0"]
