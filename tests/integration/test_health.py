"""A run whose helpers have died, or that stands still, ends itself: a real Ray, with actors in the place of verl's."""

import re
import signal
import subprocess
import sys

import pytest

# Runs with the faults that the arguments name, one after the other in one Ray cluster.
RUN = """
import os, signal, sys, threading, time
import ray
from cppo_verl.plugin import health

health.INTERVAL = 0.3
health.NEWS = 60  # as the run waits only until Ray knows

@ray.remote(max_concurrency=4)
class Helper:
    engine = type("Engine", (), {"errored": False})()
    async def fall_ill(self): type(self).engine.errored = True
    async def fail_a_sync(self): self.cppo_failed_sync = "RuntimeError"
    async def work(self): time.sleep(1000)
    async def leave(self): ray.actor.exit_actor()
    async def pid(self): print("my last words", flush=True); return os.getpid()

def run(fault):
    print(f"fault: {fault}", flush=True)
    signal.signal(signal.SIGINT, at_start)
    # A run that has been told to end is ended with its process after that time: only the last one is to be.
    health.PATIENCE = 2 if fault == "deaf" else 600
    wanted, leaving = Helper.remote(), Helper.remote()
    helper = Helper.options(name=f"vllm_server_{fault}").remote()
    pid = ray.get(helper.pid.remote())
    ray.get([wanted.pid.remote(), leaving.pid.remote()])
    standing = threading.Event()
    steps = lambda: None if standing.is_set() else time.monotonic()
    stall_seconds = 1 if fault == "stalled" else None
    try:
        with health.Watch(steps, stall_seconds, lambda: "the same command continues", lambda: fault == "asked", 1):
            ray.kill(wanted)
            leaving.leave.remote()
            time.sleep(2)
            print("still here", flush=True)
            if fault in ("stalled", "asked"): standing.set()
            if fault == "dead": os.kill(pid, 9)
            if fault == "engine": helper.fall_ill.remote()
            if fault == "sync": helper.fail_a_sync.remote()
            if fault == "deaf":
                os.kill(pid, 9)
                while True:
                    try: time.sleep(100)
                    except KeyboardInterrupt: pass
            if fault == "error":
                # Ray learns of the death late.
                (raylet,) = ray._private.worker._global_node.all_processes["raylet"]
                raylet.process.send_signal(signal.SIGSTOP)
                threading.Timer(2, raylet.process.send_signal, [signal.SIGCONT]).start()
                os.kill(pid, 9)
                raise KeyError("of something that came of it")
            ray.get(Helper.options(num_cpus=100).remote().pid.remote())
    except RuntimeError as error:
        print(f"ended: {error}", flush=True)
    ray.kill(helper)

at_start = signal.getsignal(signal.SIGINT)
ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
for fault in sys.argv[1:]:
    run(fault)
"""
FAULTS = {
    "dead": r"ended: vllm_server_dead \(pid ",
    "error": r"ended: vllm_server_error \(pid ",
    "engine": r"ended: the engine process of vllm_server_engine \(pid ",
    "sync": r"ended: a weight sync has failed in vllm_server_sync \(pid ",
    "stalled": r"ended: no progress for 1 s \(trainer.stall_seconds\), and nothing has died; the run ends",
    "asked": r"ended: asked to stop, and no progress for \d+ s since \(trainer.stop_seconds\); the run ends",
    "deaf": "has died",
}
"""What the run says at its end: a pattern."""
IN_THE_BACKGROUND = ["dead", "stalled", "deaf"]
"""Faults of the process that is started as a shell starts a background job, with SIGINT ignored."""


def run(faults, handler):
    """The process of runs with these faults, and {fault: what its run printed}."""
    process = subprocess.run(
        [sys.executable, "-c", RUN, *faults],
        capture_output=True,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
    )
    return process, dict(re.findall(r"^fault: (\w+)\n(.*?)(?=^fault: |\Z)", process.stdout, re.M | re.S))


@pytest.fixture(scope="module")
def background():
    return run(IN_THE_BACKGROUND, signal.SIG_IGN)


@pytest.fixture(scope="module")
def foreground():
    return run([fault for fault in FAULTS if fault not in IN_THE_BACKGROUND], signal.SIG_DFL)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_run_that_would_wait_for_ever_ends(request, fault):
    process, said = request.getfixturevalue("background" if fault in IN_THE_BACKGROUND else "foreground")
    assert fault in said, process.stderr
    said = said[fault]
    assert "still here" in said  # an actor that was let go on purpose, or left by itself, ends nothing
    assert re.search(FAULTS[fault], said), process.stderr
    assert "; the run ends; the same command continues" in said
    if fault in ("dead", "engine", "sync"):
        assert f"the last lines of vllm_server_{fault}" in said
        assert "\n  my last words" in said


def test_a_run_that_does_not_listen_is_ended_with_its_process(background, foreground):
    assert (background[0].returncode, foreground[0].returncode) == (1, 0)
    assert list(background[1])[-1] == "deaf" and "ended:" not in background[1]["deaf"]
