"""The page of choices names keys that exist, with the values that the recipes have."""

import re

import pytest
import yaml
from documented import ROOT
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

PAGE = (ROOT / "docs" / "fidelity.md").read_text()
ROWS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if re.match(r"\| (?!choice|method|---)", line)]


@pytest.fixture(scope="module")
def recipe():
    """The composed recipe of some words, composed once."""
    GlobalHydra.instance().clear()
    composed = {}
    with initialize_config_dir(str(ROOT / "recipes"), version_base=None):

        def of(*words):
            scale = () if any(word.startswith("scale=") for word in words) else ("scale=qwen3_1.7b_base",)
            if words not in composed:
                composed[words] = compose("paper", overrides=["data_dir=/d", "output=/o", *scale, *words])
            return composed[words]

        yield of


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_key_exists_and_has_the_value_that_the_page_says(recipe, row):
    settings, _, words = row[-1].partition(" with ")
    words = re.findall(r"`([^`]+)`", words)
    for setting in re.findall(r"`([\w.]+=[^`]+)`", settings):
        key, _, value = setting.partition("=")
        config = recipe(*words)
        parent, _, leaf = key.rpartition(".")
        assert leaf in (OmegaConf.select(config, parent) if parent else config), f"{key} no longer exists"
        wanted = yaml.safe_load(value)
        found = OmegaConf.select(config, key)
        assert found == (float(wanted) if isinstance(found, float) else wanted), key


def test_the_page_has_every_choice_that_can_be_changed():
    keys = re.findall(r"`[\w.]+\.(\w+)=[^`]+`", PAGE)
    ours = {"partition", "top_k", "delta", "delta_b", "budget", "budget_clamp", "w_min", "horizon", "ratio_cap", "gate"}
    ours |= {"mask_std_0", "norm_adv_by_std_in_grpo", "loss_agg_mode", "max_prompt_length", "clip_ratio_c"}
    assert ours <= set(keys)
    assert len(ROWS) > 40
