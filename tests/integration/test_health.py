"""A run whose helpers have died, or that stands still, ends itself: a real Ray, with actors in the place of verl's."""

import signal
import subprocess
import sys

import pytest

RUN = """
import os, sys, time
import ray
from cppo_verl.plugin import health

health.INTERVAL = 0.3
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
fault = sys.argv[1]
steps = lambda: None if fault in ("stalled", "asked") else time.monotonic()
stall_seconds = 3 if fault == "stalled" else None
try:
    with health.Watch(steps, stall_seconds, lambda: "the same command continues", lambda: fault == "asked", 3):
        ray.kill(wanted)
        time.sleep(2)
        print("still here", flush=True)
        if fault == "dead": os.kill(pid, 9)
        if fault == "engine": helper.fall_ill.remote()
        if fault == "sync": helper.fail_a_sync.remote()
        if fault == "deaf":
            os.kill(pid, 9)
            while True:
                try: time.sleep(100)
                except KeyboardInterrupt: pass
        if fault == "error":
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
        ("asked", 3, "ended: asked to stop, and no progress for 3 s since (trainer.stop_seconds); the run ends"),
        ("deaf", 1, "has died"),
    ],
)
def test_a_run_that_would_wait_for_ever_ends(fault, code, message):
    patience = "2" if fault == "deaf" else "60"
    # Half of them as a shell starts a background job, with SIGINT ignored.
    handler = signal.SIG_IGN if fault in ("dead", "stalled", "deaf") else signal.SIG_DFL
    run = subprocess.run(
        [sys.executable, "-c", RUN, fault, patience],
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGINT, handler),
    )
    assert run.returncode == code, run.stdout + run.stderr
    assert "still here" in run.stdout  # an actor that was let go on purpose ends nothing
    assert message in run.stdout
    assert "; the run ends; the same command continues" in run.stdout
    if fault in ("dead", "engine", "sync"):
        assert "the last lines of vllm_server_0_0" in run.stdout
        assert "\n  my last words" in run.stdout
