"""The settings that the paper prints of its runs, beside those of our runs."""

from collections.abc import Callable, Mapping, Sequence

from cppo_verl.artifacts.run_reader import Run
from cppo_verl.artifacts.saved_config import select
from cppo_verl.evaluation import paper_results

Config = Mapping[str, object]

_ACTOR, _ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
_ANSWERS, _LOSS = f"{_ROLLOUT}.val_kwargs", f"{_ACTOR}.policy_loss"


def updates(config: Config) -> object:
    """Updates a step: mini-batches times epochs; None where the config does not say."""
    keys = ("data.train_batch_size", f"{_ACTOR}.ppo_mini_batch_size", f"{_ACTOR}.ppo_epochs")
    batch, mini_batch, epochs = (select(config, key) for key in keys)
    if not (isinstance(batch, int) and isinstance(mini_batch, int) and isinstance(epochs, int) and mini_batch):
        return None
    return batch * epochs // mini_batch


SETTINGS: dict[str, str | Callable[[Config], object]] = {
    "prompts a step": "data.train_batch_size",
    "responses a prompt": f"{_ROLLOUT}.n",
    "prompts an update": f"{_ACTOR}.ppo_mini_batch_size",
    "updates a step": updates,
    "longest response": "data.max_response_length",
    "delta": f"{_LOSS}.delta",
    "delta_b": f"{_LOSS}.delta_b",
    "w_min": f"{_LOSS}.w_min",
    "budget": f"{_LOSS}.budget",
    "T_stop": "trainer.total_training_steps",
    "learning rate": f"{_ACTOR}.optim.lr",
    "entropy term": f"{_ACTOR}.entropy_coeff",
    "KL term": f"{_ACTOR}.use_kl_loss",
    "temperature": f"{_ROLLOUT}.temperature",
    "top-p": f"{_ROLLOUT}.top_p",
    "validation: answers a problem": f"{_ANSWERS}.n",
    "validation: temperature": f"{_ANSWERS}.temperature",
    "validation: top-p": f"{_ANSWERS}.top_p",
}
"""{setting: the key of a run's config, or what to make of the config}, in the order of `paper_results.SETTINGS`."""


def settings_of(runs: Sequence[Run], models: Sequence[str]) -> tuple[list[str], list[list[str]]]:
    """Return header and rows: a setting per row, the paper's value for each model and that of each run.

    A run without a readable config has empty cells, as has a setting that its method lacks.
    """
    header = ["setting", *(f"paper {model}" for model in models), *(run.label for run in runs)]
    configs = [run.saved("config.yaml") for run in runs]
    rows = []
    for number, (name, where) in enumerate(SETTINGS.items()):
        values = [select(config, where) if isinstance(where, str) else where(config) for config in configs]
        printed = (paper_results.SETTINGS[model][number] for model in models)
        rows.append([name, *printed, *("" if value is None else str(value) for value in values)])
    return header, rows
