"""Any part of a run is killed at any moment: the run ends, says what died and how to continue, and leaves nothing."""

import re
import signal
import time

import psutil
import pytest
from trainer_run import BRIEF, MARK, Run, link, wait_for

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
CI = [("rollout engine", "generation")]
SECONDS = 90  # from the death to the end of the command; Ray itself gives a dead control store 60


def processes(run, title):
    """The processes of a run whose command or title matches."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == run.mark and re.search(title, " ".join(process.cmdline())):
                found.append(process)
        except psutil.Error:
            continue
    return found


def cases():
    for part in PARTS:
        for phase in ("generation", "update", "checkpoint"):
            marks = [] if (part, phase) in CI else [pytest.mark.nightly]
            yield pytest.param(part, phase, id=f"{part}, {phase}", marks=marks)


@pytest.mark.parametrize("part, phase", list(cases()))
def test_a_run_ends_when_a_part_of_it_is_killed(part, phase, interrupted, tmp_path):
    title, named = PARTS[part]
    link(interrupted, tmp_path)
    command = [*BRIEF, "trainer.save_freq=1", "trainer.total_training_steps=4", "trust_region.dump.every=0"]
    run = Run(tmp_path, *command, probe=f"phase:{phase}").read_until("starting Ray")
    log = tmp_path / "logs" / "train-0.log"
    wait_for(log, f"the {phase} of step 2 begins", patience=240)
    victims = processes(run, title)
    assert victims, f"no process {title!r}"
    begin = time.time()
    for victim in victims:
        victim.send_signal(signal.SIGKILL)
    run.finish()
    seconds = time.time() - begin
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
    # The newest whole checkpoint is that of the first step, or of the second if it was killed late in its save.
    assert tracker.read_text() in "12"
    if part not in ("driver", "trainer", "raylet", "control store"):
        assert "; the run ends; the same command continues from the checkpoint of step" in run.text
