import os

import pytest
import torch
from trainer_run import SHORT, Run

# Unit tests are many small tensors: threads only get in each other's way.
torch.set_num_threads(1)
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", "/tmp/cppo_verl_hypothesis")


@pytest.fixture(scope="session")
def compose():
    """Compose a training command's config the way verl.trainer.main_ppo does."""
    import verl  # noqa: F401  loads the plug-in
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module

    def run(*overrides: str, config_name: str = "ppo_trainer", module: str = "verl.trainer.config"):
        with initialize_config_module(module, version_base=None):
            return hydra_compose(config_name, overrides=list(overrides))

    return run


@pytest.fixture(scope="session")
def first(tmp_path_factory):
    """The quickstart in short, six steps on one rank: four updates a rollout batch."""
    return Run(tmp_path_factory.mktemp("quickstart"), *SHORT).finish()


@pytest.fixture(scope="module")  # its event loop would be in the way of other modules' own
def browser():
    import browser as chromium
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = chromium.launch(playwright)
        yield started
        started.close()
