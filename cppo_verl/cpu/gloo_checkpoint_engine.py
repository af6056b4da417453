"""verl's checkpoint-engine backend "gloo", for the trainer that generates in processes of its own.

verl 0.9.1's own import packages for accelerators or RDMA. With device=cpu too, nixl pins memory and synchronises a
CUDA stream at every bucket, and mooncake asks for RDMA and rounds the weights to bf16.
"""

import json
import socket
from collections.abc import AsyncGenerator, Generator
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from verl.checkpoint_engine.base import CheckpointEngine, CheckpointEngineRegistry

TIMEOUT = timedelta(minutes=10)


@CheckpointEngineRegistry.register("gloo")
class GlooCheckpointEngine(CheckpointEngine):
    """Broadcasts the actor's full weights from its rank 0 to every rollout worker, one tensor at a time, in a
    process group that lives as long as the weight sync. Of the actor's other ranks it needs the gathering only."""

    def __init__(self, bucket_size: int, is_master: bool = False) -> None:
        self.is_master = is_master
        self.store: Any = None  # a TCPStore, whose type does not know that it takes bytes
        self.group: Any = None  # a ProcessGroupGloo, whose type lacks its methods

    def prepare(self) -> tuple[str, int] | None:  # type: ignore[override]  # verl's own engines return no dict either
        """The store's host and port, from the actor's rank 0; None from all others."""
        if not self.is_master:
            return None
        host = ray.util.get_node_ip_address().strip("[]")
        # A socket of our own, because TCPStore's would listen on every interface of the machine.
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, 0), family=family)
        port = listening.getsockname()[1]
        self.store = dist.TCPStore(
            host,
            port,
            is_master=True,
            wait_for_workers=False,
            timeout=TIMEOUT,
            master_listen_fd=listening.detach(),
        )
        return host, port

    @classmethod
    def build_topology(
        cls, actor_wg_world_size: int, rollout_world_size: int, metadata: list
    ) -> tuple[dict[str, list[Any]], dict[str, list[Any]]]:
        def kwargs(ranks: list[int]) -> dict[str, list[Any]]:
            size, n = rollout_world_size + 1, len(ranks)
            return {"rank": ranks, "world_size": [size] * n, "address": [metadata[0]] * n}

        return kwargs([0] + [-1] * (actor_wg_world_size - 1)), kwargs(list(range(1, rollout_world_size + 1)))

    # verl passes by keyword what build_topology returns.
    def init_process_group(self, rank: int, world_size: int, address: tuple[str, int]) -> None:  # type: ignore[override]
        if rank < 0:
            return
        if self.store is None:
            self.store = dist.TCPStore(*address, is_master=False, timeout=TIMEOUT)
        self.group = dist.ProcessGroupGloo(self.store, rank, world_size, TIMEOUT)

    def finalize(self) -> None:
        self.group = self.store = None

    @torch.no_grad()
    async def send_weights(
        self, weights: Generator[tuple[str, torch.Tensor], None, None], global_steps: int | None = None
    ) -> None:
        index = 0
        for index, (name, weight) in enumerate(weights, 1):  # gathers over all ranks of the actor
            if self.group is not None:
                meta = [name, list(weight.shape), str(weight.dtype).removeprefix("torch.")]
                self.store.set(f"weight_{index}", json.dumps(meta))
                self.group.broadcast(weight.contiguous(), 0).wait()
        if self.group is not None:
            self.store.set(f"weight_{index + 1}", json.dumps(None))
            self.group.barrier().wait()  # the store goes with this process

    @torch.no_grad()
    async def receive_weights(  # type: ignore[override]  # verl iterates over it with ``async for``
        self, global_steps: int | None = None
    ) -> AsyncGenerator[tuple[str, torch.Tensor], None]:
        index = 1
        while (meta := json.loads(self.store.get(f"weight_{index}"))) is not None:
            name, shape, dtype = meta
            weight = torch.empty(shape, dtype=getattr(torch, dtype))
            self.group.broadcast(weight, 0).wait()
            yield name, weight
            index += 1
        self.group.barrier().wait()
