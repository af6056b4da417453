"""The places in verl 0.9.1 that offer no seam. Applied on the CPU platform only."""

import os
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import TYPE_CHECKING, Any

import verl.utils.distributed as distributed
import wrapt

from cppo_verl.cpu import agent_loop_patches

if TYPE_CHECKING:
    from verl.workers.rollout.vllm_rollout.bucketed_weight_transfer import BucketedWeightReceiver, BucketedWeightSender


def apply() -> None:
    # initialize_global_process_group_ray joins "cpu:gloo" and "<device>:<backend>" into one string;
    # on this platform both name the CPU, which torch refuses as a duplicate.
    # tests/unit/cpu/test_verl_patches.py fails when verl no longer does so.
    distributed.initialize_global_process_group_ray = partial(
        distributed.initialize_global_process_group_ray, backend="cpu:gloo"
    )
    wrapt.when_imported("verl.workers.rollout.vllm_rollout.bucketed_weight_transfer")(separate_sockets)
    wrapt.when_imported("verl.trainer.ppo.v1.agent_loop_tq")(agent_loop_patches.join_puts)
    wrapt.when_imported("verl.experimental.agent_loop.agent_loop")(agent_loop_patches.score_in_place)
    wrapt.when_imported("verl.experimental.agent_loop.agent_loop")(agent_loop_patches.make_loops_directly)


def separate_sockets(module: ModuleType) -> None:
    """Give the weight transfers of each Ray cluster on a machine a socket of their own.

    verl names the socket after the Ray job, and the first job of every Ray cluster has the same id. Two trainers side
    by side, each with a Ray cluster of its own, would take over each other's socket, and a rollout engine would load
    the weights of the other run.
    """
    for name in ("BucketedWeightSender", "BucketedWeightReceiver"):
        wrapt.wrap_function_wrapper(module, f"{name}.__init__", _with_own_socket)


def _with_own_socket(
    wrapped: Callable[..., None],
    transfer: "BucketedWeightSender | BucketedWeightReceiver",
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    wrapped(*args, **kwargs)
    # Ray sets it in each of its workers; vLLM's processes inherit it from theirs.
    transfer.zmq_handle += f".{os.environ['RAY_RAYLET_PID']}"
