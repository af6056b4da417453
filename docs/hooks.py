"""Checks of the pages while mkdocs builds them: what a page names must exist.

Links and anchors are mkdocs's own business. Here each page's code is read for files of the repository, commands,
targets of the Makefile, methods, and keys of a run's config.
"""

import dataclasses
import functools
import json
import re
from pathlib import Path

import verl  # noqa: F401  loads the plug-in
from hydra import compose, initialize_config_module
from mkdocs.exceptions import PluginError
from omegaconf import OmegaConf

from cppo_verl.cli import COMMANDS
from cppo_verl.plugin import config
from cppo_verl.plugin.losses import SUM_NAMES
from cppo_verl.plugin.step_metrics import pop_shares, shares_by_update

ROOT = Path(__file__).parents[1]
FOLDERS = "cppo_verl|recipes|examples|tests|docker|docs|studies|requirements|hydra_plugins"


@functools.cache
def run_configs():
    """With FSDP's engine on the CPU, and with Megatron's."""
    engines = ["+platform=cpu"], ["model_engine=megatron"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        return [compose("ppo_trainer", overrides=["+method=cppo", "+validation=paper", *engine]) for engine in engines]


def loss_configs() -> list[type]:
    return [cls for cls in vars(config).values() if isinstance(cls, type) and issubclass(cls, config.MethodConfig)]


def is_key(name: str) -> bool:
    """Whether a run has this key: in full, or below ``actor_rollout_ref`` or the actor, as pages shorten it.

    Of ``policy_loss`` it is enough that one method has the key. What stands below ``override_transformer_config`` is
    Megatron's to name.
    """
    name = re.sub(r"(\.override_transformer_config)\..*", r"\1", name)
    if ".policy_loss." in f".{name}":
        return name.rpartition(".")[2] in {field.name for cls in loss_configs() for field in dataclasses.fields(cls)}
    prefixes = ("", "actor_rollout_ref.", "actor_rollout_ref.actor.", "algorithm.")
    missing = object()
    return any(
        OmegaConf.select(config, prefix + name, default=missing) is not missing
        for prefix in prefixes
        for config in run_configs()
    )


@functools.cache
def metric_names() -> set[str]:
    """What a step logs below ``trust_region/``, without the split by sign.

    Most of it is made of the loss's sums; the rest is what the shipped run has logged.
    """
    sums = dict.fromkeys(SUM_NAMES, 1.0)
    logged = pop_shares(dict(sums)) | shares_by_update({name: [value, value] for name, value in sums.items()})
    for file in (ROOT / "examples/analysis/run").rglob("metrics-*.jsonl"):
        logged |= json.loads(file.read_text().splitlines()[-1])["data"]
    names = (re.sub(r"position_\d", "position_N", name) for name in logged)
    names = (name.removeprefix("trust_region/") for name in names if name.startswith("trust_region/"))
    return {name for name in names if not name.startswith(("positive/", "negative/"))}


def unknown_names(markdown: str) -> list[str]:
    """What the code of a page names and the repository does not have."""
    blocks = re.findall(r"^```bash\n(.*?)^```", markdown, re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", markdown, flags=re.DOTALL | re.MULTILINE))
    code = "\n".join(blocks + spans)
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    methods = [file.stem for file in (ROOT / "cppo_verl/config/method").glob("[a-z]*.yaml")]
    unknown = [
        f"no file {x}" for x in re.findall(rf"(?<![\w/.])(?:{FOLDERS})/[\w./-]*\w", code) if not (ROOT / x).exists()
    ]
    unknown += [f"no command cppo-verl {x}" for x in re.findall(r"\bcppo-verl ([a-z]+)", code) if x not in COMMANDS]
    unknown += [f"no target {x} of make" for x in re.findall(r"(?<![\w-])make ([a-z][\w-]*)", code) if x not in targets]
    unknown += [f"no method {x}" for x in re.findall(r"\+method=(\w+)", code) if x not in methods]
    keys = re.findall(r"(?:^|\s)(?:\+\+|\+)?([a-z]\w*(?:\.[a-z]\w*)+)(?:=\S*)?(?=\s|$)", "\n".join(spans))
    metrics = re.findall(r"\btrust_region/([a-z][\w/]*)", "\n".join(spans))
    unknown += [
        f"no metric trust_region/{x}" for x in metrics if x.rstrip("/") not in (*metric_names(), "positive", "negative")
    ]
    sections = "|".join(["actor", "rollout", "policy_loss", *run_configs()[0]])
    unknown += [f"no key {x}" for x in keys if re.match(rf"(?:{sections})\.", x) and not is_key(x)]
    return unknown


def on_page_markdown(markdown, page, **kwargs):
    if unknown := unknown_names(markdown):
        raise PluginError(f"{page.file.src_uri} names what is not there: {'; '.join(unknown)}")
