"""Parts of a run that a test kills, and what is required of the run then."""

import re
import signal
import time

PARTS = {
    # part: (title of its process, what the end of the run names)
    "launcher": ("examples/quickstart/run.py", None),
    "driver": ("-m verl.trainer.main_ppo", "exit code -9"),
    "trainer": ("ray::TaskRunner", "TaskRunner"),
    "actor worker": ("ray::WorkerDict|ray::ActorRolloutRefWorker", "WorkerDict|ActorRolloutRefWorker|actor_rollout"),
    "rollout server": ("ray::vLLMHttpServer", "vllm_server_0_0"),
    "rollout engine": ("VLLM::EngineCore", "VLLM::EngineCore"),
    "TransferQueue controller": ("ray::TransferQueueController", "TransferQueueController"),
    "TransferQueue storage": ("ray::SimpleStorageUnit", "TransferQueueStorageUnit"),
    "reward worker": ("ray::RewardLoopWorker", "reward_loop_worker_0"),
    "agent loop": ("ray::.*AgentLoopWorker", "agent_loop_worker|AgentLoopWorker"),
    "raylet": ("/raylet/raylet", "raylet|Raylet"),
    "control store": ("gcs_server", "GCS"),
}
SECONDS = 90
"""From the death to the end of the command; Ray itself gives a dead control store 60."""


def end_by_killing(run, part):
    """Kill a part of a run and wait for the run's end: in time, with what died and the way on, and nothing left."""
    title, named = PARTS[part]
    begin = time.monotonic()
    run.kill(title)
    run.finish()
    seconds = time.monotonic() - begin
    print(f"{part}: exit code {run.code} after {seconds:.0f} s\n{run.text[-3000:]}")
    assert run.survivors() == []
    assert seconds < SECONDS
    if named is None:
        assert run.code == -signal.SIGKILL
    elif part != "control store" or run.code != 0:  # Ray's processes need it for what is new, not for what is there
        assert run.code not in (0, -signal.SIGKILL)
        assert re.search(named, run.text)
        if part not in ("driver", "trainer", "raylet", "control store"):
            assert "; the run ends; the same command continues from the checkpoint of step" in run.text
