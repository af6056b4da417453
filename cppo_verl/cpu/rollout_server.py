"""verl's vLLM rollout on the CPU, whose server only the server's own process imports.

Ray loads the class of an actor in every process that gets a handle of it. That of verl's server brings vLLM along: five
CPU seconds in the load balancer and in each agent-loop worker, which only call the server.
"""

import inspect
from collections.abc import Callable
from typing import Any

import ray
from verl.utils.import_utils import load_class_from_fqn


class Deferred:
    """An actor that makes another class's object in its own process and does as that does."""

    actor_class: str
    """Import path of the other class."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.actor = load_class_from_fqn(self.actor_class)(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "actor":  # its constructor has failed
            raise AttributeError(name)
        return getattr(self.actor, name)


def deferred(actor_class: type) -> type:
    """A class to be given to ``ray.remote`` instead of ``actor_class``, with its name and its methods."""

    def passed_on(name: str) -> Callable:
        async def method(self: Deferred, *args: Any, **kwargs: Any) -> Any:
            return await getattr(self.actor, name)(*args, **kwargs)

        def plain_method(self: Deferred, *args: Any, **kwargs: Any) -> Any:
            return getattr(self.actor, name)(*args, **kwargs)

        return method if inspect.iscoroutinefunction(getattr(actor_class, name)) else plain_method

    names = [name for name, _ in inspect.getmembers(actor_class, inspect.isfunction) if not name.startswith("__")]
    path = f"{actor_class.__module__}.{actor_class.__qualname__}"
    return type(actor_class.__name__, (Deferred,), {"actor_class": path} | {name: passed_on(name) for name in names})


def load_replica() -> type:
    """verl's class of a vLLM replica, with a deferred server."""
    from verl.workers.rollout.vllm_rollout.vllm_async_server import vLLMHttpServer, vLLMReplica

    class Replica(vLLMReplica):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.server_class = ray.remote(deferred(vLLMHttpServer))

    return Replica
