import functools
import gc
import os
import pickle
import re
from pathlib import Path

import pytest
import torch

# Unit tests are many small tensors: threads only get in each other's way.
torch.set_num_threads(1)
# Python's garbage collector would walk a million objects of imported modules again and again: a sixth of the time.
gc.set_threshold(50_000, 20, 100)
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", "/tmp/cppo_verl_hypothesis")
# For the Rays that `ray start` starts in tests; cppo_verl/register.py says why, and does so for the others.
for setting in ("enable_open_telemetry", "enable_metrics_collection", "prestart_worker_first_driver"):
    os.environ[f"RAY_{setting}"] = "false"


def pytest_collection_finish():
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Hand pytest-xdist's workers whole files, of which the tests share runs, and whole folders below tests/e2e.

    A ``--dist`` on the command line is left to xdist.
    """
    from xdist.scheduler import LoadScopeScheduling

    if config.getvalue("dist") != "load":
        return None

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            file = nodeid.split("::")[0]
            return str(Path(file).parent) if re.match("tests/e2e/.+/", file) else file

    return Scheduling(config, log)


@pytest.fixture(autouse=True)
def no_command_line():
    """Forget the command line that hydra keeps for the process: a test must not read that of the test before."""
    yield
    from hydra.core.hydra_config import HydraConfig

    HydraConfig.instance().cfg = None


@pytest.fixture(scope="session", autouse=True)
def parsers_asked_once():
    from parsed_once import each_text_parsed_once

    with each_text_parsed_once():
        yield


@pytest.fixture(scope="session")
def compose():
    """Compose a training command's config the way verl.trainer.main_ppo does."""
    import verl  # noqa: F401  loads the plug-in
    from hydra import compose as hydra_compose
    from hydra import initialize_config_module

    @functools.cache  # many tests begin with the same command
    def composed(overrides: tuple[str, ...], config_name: str, module: str) -> bytes:
        with initialize_config_module(module, version_base=None):
            return pickle.dumps(hydra_compose(config_name, overrides=list(overrides)))

    def run(*overrides: str, config_name: str = "ppo_trainer", module: str = "verl.trainer.config"):
        return pickle.loads(composed(overrides, config_name, module))

    return run


@pytest.fixture(scope="module")  # its event loop would be in the way of other modules' own
def browser():
    import browser as chromium
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = chromium.launch(playwright)
        yield started
        started.close()
