"""Every example composes, or runs as far as it needs no trainer, as its page says; tests/e2e trains."""

import argparse
import importlib
import re
import runpy
import sys

import pytest
from browser import PHONE, opened
from documented import ROOT, overrides, shown
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config

from cppo_verl.cli import COMMANDS, main

EXAMPLES = ROOT / "examples"
PAGE = "examples/README.md"


def test_the_page_names_every_example():
    text = (EXAMPLES / "README.md").read_text()
    for folder in EXAMPLES.iterdir():
        if folder.is_dir() and folder.name != "__pycache__":
            assert f"{folder.name}/" in text
    for link_target in re.findall(r"\]\(([^)#]+)", text):
        assert (EXAMPLES / link_target).exists(), link_target


def test_the_loss_alone_prints_what_its_page_shows(capsys):
    loss = runpy.run_path(str(EXAMPLES / "loss" / "loss.py"))
    page = (EXAMPLES / "README.md").read_text()
    loss["explain"]()
    explained = capsys.readouterr().out
    assert explained in page
    # The specification's worked example, by hand: c = (0.15, 0.07, 0.042, -0.062), M = (1, 1, 0, 0).
    columns = [line.split() for line in explained.splitlines()[1:5]]
    assert [column[8] for column in columns] == ["0.150", "0.070", "0.042", "-0.062"]
    assert [column[9] for column in columns] == ["1", "1", "0", "0"]
    loss["train"]()
    lines = re.findall(r"reward (\d\.\d+)  masked at each update +(.*)", capsys.readouterr().out)
    assert float(lines[-1][0]) > 0.8
    for _, shares in lines:
        first, *later = (float(share.rstrip("%")) for share in shares.split())
        assert first == 0
        assert max(later) > 0


def composed(command):
    """The config of a command as verl.trainer.main_ppo makes it of its arguments."""
    arguments = command[command.index("verl.trainer.main_ppo") + 1 :]
    folder, name = (arguments[arguments.index(flag) + 1] for flag in ("--config-dir", "--config-name"))
    with initialize_config_dir(str(ROOT / folder), version_base=None):
        return hydra_compose(name, overrides=overrides(arguments))


@pytest.mark.parametrize("command", shown(PAGE, "verl.trainer.main_ppo"), ids=lambda words: words[-1].split("/")[-1])
def test_what_needs_a_gpu_composes_and_passes_verls_checks_and_ours(command):
    config = composed(command)
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    for part in ("actor", "rollout"):
        omega_conf_to_dataclass(config.actor_rollout_ref[part])
    actor = config.actor_rollout_ref.actor
    assert actor.policy_loss.loss_mode == "cppo"
    assert config.trainer.v1.trainer_mode.startswith("cppo_")
    # A micro-batch holds the longest response with its prompt.
    longest = config.data.max_prompt_length + config.data.max_response_length
    assert actor.use_dynamic_bsz
    assert actor.ppo_max_token_len_per_gpu >= longest
    # What verl's trainer of that mode asks for.
    separate = config.trainer.v1.separate_async
    if config.trainer.v1.trainer_mode == "cppo_separate_async":
        assert config.data.train_batch_size == separate.parameter_sync_step * actor.ppo_mini_batch_size


ANALYSES = shown(PAGE, "examples/analysis/run")
COMMANDS_SHOWN = [command for command in shown(PAGE, "cppo-verl ") if command not in ANALYSES]


@pytest.mark.parametrize("command", COMMANDS_SHOWN, ids=lambda words: " ".join(words[1:4]))
def test_the_plug_ins_own_commands_are_understood(command):
    name, *arguments = command[1:]
    parser = argparse.ArgumentParser()
    importlib.import_module(f"cppo_verl.{COMMANDS[name][0]}").add_arguments(parser)
    parser.parse_args(arguments)


@pytest.mark.parametrize("command", ANALYSES, ids=lambda words: words[1])
def test_the_shipped_run_is_analysed_without_training(command, browser, tmp_path, monkeypatch, capsys):
    *arguments, page = command[1:]
    assert arguments[-1] == "--output"
    monkeypatch.chdir(ROOT)
    assert main([*arguments, str(tmp_path / "page.html")]) == 0
    with opened(browser, tmp_path / "page.html", PHONE, "dark") as view:
        text = view.inner_text("body")
    assert "Notes" not in text and "no tokenizer" not in capsys.readouterr().err
    said = {"inspect": "this run (cppo) masks", "calibrate": "trust_region.delta_b=", "report": "30 of 30"}
    assert said[command[1]] in text


def test_gsm8ks_reward_reads_what_its_prompts_ask_for():
    from verl.utils.reward_score import default_compute_score

    from cppo_verl.data.readers import GSM8K_PROMPT

    assert '"#### N"' in GSM8K_PROMPT
    config = composed(shown(PAGE, "examples/gsm8k")[-1])
    assert config.reward.custom_reward_function.path is None
    scores = [default_compute_score("openai/gsm8k", f"3 * 4 = 12\n#### {n}", "12") for n in (12, 13)]
    assert scores == [1, 0]


# --- tools ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tools():
    """The tool example's modules: calculator and chat."""
    folders = [str(EXAMPLES / name) for name in ("tools", "quickstart")]
    sys.path[:0] = folders
    import calculator
    import chat

    for folder in folders:
        sys.path.remove(folder)
    return calculator.calculator, chat


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("42 * 25", "1050"),
        ("-(3 + 4) / 2", "-3.5"),
        ("99999999999 * 99999999999", "9999999999800000000001"),
        ("0.1 + 0.2", "0.3"),
        ("1 / 0", "error: no finite number"),
        ("1e308 * 10", "error: no finite number"),
        ("9 ** 9 ** 9", "error: not an expression"),
        ("__import__('os').getpid()", "error: not an expression"),
        ("True + 1", "error: not an expression"),
        ("'a' * 9", "error: not an expression"),
        ("4 4", "error: not an expression"),
        ("", "error: not an expression"),
        ("1\0", "error: not an expression"),
        ("(" * 199, "error: not an expression"),
        ("-" * 199 + "1", "-1"),
        ("1+" * 200 + "1", "error: not an expression"),
        (12, "error: not an expression"),
    ],
)
def test_the_calculator_computes_and_refuses(tools, expression, result):
    calculator, _ = tools
    assert calculator(expression) == result


def test_the_chat_is_the_same_written_at_once_and_turn_by_turn(tools):
    """As verl's tool agent loop puts it together, with zeros in its mask where the labels are left out."""
    from verl.utils.tokenizer.continuous_token_wiring import create_continuous_token_builder

    _, chat = tools
    question = "Solve the following multiplication: 42 * 25. Give only the result as your final answer."
    tokenizer = chat.build_tokenizer([question])
    builder = create_continuous_token_builder(tokenizer, hf_model_type="qwen3")
    messages = chat.conversation(question, "42 * 25", "1050", "1050")
    whole, labels = chat.encode(tokenizer, messages)

    ids, mask = builder.build_initial_tokens(messages[:1], tools=chat.TOOLS), []
    start = len(ids)
    for turn in (
        '<tool_call>\n{"name": "calculator", "arguments": {"expression": "42 * 25"}}\n</tool_call><|im_end|>',
        "<answer>1050</answer><|im_end|>",
    ):
        merged = builder.merge_assistant_tokens(ids, tokenizer.encode(turn))
        mask, _ = builder.align_response_metadata(merged, mask)
        ids = merged.token_ids
        if "call" in turn:
            merged = builder.merge_context_tokens(messages[:2], messages[:3], ids, tools=chat.TOOLS)
            mask, _ = builder.align_response_metadata(merged, mask)
            ids = merged.token_ids
    assert ids == whole[: len(ids)]
    assert tokenizer.unk_token_id not in ids
    assert mask == [int(label >= 0) for label in labels[start : len(ids)]]
    assert tokenizer.decode([i for i, m in zip(ids[start:], mask, strict=True) if not m]) == (
        "\n<|im_start|>user\n<tool_response>\n1050\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_quickstart_trains_in_a_folder_of_any_name(monkeypatch, tmp_path):
    """hydra's overrides have a grammar, in which the name of a home or of a second download may be none."""
    monkeypatch.syspath_prepend(EXAMPLES / "quickstart")
    import run

    output = tmp_path / "Übung, (1) it's=a"
    asked = ["--cfg", "job", "--resolve", "--package", "trainer.default_local_dir"]
    assert run.train(output, asked, EXAMPLES / "quickstart" / "quickstart.yaml", run.progress) == 0
    assert (output / "logs" / "train-0.log").read_text().splitlines()[-1] == str(output / "checkpoints")
