"""The README and the pages of docs/: built as a site, opened in a browser, and true of the code."""

import argparse
import dataclasses
import importlib
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import cache, partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from browser import DESKTOP, PHONE, fits, opened
from documented import ROOT, overrides, shown

from cppo_verl.cli import COMMANDS
from cppo_verl.plugin import config

DOCS = ROOT / "docs"
PAGES = ["README.md", *(f"docs/{file.name}" for file in sorted(DOCS.glob("*.md")))]


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site's folder, and its address on a server."""
    folder = tmp_path_factory.mktemp("site")
    build(ROOT, folder)
    quiet = type("Quiet", (SimpleHTTPRequestHandler,), {"log_message": lambda *args: None})
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def build(root, folder):
    """Run mkdocs as `make docs` does; raises CalledProcessError with what it printed."""
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    subprocess.run(command, cwd=root, check=True, text=True, stderr=subprocess.PIPE, env=environment)


@cache
def hooks():
    specification = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


# --- the site ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("viewport", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_every_page_fits_a_phone_and_a_desktop_without_errors(site, browser, viewport):
    folder, address = site
    pages = sorted(folder.glob("*.html"))
    assert len(pages) >= len(PAGES) - 1
    for page in pages:
        with opened(browser, address + page.name, viewport, "dark", site=address) as view:
            assert fits(view), page.name
            assert view.evaluate("[...document.images].filter(x => !x.naturalWidth).map(x => x.src)") == [], page.name


def test_the_search_finds_a_key(site, browser):
    _, address = site
    with opened(browser, address + "index.html", site=address) as view:
        view.click("input[name=query]")
        view.keyboard.type("mask_std_0")
        view.wait_for_selector("a.md-search-result__link[href*=configuration]", state="attached")


def test_a_link_to_nowhere_ends_the_build(tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in ROOT.iterdir():
        if path.name not in ("docs", "build", ".git"):
            (copy / path.name).symlink_to(path)
    shutil.copytree(DOCS, copy / "docs")
    (copy / "docs" / "limits.md").write_text("# Limits\n\n[there](metrics.md#no-such-anchor)\n")
    with pytest.raises(subprocess.CalledProcessError) as failed:
        build(copy, tmp_path / "site")
    assert "no-such-anchor" in failed.value.stderr


@pytest.mark.parametrize(
    ("text", "unknown"),
    [
        ("`cppo_verl/core/no_such.py`", "no file cppo_verl/core/no_such.py"),
        ("```bash\ncppo-verl explain outputs\n```", "no command cppo-verl explain"),
        ("```bash\nmake nothing\n```", "no target nothing of make"),
        ("```bash\npython -m verl.trainer.main_ppo +method=cpo\n```", "no method cpo"),
        ("`trust_region.dleta=0.1`", "no key trust_region.dleta"),
        ("`actor.policy_loss.w_max`", "no key actor.policy_loss.w_max"),
        ("`trust_region/no_such_metric`", "no metric trust_region/no_such_metric"),
    ],
)
def test_a_page_that_names_what_is_gone_ends_the_build(text, unknown):
    assert hooks().unknown_names(text) == [unknown]


@pytest.mark.parametrize("page", PAGES)
def test_a_page_names_only_what_is_there_and_is_short(page):
    text = (ROOT / page).read_text()
    assert hooks().unknown_names(text) == []
    assert len(text.splitlines()) <= (150 if page == "README.md" else 250)


def test_the_readmes_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text()):
        path, _, anchor = target.partition("#")
        if not path.startswith("https://"):
            assert (ROOT / path).exists(), target
            headings = re.findall(r"^#+ (.*)", (ROOT / path).read_text(), re.M) if anchor else []
            assert not anchor or anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings]


# --- tables -----------------------------------------------------------------------------------------------------


def rows(page, first_column):
    """{page section: {name: the other cells}} of the tables whose first column is called ``first_column``."""
    found = {}
    for section in re.split(r"^#+ ", (DOCS / page).read_text(), flags=re.M):
        title, _, body = section.partition("\n")
        table = re.search(rf"^\| {re.escape(first_column)} \|.*\n\|[- |]+\n((?:\|.*\n)+)", body, re.M)
        for line in table[1].splitlines() if table else []:
            name, *cells = (cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1])
            found.setdefault(title, {})[name.strip("`")] = cells
    return found


@pytest.mark.parametrize(
    ("section", "cls", "parent"),
    [
        ("Keys of every method", config.MethodConfig, config.PolicyLossConfig),
        ("Keys of all methods with a mask", config.SurrogateConfig, config.MethodConfig),
        ("Keys of `cppo*`, `dppo`, `drpo` and `trm_*`", config.MaskedLossConfig, config.SurrogateConfig),
        ("Keys of `kpop` and `vaco`", config.NeighbourLossConfig, config.SurrogateConfig),
        ("Keys of `cppo*`, `dppo` and `drpo`", config.CPPOLossConfig, config.MaskedLossConfig),
        ("Keys of `trm_*`", config.TRMLossConfig, config.MaskedLossConfig),
        ("Keys of `minpro` and `pnpo`", config.PrefixRatioLossConfig, config.MethodConfig),
    ],
)
def test_the_tables_of_keys_are_the_configs(section, cls, parent):
    documented = {key: cells[0].strip("`") for key, cells in rows("configuration.md", "key")[section].items()}
    inherited = {field.name for field in dataclasses.fields(parent)} | {"preflight"}
    fields = {field.name: field.default for field in dataclasses.fields(cls) if field.name not in inherited}
    written = {None: "null", True: "true"}
    assert documented == {
        name: written[default]
        if default is None or default is True
        else f"{default:g}"
        if isinstance(default, float)
        else str(default)
        for name, default in fields.items()
    }


def test_the_table_of_metrics_is_what_a_step_logs():
    (documented,) = rows("metrics.md", "`trust_region/`").values()
    assert set(documented) == hooks().metric_names()


def test_every_logger_of_the_page_is_verls(compose):
    from verl.utils.tracking import Tracking

    (loggers,) = (table for section, table in rows("metrics.md", "logger").items() if section == "Loggers")
    for override, _ in loggers.values():
        assert set(compose("+method=cppo", override.strip("`")).trainer.logger) <= set(Tracking.supported_backend)


# --- commands ---------------------------------------------------------------------------------------------------


def commands(part):
    return [(page, words) for page in PAGES for words in shown(page, part)]


@pytest.mark.parametrize(("page", "command"), commands("verl.trainer.main_ppo"), ids=lambda x: " ".join(x)[-40:])
def test_a_training_command_composes(compose, page, command):
    given = [word for word in overrides(command) if "..." not in word]
    if "--config-dir" in command:
        pytest.skip("a recipe: tests/integration/test_recipes.py")
    assert compose(*given).actor_rollout_ref.actor.policy_loss.loss_mode


@pytest.mark.parametrize(("page", "command"), commands("cppo-verl "), ids=lambda x: " ".join(x)[-40:])
def test_a_command_of_the_plug_in_is_understood(page, command):
    name, *arguments = command[command.index("cppo-verl") + 1 :]
    parser = argparse.ArgumentParser()
    importlib.import_module(f"cppo_verl.{COMMANDS[name][0]}").add_arguments(parser)
    parser.parse_args([word for word in arguments if not word.startswith("<") and not word.endswith(">")])


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md"])
def test_the_lines_of_torch_are_the_rule(page):
    from cppo_verl.core import binary_divergence, build_trust_region, update_mask

    (lines,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    generator = torch.Generator().manual_seed(0)
    T, masked = 40, 0
    for _ in range(20):
        mu, pi = torch.rand((2, T), generator=generator, dtype=torch.float64) * 0.5 + 0.25
        pi = 0.8 * mu + 0.2 * pi
        A = torch.randn((), generator=generator, dtype=torch.float64)
        names = {"torch": torch, "T": T, "A": A, "mu": mu, "pi": pi, "w_min": 0.8, "delta": 0.05, "delta_b": 0.01}
        exec(lines, names)
        divergence = binary_divergence(pi.log()[None], mu.log()[None])
        valid = torch.ones(1, T, dtype=torch.bool)
        region = build_trust_region(divergence, valid, delta=0.05, delta_b=0.01, w_min=0.8)
        keep = update_mask(region, (pi / mu).log()[None], A.expand(1, T), delta=0.05)[0]
        assert torch.equal(names.get("keep", names.get("M")), keep.bool())
        masked += (keep == 0).sum()
    assert masked > 20
