"""A run whose helpers have died, or that stands still, ends itself: a real Ray, with actors in the place of verl's."""

import subprocess
import sys

import pytest

RUN = """
import os, sys, time
import ray
from cppo_verl.plugin import health

health.INTERVAL = 0.3
health.SHORTEST_PAUSE = 0.5
health.PATIENCE = float(sys.argv[2])

@ray.remote(max_concurrency=4)
class Helper:
    engine = type("Engine", (), {"errored": False})()
    async def fall_ill(self): type(self).engine.errored = True
    async def fail_a_sync(self): self.cppo_failed_sync = "RuntimeError"
    async def work(self): time.sleep(1000)
    async def pid(self): print("my last words", flush=True); return os.getpid()

ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
wanted = Helper.remote()
helper = Helper.options(name="vllm_server_0_0").remote()
pid = ray.get(helper.pid.remote())
ray.get(wanted.pid.remote())
begin = time.time()
def steps():
    if sys.argv[1] == "stalled": return None
    # Of steps of a second each it has made four.
    return min(4, int(time.time() - begin)) if sys.argv[1] in ("asked", "slow") else time.time()
stall = {"stalled": 3, "slow": 6}.get(sys.argv[1], 15)
try:
    with health.Watch(steps, stall, lambda: "the same command continues", lambda: sys.argv[1] == "asked"):
        ray.kill(wanted)
        time.sleep(2)
        print("still here", flush=True)
        if sys.argv[1] == "dead": os.kill(pid, 9)
        if sys.argv[1] == "engine": helper.fall_ill.remote()
        if sys.argv[1] == "sync": helper.fail_a_sync.remote()
        if sys.argv[1] == "deaf":
            os.kill(pid, 9)
            while True:
                try: time.sleep(100)
                except KeyboardInterrupt: pass
        if sys.argv[1] == "error":
            os.kill(pid, 9)
            raise KeyError("of something that came of it")
        ray.get(Helper.options(num_cpus=100).remote().pid.remote())
except RuntimeError as error:
    print(f"ended: {error}")
    sys.exit(3)
"""


@pytest.mark.parametrize(
    "fault, code, message",
    [
        ("dead", 3, "ended: vllm_server_0_0 (pid "),
        ("error", 3, "ended: vllm_server_0_0 (pid "),
        ("engine", 3, "ended: the engine process of vllm_server_0_0 (pid "),
        ("sync", 3, "ended: a weight sync has failed in vllm_server_0_0 (pid "),
        ("stalled", 3, "ended: no progress for 3 s (trainer.stall_seconds), and nothing has died; the run ends"),
        ("slow", 3, "ended: no progress for 6 s (trainer.stall_seconds), and nothing has died; the run ends"),
        ("asked", 3, "ended: asked to stop, but no progress for "),
        ("deaf", 1, "has died"),
    ],
)
def test_a_run_that_would_wait_for_ever_ends(fault, code, message):
    patience = "2" if fault == "deaf" else "60"
    run = subprocess.run([sys.executable, "-c", RUN, fault, patience], capture_output=True, text=True, timeout=120)
    assert run.returncode == code, run.stdout + run.stderr
    assert "still here" in run.stdout  # an actor that was let go on purpose ends nothing
    assert message in run.stdout
    assert "; the run ends; the same command continues" in run.stdout
    if fault in ("dead", "engine", "sync"):
        assert "the last lines of vllm_server_0_0" in run.stdout
        assert "\n  my last words" in run.stdout
