"""Ends a run that would wait for ever: for something dead, or with no progress.

verl's trainer asks TransferQueue again and again for finished responses. Whether what should make them still lives it
does not ask: a dead rollout engine, storage or reward worker leaves it waiting without a word.
"""

import os
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

import ray

from cppo_verl.artifacts.log_lines import LINE, RUN_ENDS

if TYPE_CHECKING:
    from transfer_queue import KVBatchMeta

INTERVAL = 3.0
"""Seconds between two looks."""
PATIENCE = 20.0
"""Seconds for Ray to answer, and for the run to end once it is told."""
NEWS = 5.0
"""Seconds within which Ray knows of a death; on busy cores it has taken more than one."""
ON_PURPOSE = ("RAY_KILL", "OUT_OF_SCOPE", "REF_DELETED")
"""Ray's reasons for the end of an actor that somebody wanted."""
LEFT = ("exit_actor() is called", "User requested to exit the actor")
"""What Ray's message says where the actor itself wanted it; the reason is that of a crash then."""


class Watch:
    """Looks after the actors of this Ray job while the ``with`` statement's body runs, in the main thread.

    The body is ended by RuntimeError when an actor or the engine of a rollout server has died, when a weight sync has
    failed in a server, when Ray does not answer, or when ``progress`` has returned the same for ``stall_seconds``
    (None: for ever). Once ``asked`` returns true, ``stop_seconds`` is enough, or twice the longest time without
    progress so far if that is more. A process whose body does not end then ends itself with exit code 1.

    Args:
        progress: returns what changes as the run goes on; called in another thread, as is ``asked``.
        way_out: returns the message's last part: how to continue.
        asked: returns whether the run is asked to stop.
    """

    def __init__(
        self,
        progress: Callable[[], Any],
        stall_seconds: float | None,
        way_out: Callable[[], str],
        asked: Callable[[], bool],
        stop_seconds: float | None,
    ) -> None:
        self.progress, self.asked, self.way_out = progress, asked, way_out
        self.stall_seconds, self.stop_seconds = stall_seconds, stop_seconds
        self.why: str | None = None
        self.over, self.thread = threading.Event(), threading.get_ident()
        self._pings: dict[str, ray.ObjectRef] = {}

    def __enter__(self) -> "Watch":
        self._dead_before = {key for key, actor in _actors().items() if actor["State"] == "DEAD"}
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # so a shell starts a background job, and nohup too
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.watcher = threading.Thread(target=self._look, name="health", daemon=True)
        self.watcher.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.over.set()
        if self.why is None and isinstance(error, Exception):  # it may come of a death that nobody has seen yet
            self.watcher.join(3 * INTERVAL)
            with suppress(Exception):
                if self.why is None and (fault := self._fault_within(NEWS)):
                    self._tell(fault)
        if self.why is not None:
            raise RuntimeError(self.why) from (None if kind is KeyboardInterrupt else error)

    def _look(self) -> None:
        last, longest, asked_at = None, 0.0, None
        moved = answered = time.monotonic()
        while not self.over.wait(INTERVAL):
            now = time.monotonic()
            if (state := self.progress()) != last:
                last, moved, longest = state, now, max(longest, now - moved)
            asked_at = (asked_at or now) if self.asked() else None
            try:
                fault, answered = self._dead_actor() or self._broken_engine(), now
            except Exception as error:
                fault = f"Ray has not answered for {PATIENCE:.0f} s: {error}" if now - answered > PATIENCE else None
            fault = fault or self._stall(now - moved, now - max(moved, asked_at or now), longest)
            if fault is not None and not self.over.is_set():
                self._tell(fault)
                if not self.over.is_set():  # or the body has ended meanwhile, by what came of the fault
                    # It wakes the main thread also from a wait for Ray, which takes no other exception than its own.
                    signal.pthread_kill(self.thread, signal.SIGINT)
                return

    def _fault_within(self, seconds: float) -> str | None:
        """Look again and again, as Ray learns of a death only a moment later."""
        until = time.monotonic() + seconds
        while not (fault := self._dead_actor() or self._broken_engine()) and time.monotonic() < until:
            time.sleep(0.2)
        return fault

    def _stall(self, still: float, still_when_asked: float, longest: float) -> str | None:
        """Compare seconds without progress, in all and since a request to stop, with what is allowed."""
        if self.stall_seconds is not None and still > self.stall_seconds:
            return f"no progress for {self.stall_seconds:g} s (trainer.stall_seconds), and nothing has died"
        if self.stop_seconds is not None and still_when_asked > max(self.stop_seconds, 2 * longest):
            return f"asked to stop, and no progress for {still_when_asked:.0f} s since (trainer.stop_seconds)"
        return None

    def _dead_actor(self) -> str | None:
        for key, actor in _actors().items():
            cause = actor["DeathCause"]
            died = cause.actor_died_error_context
            left = any(text in died.error_message for text in LEFT)
            wanted = left or died.Reason.Name(died.reason) in ON_PURPOSE
            if actor["State"] != "DEAD" or key in self._dead_before or wanted:
                continue
            _print_last_lines(actor)
            why = (died.error_message or cause.oom_context.error_message or "no reason given").splitlines()[0]
            return f"{_name(actor)} has died: {why}"
        return None

    def _broken_engine(self) -> str | None:
        alive = [actor for actor in _actors().values() if actor["State"] == "ALIVE"]
        servers = {actor["Name"]: actor for actor in alive if "_server_" in actor["Name"]}
        for name in servers.keys() - self._pings.keys():
            self._pings[name] = ray.get_actor(name).__ray_call__.remote(engine_fault)
        pings = list(self._pings.values())
        answers = ray.wait(pings, num_returns=len(pings), timeout=INTERVAL)[0] if pings else []
        for name in [name for name, ping in self._pings.items() if ping in answers]:
            try:
                fault = ray.get(self._pings.pop(name))
            except ray.exceptions.RayError:  # the server itself has died: Ray's table will tell
                continue
            if fault is not None and name in servers:
                _print_last_lines(servers[name])
                return fault.format(_name(servers[name]))
        return None

    def _tell(self, fault: str) -> None:
        try:
            way_out = self.way_out()
        except Exception as error:  # a file system that is gone may be what the run waits for
            way_out = f"how to continue cannot be read: {error}"
        self.why = f"{fault}{RUN_ENDS}{way_out}"
        with suppress(OSError):  # nor has a full disk room for this line
            print(f"{LINE}{self.why}", flush=True)
        threading.Thread(target=_exit_later, name="last resort", daemon=True).start()


def _exit_later() -> None:
    time.sleep(PATIENCE)
    os._exit(1)


def engine_fault(server: Any) -> str | None:
    """What is broken in a rollout server, or None; runs in its process."""
    if getattr(getattr(server, "engine", None), "errored", False):
        return "the engine process of {} (VLLM::EngineCore, or a worker of it) has died"
    failed = getattr(server, "cppo_failed_sync", None)
    return f"a weight sync has failed in {{}}: {failed}" if failed else None


def remember_failed_syncs(module: ModuleType) -> None:
    """Keep the error of a weight sync where `engine_fault` finds it.

    The actor that sends the weights waits for the engine's receipt before it looks at the engine's answer.
    """
    server = module.vLLMHttpServer
    original = server.collective_rpc

    @wraps(original)
    async def collective_rpc(self: Any, method: str | Callable, *args: Any, **kwargs: Any) -> None:
        try:
            return await original(self, method, *args, **kwargs)
        except Exception as error:
            if method == "update_weights_from_ipc":
                self.cppo_failed_sync = type(error).__name__
            raise

    server.collective_rpc = collective_rpc


def with_responses(sample: Callable[..., tuple["KVBatchMeta", dict]]) -> Callable[..., tuple["KVBatchMeta", dict]]:
    """verl's ``ReplayBuffer.sample``, which raises RuntimeError instead of returning a batch without a response.

    verl logs why a prompt has failed and goes on with the others. Where there is none, TransferQueue would refuse what
    comes next: "Received an empty list as keys".
    """

    @wraps(sample)
    def checked(*args: Any, **kwargs: Any) -> tuple["KVBatchMeta", dict]:
        batch, metrics = sample(*args, **kwargs)
        if not batch.keys:
            raise RuntimeError(
                "every prompt of a batch has failed: the first 'Error in _run_prompt' above says why, most often in "
                "the reward function or in the agent loop"
            )
        return batch, metrics

    return checked


def _actors() -> dict[str, dict]:
    """Ray's table of this job's actors, by id."""
    return ray._private.state.actors(job_id=ray.JobID.from_hex(ray.get_runtime_context().get_job_id()))


def _name(actor: dict) -> str:
    died = actor["DeathCause"].actor_died_error_context
    address = actor["Address"]["IPAddress"] or died.node_ip_address
    hosts = {node["NodeManagerAddress"]: f"{node['NodeManagerHostname']}, {address}" for node in ray.nodes()}
    return f"{actor['Name'] or actor['ActorClassName']} (pid {actor['Pid']} on {hosts.get(address, address)})"


def _print_last_lines(actor: dict) -> None:
    """Print the end of what an actor has written, where its log is on this machine."""
    logs = Path(ray._private.worker._global_node.get_logs_dir_path())  # type: ignore[attr-defined]
    texts = [path.read_text(errors="replace") for path in logs.glob(f"worker-*-{actor['Pid']}.*")]
    lines = [line for text in texts for line in text.splitlines() if line and not line.startswith(":")][-10:]
    print("\n  ".join([f"the last lines of {_name(actor)}:", *lines]), flush=True)
