"""What makes verl's agent loops cheap on a machine of few cores. Applied on the CPU platform only.

The patches change how or how often something is done, not what. tests/unit/cpu/test_agent_loop_patches.py fails when
verl no longer needs one of them.
"""

import asyncio
import copy
import functools
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import hydra
import wrapt
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

if TYPE_CHECKING:
    from verl.experimental.agent_loop import AgentLoopWorker
    from verl.protocol import DataProto
    from verl.workers.rollout.llm_server import LLMServerClient


def join_puts(module: ModuleType) -> None:
    """Put all responses that wait into TransferQueue at once.

    verl puts each response by itself, in three requests that take 5 ms of a core together, whatever they carry.
    """
    module.list_of_dict_to_tensordict = list  # type: ignore[attr-defined]  # a patch
    module.tq = joined_queue()  # type: ignore[attr-defined]  # a patch


GATHERING = 0.02
"""Seconds that a put waits for others. The responses to a prompt count once all of them are there."""


class JoinedQueue:
    """The module transfer_queue with another ``async_kv_batch_put``.

    Ray pickles the class of verl's agent-loop worker with what its methods name: this is a process's own.
    """

    def __init__(self) -> None:
        import transfer_queue
        from verl.utils.tensordict_utils import list_of_dict_to_tensordict

        self.module = transfer_queue
        self.async_kv_batch_put = JoinedPuts(transfer_queue.async_kv_batch_put, list_of_dict_to_tensordict)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def __reduce__(self) -> tuple[Callable[[], "JoinedQueue"], tuple[()]]:
        return joined_queue, ()


@functools.cache
def joined_queue() -> JoinedQueue:
    return JoinedQueue()


class Columns(dict[str, Any]):
    """Rows as the fields of a put, with a TensorDict's ``batch_size`` and without one around each Python object.

    A TensorDict wraps each row of each column that is no tensor by itself, and TransferQueue unwraps and wraps it anew:
    a third of the time of a put.

    Args:
        rows: dicts of the same keys.
        join: makes a TensorDict of rows.
    """

    def __init__(self, rows: list[dict], join: Callable[[list[dict]], Any]) -> None:
        objects = {name for name in rows[0] if not all(isinstance(row[name], Tensor) for row in rows)}
        tensors = join([{name: x for name, x in row.items() if name not in objects} for row in rows])
        super().__init__({**tensors, **{name: [row[name] for row in rows] for name in objects}})
        self.batch_size = (len(rows),)


class JoinedPuts:
    """TransferQueue's ``async_kv_batch_put`` of rows that are dicts; those that come while another waits or is on its
    way are put together.

    Args:
        put: TransferQueue's own.
        join: makes a TensorDict of a list of rows.
    """

    def __init__(self, put: Callable[..., Awaitable[Any]], join: Callable[[list[dict]], Any]) -> None:
        self.put, self.join = put, join
        self._waiting: list[tuple[dict[str, Any], asyncio.Future]] = []
        self._putting: asyncio.Task | None = None

    async def __call__(self, **put: Any) -> Any:
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append((put, answer))
        # A task of its own: the put of many rows must not end with the caller of one that is cancelled.
        if self._putting is None or self._putting.done():
            self._putting = asyncio.create_task(self._put_waiting())
        return await answer

    async def _put_waiting(self) -> None:
        while self._waiting:
            await asyncio.sleep(GATHERING)
            waiting, self._waiting = self._waiting, []
            await self._put_all(waiting)

    async def _put_all(self, waiting: list[tuple[dict[str, Any], asyncio.Future]]) -> None:
        alike = defaultdict(list)  # a TensorDict has the same fields in all rows
        for put, answer in waiting:
            alike[put["partition_id"], tuple(sorted(put["fields"][0]))].append((put, answer))
        for (partition_id, _), group in alike.items():
            keys, rows, tags = ([x for put, _ in group for x in put[name]] for name in ("keys", "fields", "tags"))
            try:
                fields = Columns(rows, self.join)
                stored = await self.put(keys=keys, fields=fields, tags=tags, partition_id=partition_id)
            except Exception as error:
                for _, answer in group:
                    if not answer.cancelled():
                        answer.set_exception(error)
            else:
                for _, answer in group:
                    if not answer.cancelled():
                        answer.set_result(stored)


def make_loops_directly(module: ModuleType) -> None:
    """Call the class of an agent loop that is registered by its class alone.

    verl makes one for each response, by hydra's ``instantiate``: three times the work of the class itself.
    """
    module.hydra = SimpleNamespace(utils=SimpleNamespace(instantiate=instantiate))  # type: ignore[attr-defined]  # a patch


def instantiate(config: Mapping[str, Any], **arguments: Any) -> Any:
    """hydra's ``instantiate``, without its copies where ``config`` has no arguments of its own."""
    if config.keys() == {"_target_"}:
        return hydra.utils.get_class(config["_target_"])(**arguments)
    return hydra.utils.instantiate(config=config, **arguments)


def ask_once(module: ModuleType) -> None:
    """Ask the load balancer once where the run has one rollout server.

    verl asks it for each response, and tells it when each has ended: two calls of another process.
    """
    wrapt.wrap_function_wrapper(module, "LLMServerClient._acquire_server", _acquire_once)
    wrapt.wrap_function_wrapper(module, "LLMServerClient._release_server", _release_unless_kept)


ONLY_SERVER = "cppo_verl_only_server"
"""Attribute of a client: a task whose result is the run's one server, or None where there may be several."""


async def _acquire_once(
    wrapped: Callable[..., Awaitable[Any]], client: "LLMServerClient", args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    # A task, because hundreds of responses begin at once: all of them wait for its answer, even if one is cancelled.
    if ONLY_SERVER not in vars(client):
        vars(client)[ONLY_SERVER] = asyncio.create_task(_only_server(wrapped, client, args, kwargs))
    only = await asyncio.shield(vars(client)[ONLY_SERVER])
    return await wrapped(*args, **kwargs) if only is None else only


async def _only_server(
    acquire: Callable[..., Awaitable[Any]], client: "LLMServerClient", args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    # verl's other trainers add servers to the load balancer between steps, and take them away again.
    fixed = OmegaConf.select(client.config, "trainer.v1.trainer_mode") in ("sync", "colocate_async")
    if not fixed or len(await client._load_balancer.get_all_servers.remote()) != 1:
        return None
    return await acquire(*args, **kwargs)


def _release_unless_kept(
    wrapped: Callable[..., None], client: "LLMServerClient", args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    if vars(client)[ONLY_SERVER].result() is None:
        wrapped(*args, **kwargs)


def score_in_place(module: ModuleType) -> None:
    """With reward.num_workers=0 compute the rewards in the agent-loop workers themselves.

    A rule's reward takes less than the call of another process, whose start takes seconds.
    """
    wrapt.wrap_function_wrapper(module, "AgentLoopWorker.__init__", _with_own_reward)


def _with_own_reward(
    wrapped: Callable[..., None], worker: "AgentLoopWorker", args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    wrapped(*args, **kwargs)
    if worker.reward_loop_worker_handles == []:
        worker.reward_loop_worker_handles = [OwnReward(worker.config)]  # type: ignore[list-item]  # called like one


class OwnReward:
    """verl's reward worker in this process, called like the handle of one in another."""

    def __init__(self, config: DictConfig) -> None:
        from verl.experimental.reward_loop import RewardLoopWorker

        if config.reward.reward_model.enable:
            raise ValueError("reward.num_workers=0 computes rules alone: a reward model needs reward.num_workers=1")
        self.worker = RewardLoopWorker(config)
        self.compute_score = SimpleNamespace(remote=self._compute_score)

    async def _compute_score(self, data: "DataProto") -> dict:
        # verl's reward manager writes into what it gets, which is a copy where the worker is another process. The
        # tensors were made for this call; the other columns are the dataset's and the response's own.
        own = replace(data, non_tensor_batch=copy.deepcopy(data.non_tensor_batch))
        return await self.worker.compute_score(own)
