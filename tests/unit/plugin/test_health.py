"""What a rollout server remembers for the watch."""

import asyncio
from types import SimpleNamespace

import pytest

from cppo_verl.plugin.health import engine_fault, remember_failed_syncs


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
