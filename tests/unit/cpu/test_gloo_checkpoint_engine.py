"""Weights handed over between processes by gloo."""

import asyncio
import pickle
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch


def test_gloo_hands_over_weights_of_any_shape_and_type_sync_after_sync(monkeypatch):
    import ray
    from verl.checkpoint_engine import CheckpointEngineRegistry

    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    actors = [CheckpointEngineRegistry.new("gloo", bucket_size=1, is_master=rank == 0) for rank in range(2)]
    rollouts = [CheckpointEngineRegistry.new("gloo", bucket_size=1) for _ in range(2)]
    engines = actors + rollouts

    async def receive(engine):
        return {name: weight async for name, weight in engine.receive_weights()}

    def sync(engine, rank, world_size, address, weights):
        engine.init_process_group(rank, world_size, address)
        result = asyncio.run(engine.send_weights(weights) if engine in actors else receive(engine))
        engine.finalize()
        return result

    with ThreadPoolExecutor(len(engines)) as pool:
        for step in range(2):
            sent = {
                "transposed": torch.randn(3, 4).T,
                "bfloat16": torch.randn(5).bfloat16(),
                "scalar": torch.tensor(float(step)),
                "empty": torch.empty(0, 2),
            }
            # One generator for each rank: producing a weight is collective over the actor's ranks.
            weights = [iter(sent.items()), iter(sent.items()), None, None]
            metadata = [engine.prepare() for engine in engines]
            topology = type(actors[0]).build_topology(2, 2, metadata)
            arguments = [topology[0][key] + topology[1][key] for key in ("rank", "world_size", "address")]
            received = list(pool.map(sync, engines, *arguments, weights))[2:]
            assert all(next(rest, None) is None for rest in weights[:2])
            for result in received:
                assert result.keys() == sent.keys()
                for name, weight in sent.items():
                    assert result[name].dtype == weight.dtype
                    assert torch.equal(result[name], weight)


def test_the_store_listens_on_rays_interface_alone_and_what_it_holds_is_no_code(monkeypatch):
    import ray
    from verl.checkpoint_engine import CheckpointEngineRegistry

    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    engine = CheckpointEngineRegistry.new("gloo", bucket_size=1, is_master=True)
    host, port = engine.prepare()
    listening = [
        c.laddr for c in psutil.Process().net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port
    ]
    assert [address.ip for address in listening] == [host] == ["127.0.0.1"]
    engine.store.set("weight_1", pickle.dumps(pytest.fail))
    with pytest.raises(ValueError):
        asyncio.run(anext(engine.receive_weights()))


def test_verl_has_no_way_of_its_own_to_hand_over_weights_between_processes_here():
    """When this fails, see whether gloo_checkpoint_engine.py can go."""
    from verl.checkpoint_engine import CheckpointEngineRegistry

    # Where cupy is installed, verl registers those that need CUDA.
    assert set(CheckpointEngineRegistry._registry) - {"nccl", "delta_sharded"} == {"naive", "gloo"}
