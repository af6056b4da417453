"""A deliberate break in the real trainer, and the metric of docs/silent-failures.md that shows it."""

import pytest
from trainer_run import BRIEF, Run, link, metrics


@pytest.fixture
def broken(interrupted, tmp_path):
    """Returns the metrics of a run with a break, by step."""
    link(interrupted, tmp_path)

    def run(name, steps, *overrides):
        command = [*BRIEF, f"trainer.total_training_steps={steps}", "trust_region.dump.every=0", *overrides]
        assert (done := Run(tmp_path, *command, probe=f"break:{name}").finish()).code == 0, done.text
        return metrics(tmp_path, 0)

    return run


FIRST = "trust_region/first_update/divergence"


@pytest.mark.nightly
def test_samples_of_another_temperature_than_recorded_show_at_the_first_update(broken, quickstart):
    values = broken("mu", 1, "actor_rollout_ref.rollout.agent.default_agent_loop=colder")
    assert metrics(quickstart.output, 0)[1][FIRST] < 1e-6
    assert values[1][FIRST] > 0.01


@pytest.mark.nightly
def test_log_probabilities_shifted_by_a_token_show_at_the_first_update(broken):
    assert broken("alignment", 1)[1][FIRST] > 0.1


@pytest.mark.nightly
def test_a_mask_that_is_not_applied_shows_in_its_share(broken, quickstart):
    values, sound = broken("mask", 2), metrics(quickstart.output, 0)
    for step in (1, 2):
        assert values[step]["trust_region/masked_share"] == 0 < sound[step]["trust_region/masked_share"]
        assert values[step]["trust_region/later_updates/divergence"] > 1e-3


@pytest.mark.nightly
def test_turned_signs_show_in_the_reward(broken):
    """The batch is half the quickstart's, and its learning rate, so that what falls is no noise."""
    scores = [values["critic/score/mean"] for _, values in sorted(broken("sign", 6).items())]
    assert sum(scores[-2:]) / 2 < scores[0] - 0.1
