"""Whatever hydra lets a command line say, a run that has chosen a method trains with its loss or does not start."""

import pytest
from commands import GRPO, start_up
from hydra.errors import InstantiationException

from cppo_verl.doctor.checks import compose_command

RULE = "actor_rollout_ref.actor.policy_loss."
RULE_KEY = RULE.rstrip(".")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([f"~{RULE_KEY}"], "policy_loss has become NoneType"),
        ([f"~{RULE_KEY}", "~trust_region"], "policy_loss has become NoneType"),
        ([f"~{RULE_KEY}", f"+{RULE_KEY}={{loss_mode:vanilla}}"], "preflight._target_=None hides the run's own"),
        ([f"{RULE_KEY}={{loss_mode:vanilla}}"], "loss_mode='vanilla' is not permitted"),
        ([f"+{RULE_KEY}={{loss_mode:dppo_tv}}"], "loss_mode='dppo_tv' is not permitted"),
        ([f"++{RULE}loss_mode=vanilla"], "loss_mode='vanilla' is not permitted"),
        ([f"~{RULE}loss_mode", f"+{RULE}loss_mode=vanilla"], "loss_mode='vanilla' is not permitted"),
        ([f"{RULE_KEY}=null"], "policy_loss has become NoneType"),
        ([f"~{RULE}_target_"], "policy_loss has become dict"),
        ([f"~{RULE}_target_", f"{RULE}loss_mode=vanilla"], "policy_loss has become dict"),
        ([f"{RULE}_target_=verl.workers.config.PolicyLossConfig"], "unexpected keyword argument"),
        ([f"{RULE}_target_=cppo_verl.plugin.config.MethodConfig"], "policy_loss has no key"),
        ([f"{RULE}_target_=builtins.dict", f"{RULE}loss_mode=vanilla"], "policy_loss has become dict"),
        ([f"+{RULE}_partial_=true", f"{RULE}loss_mode=vanilla"], "policy_loss has become _DeferredTarget"),
        (["+actor_rollout_ref.actor._recursive_=false"], "'dict' object has no attribute 'strategy'"),
        ([f"{RULE}preflight=null"], r"preflight\.\w+=None hides the run's own"),
        ([f"~{RULE}preflight"], r"preflight\.\w+=None hides the run's own"),
        (["trainer.use_v1=false", f"{RULE}preflight.use_v1=true"], "preflight.use_v1=True hides the run's own False"),
        ([f"+{RULE}_recursive_=false"], "preflight={.*the method fills it from the run; leave it out"),
        ([f"+{RULE}preflight._recursive_=false"], "preflight._recursive_=False hides the run's own"),
        ([f"{RULE}preflight._target_=builtins.dict"], "preflight._target_=builtins.dict hides the run's own"),
        ([f"{RULE}preflight.rollout.top_p=1", "actor_rollout_ref.rollout.top_p=0.9"], r"preflight\.rollout=.* hides"),
        ([f"~{RULE}preflight.rollout.top_p"], r"preflight\.rollout=.* hides the run's own"),
        ([f"{RULE}preflight.rollout.engine_kwargs=null"], r"preflight\.rollout=.* hides the run's own"),
        (
            ["distillation.enabled=true", "distillation.distillation_loss.use_task_rewards=false"],
            "teacher's loss alone",
        ),
        (
            ["actor_rollout_ref.rollout.full_determinism=true"],
            "nothing would be trained: .* gives all requests one seed",
        ),
    ],
)
def test_no_spelling_takes_the_mask_or_its_checks_away(compose, overrides, message):
    config = compose(*GRPO, "+method=cppo", *overrides)
    if "trust_region" not in config:  # what only hydra knows then
        config = compose_command([*GRPO, "+method=cppo", *overrides])
    with pytest.raises((InstantiationException, ValueError), match=message):
        start_up(config)
