"""Recipes in small, by recipes/shrink.py."""

import pytest
from documented import ROOT
from trainer_run import Run

from cppo_verl.artifacts.run_reader import read_run


@pytest.mark.parametrize(("scale", "method"), [("qwen3_8b_base", "cppo_kl"), ("qwen3_30b_a3b_base", "cppo")])
def test_a_dense_and_a_moe_recipe_train_on_the_cpu(tmp_path, scale, method):
    # At the recipes' learning rate a step would change the policy by little more than fp32 rounding.
    overrides = [f"scale={scale}", f"method={method}", "actor_rollout_ref.actor.optim.lr=1e-3"]
    run = Run(tmp_path, *overrides, script=ROOT / "recipes" / "shrink.py").finish()
    assert run.code == 0, run.text
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
    assert (tmp_path / "checkpoints" / "global_step_2").is_dir()
    assert run.survivors() == []
