"""Two trainers on one machine, each with a Ray cluster of its own."""

import asyncio
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import verl  # noqa: F401  loads the plug-in

HANDLE = f"ipc:///tmp/cppo_verl-{uuid.uuid4().hex}.sock"  # the same for both, as verl's is


@pytest.fixture
def transfer(monkeypatch):
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver, BucketedWeightSender

    def ends(raylet):
        monkeypatch.setenv("RAY_RAYLET_PID", raylet)
        sender = BucketedWeightSender(HANDLE, bucket_size_mb=1, use_shm=True)
        return sender, BucketedWeightReceiver(HANDLE, device=torch.device("cpu"), use_shm=True)

    return ends


def test_each_rollout_engine_gets_the_weights_of_its_own_trainer(transfer):
    ends = {raylet: transfer(raylet) for raylet in ("1", "2")}
    assert len({end.zmq_handle for pair in ends.values() for end in pair}) == 2
    received = {}

    def send(raylet):
        asyncio.run(ends[raylet][0].async_send_weights(iter([("weight", torch.full((3,), float(raylet)))])))

    def receive(raylet):
        ends[raylet][1].receive_weights(lambda weights, is_last: received.update({raylet: weights[0][1].tolist()}))

    with ThreadPoolExecutor() as pool:
        for future in [pool.submit(work, raylet) for work in (send, receive) for raylet in ends]:
            future.result()
    assert received == {"1": [1.0] * 3, "2": [2.0] * 3}
