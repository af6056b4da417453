"""Recipes in small, by recipes/shrink.py."""

import pytest
from documented import ROOT
from faults import end_by_killing
from trainer_run import Run, wait_for

from cppo_verl.artifacts.run_reader import read_run


@pytest.mark.parametrize(
    ("scale", "method", "phase", "part"),
    [
        ("qwen3_8b_base", "cppo_kl", "update", "TransferQueue storage"),
        ("qwen3_30b_a3b_base", "cppo", "checkpoint", "actor worker"),
    ],
)
def test_a_dense_and_a_moe_recipe_train_on_the_cpu(tmp_path, scale, method, phase, part):
    # At the recipes' learning rate a step would change the policy by little more than fp32 rounding.
    overrides = [f"scale={scale}", f"method={method}", "actor_rollout_ref.actor.optim.lr=1e-3"]
    # After its two steps a run ends by the death of a part, as in tests/e2e/faults.
    overrides += ["trainer.total_training_steps=3", "trainer.save_freq=1", "trainer.test_freq=2"]
    script = ROOT / "recipes" / "shrink.py"
    run = Run(tmp_path, *overrides, script=script, probe=f"{phase}:3").read_until("training for about")
    wait_for(tmp_path / "logs" / "train-0.log", f"the {phase} of step 3 begins", patience=400)
    end_by_killing(run, part)
    results = read_run(tmp_path / "checkpoints")
    for step in (1, 2):
        values = results.steps[step]
        # Both engines have the same weights when an iteration begins, those of experts too ...
        assert 0 <= values["trust_region/first_update/divergence"] < 1e-5
        # ... and the policy leaves them in its other updates.
        assert values["trust_region/later_updates/divergence"] > 1e-3
        assert values["actor/grad_norm"] > 0
        assert values["trust_region/left_out_prompt_share"] < 1
    assert set(results.accuracies()) == {0, 2}
    assert (tmp_path / "checkpoints" / "latest_checkpointed_iteration.txt").read_text() == "2"
