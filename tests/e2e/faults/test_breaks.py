"""A run of verl's trainer with an assumption of the loss broken at each step, and what then shows it."""

import pytest
from probe import BREAKS
from trainer_run import BRIEF, Run, link, metrics

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def broken(interrupted, tmp_path_factory):
    output = tmp_path_factory.mktemp("broken")
    link(interrupted, output)
    command = [*BRIEF, "trainer.total_training_steps=20", "trust_region.dump.every=0"]
    command += ["actor_rollout_ref.rollout.agent.default_agent_loop=broken"]
    run = Run(output, *command, probe=f"breaks:{output / 'break'}").finish()
    run.values = {}
    for name, values in zip(BREAKS, metrics(output, 0).values(), strict=False):
        run.values.setdefault(name, values)
    return run


@pytest.mark.parametrize("name", ["temperature", "shift", "sync"])
def test_a_mu_that_is_not_the_samplers_shows_at_the_first_update(broken, name):
    first = "trust_region/first_update/divergence"
    assert broken.values["none"][first] < 1e-6
    assert broken.values[name][first] > 1e-3


def test_a_mask_that_is_not_applied_shows_in_its_share(broken):
    sound, unmasked = broken.values["none"], broken.values["mask"]
    assert sound["trust_region/masked_share"] > 0.005
    assert unmasked["trust_region/masked_share"] < 1e-6
    assert unmasked["trust_region/later_updates/divergence"] > 1e-3


def test_another_denominator_shows_in_the_gradient_alone(broken):
    sound, divided = broken.values["none"], broken.values["denominator"]
    assert divided["actor/grad_norm"] > 2 * sound["actor/grad_norm"]
    assert divided["trust_region/first_update/divergence"] < 1e-6


def test_turned_signs_show_in_the_score(broken):
    scores = [values["critic/score/mean"] for values in metrics(broken.output, 0).values()]
    begin = BREAKS.index("signs")
    assert min(scores[begin + 1 :]) < 0.5 * scores[begin]


def test_logits_in_the_place_of_log_probabilities_end_the_run(broken):
    assert broken.code == 1 and broken.survivors() == []
    assert len(metrics(broken.output, 0)) == BREAKS.index("logits")
    assert "old_log_prob must be finite and not above zero" in (broken.output / "logs" / "train-0.log").read_text()
