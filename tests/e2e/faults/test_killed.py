"""Any part of a run is killed at any moment: the run ends, says what died and how to continue, and leaves nothing."""

import re
import signal
import time

import pytest
from trainer_run import BRIEF, Run, link

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
SECONDS = 90  # from the death to the end of the command; Ray itself gives a dead control store 60

pytestmark = pytest.mark.nightly  # tests/e2e/distributed/test_resume.py kills a part in each phase in CI


@pytest.mark.parametrize("phase", ["generation", "update", "checkpoint"])
@pytest.mark.parametrize("part", PARTS)
def test_a_run_ends_when_a_part_of_it_is_killed(part, phase, interrupted, tmp_path):
    title, named = PARTS[part]
    link(interrupted, tmp_path)
    command = [*BRIEF, "trainer.save_freq=1", "trainer.total_training_steps=4", "trust_region.dump.every=0"]
    run = Run(tmp_path, *command, probe=f"{phase}:2").until(phase).kill(title)
    begin = time.monotonic()
    run.finish()
    seconds = time.monotonic() - begin
    print(f"{part}, {phase}: exit code {run.code} after {seconds:.0f} s\n{run.text[-3000:]}")
    assert run.survivors() == []
    assert seconds < SECONDS
    if named is None:
        assert run.code == -signal.SIGKILL
        return
    tracker = tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt"
    if part == "control store" and run.code == 0:  # Ray's processes need it for what is new, not for what is there
        assert tracker.read_text() == "4"
        return
    assert run.code not in (0, -signal.SIGKILL)
    assert re.search(named, run.text)
    # That of the second step may have been finished by what was left.
    assert tracker.read_text() in "12"
    if part not in ("driver", "trainer", "raylet", "control store"):
        assert "; the run ends; the same command continues from the checkpoint of step" in run.text
