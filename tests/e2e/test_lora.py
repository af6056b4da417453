"""The LoRA example on the CPU."""

import subprocess
import sys

import torch
from documented import overrides, shown
from faults import end_by_killing
from peft import PeftModel
from trainer_run import BRIEF, Run, link, metrics
from transformers import AutoModelForCausalLM


def test_a_lora_adapter_reaches_the_rollout_engine(interrupted, tmp_path):
    link(interrupted, tmp_path)
    (command,) = shown("examples/README.md", "lora_rank=8 ")
    # After what this test is about, the run ends by the death of a part, as in tests/e2e/faults.
    short = [*BRIEF, "trainer.total_training_steps=5", "trainer.save_freq=3"]
    run = Run(tmp_path, *overrides(command), *short, probe="generation:4").until("generation")
    end_by_killing(run, "rollout engine")
    assert (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert sorted(metrics(tmp_path, 0)) == [1, 2, 3]
    for step, values in metrics(tmp_path, 0).items():
        assert values["trust_region/first_update/divergence"] < 1e-5, step
        assert values["trust_region/later_updates/divergence"] > 1e-3, step

    (merger,) = shown("examples/README.md", "verl.model_merger")
    checkpoint, target = tmp_path / "checkpoints" / "global_step_3" / "actor", tmp_path / "merged"
    paths = {"--local_dir": checkpoint, "--target_dir": target}
    for flag, path in paths.items():
        merger[merger.index(flag) + 1] = str(path)
    subprocess.run([sys.executable, *merger[1:]], check=True)

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    prompt = torch.arange(5, 15)[None]
    with torch.no_grad():
        before = base(prompt).logits
        after = PeftModel.from_pretrained(base, target / "lora_adapter")(prompt).logits
    assert (after - before).abs().max() > 0.01
