"""Importing this module plugs cppo_verl into verl; ``import verl`` does so in every process.

verl swallows the exception of a plug-in that fails to load and goes on without it, which shows up
minutes later as an unknown loss mode. Ours is printed at once.
"""

import gc
import os
import sys
import traceback
from collections.abc import Callable
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cppo_verl.plugin.topk.vllm_server import TopKReplica

try:
    import wrapt

    from cppo_verl.cpu import platform

    # First: importing the losses makes verl choose a platform.
    platform.register_platform()

    from cppo_verl.plugin import losses  # noqa: F401  registers the policy losses
    from cppo_verl.plugin.config import check_method
    from cppo_verl.plugin.constants import TOP_K_ROLLOUT

    # No registration sees the whole config before Ray starts.
    @wrapt.patch_function_wrapper("verl.utils.config", "validate_config")
    def _validate_config(
        wrapped: Callable[..., None], _instance: None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        check_method(kwargs["config"] if "config" in kwargs else args[0])
        return wrapped(*args, **kwargs)

    # verl's trainers and engines cost seconds to import, and few processes need them. The plug-in's register when verl
    # itself imports the registry that they belong to.
    @wrapt.when_imported("verl.workers.rollout.replica")
    def _register_replica(module: ModuleType) -> None:
        def load() -> "type[TopKReplica]":
            from cppo_verl.plugin.topk.vllm_server import TopKReplica

            return TopKReplica

        module.RolloutReplicaRegistry.register(TOP_K_ROLLOUT, load)

    @wrapt.when_imported("verl.workers.rollout.base")
    def _register_rollout(module: ModuleType) -> None:
        # The workers' side, which hands over weights, is verl's own.
        module._ROLLOUT_REGISTRY[TOP_K_ROLLOUT, "async"] = module._ROLLOUT_REGISTRY["vllm", "async"]

    @wrapt.when_imported("verl.workers.rollout.vllm_rollout.vllm_async_server")
    def _remember_failed_syncs(module: ModuleType) -> None:
        from cppo_verl.plugin import health

        health.remember_failed_syncs(module)

    @wrapt.when_imported("verl.experimental.agent_loop.single_turn_agent_loop")
    def _register_agent_loop(_module: ModuleType) -> None:
        from cppo_verl.plugin import agent_loops  # noqa: F401

    @wrapt.when_imported("verl.trainer.ppo.v1")
    def _register_trainers(_module: ModuleType) -> None:
        from cppo_verl.plugin import trainer  # noqa: F401

    if platform.is_active():
        from cppo_verl.cpu import verl_patches

        verl_patches.apply()
        # Python's garbage collector would walk the million objects of the imported modules a few times for each
        # thousand responses, a fifth of the time of their generation. By default it begins after 700 new objects.
        gc.set_threshold(50_000, 20, 100)
        # Each of Ray's processes collects metrics of itself, in a thread that races with the start of the process. With
        # Ray 2.60.0 one process in about 300 starts of Ray crashed in it, and its run ended. These metrics are shown
        # nowhere here.
        # Ray also starts a worker a core before anybody asks for one. A run's workers need the run's environment, which
        # these lack: each takes a second of a core while the run starts, and none is ever used.
        # A Ray that this process starts inherits the settings.
        for setting in ("enable_open_telemetry", "enable_metrics_collection", "prestart_worker_first_driver"):
            os.environ.setdefault(f"RAY_{setting}", "false")
        # Its workers are forks of one process that has imported verl and vLLM.
        os.environ.setdefault("RAY_RUNTIME_ENV_HOOK", "cppo_verl.cpu.forked_python.use_for_workers")

        @wrapt.when_imported("verl.workers.engine.fsdp.transformer_impl")
        def _register_cpu_engine(_module: ModuleType) -> None:
            from cppo_verl.cpu import fsdp_engine  # noqa: F401

        @wrapt.when_imported("verl.checkpoint_engine.base")
        def _register_gloo(_module: ModuleType) -> None:
            from cppo_verl.cpu import gloo_checkpoint_engine  # noqa: F401

except Exception:
    traceback.print_exc()
    print("cppo_verl: the plug-in failed to load (above), verl runs without it", file=sys.stderr, flush=True)
    raise
