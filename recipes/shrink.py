"""A recipe in two steps on the CPU, with a tiny random model of its scale's architecture.

    python recipes/shrink.py scale=qwen3_30b_a3b_base method=cppo [hydra overrides] --output FOLDER

Makes model and data, runs verl's trainer with the recipe, the overrides and shrink/tiny.yaml, and ends with its
exit code. The number of prompts is such that the recipe's number of updates stays; another size that is overridden
stands as it is given.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

import hydra
from hydra.errors import HydraException

from cppo_verl.data.reasoning_gym import write_parquet
from cppo_verl.launch import trainer_process
from cppo_verl.testing import tiny_models

RECIPES = Path(__file__).resolve().parent
# In the model's folder: which model it stands for.
MARKER = "shrink.json"
# 22 tokens, enough for the K = 20 of the recipes.
TASK = {"min_numbers": 5, "max_numbers": 5, "min_decimals": 0, "max_decimals": 0, "min_value": 10, "max_value": 99}
# {name of a model: its architecture, by transformers' name}.
ARCHITECTURES = {
    r"Qwen3-[\d.]+B-A[\d.]+B": "Qwen3Moe",
    r"Qwen3-[\d.]+B": "Qwen3",
    r"DeepSeek-R1-Distill-Qwen-[\d.]+B": "Qwen2",
}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    # Ten times transformers': with less, a layer of wrong weights would hardly show in the probabilities.
    "initializer_range": 0.2,
}
# What verl's agent loop for DeepSeek's chat template asks the tokenizer for.
DEEPSEEK_TOKENS = ["<｜end▁of▁sentence｜>", "<｜tool▁outputs▁end｜>"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="the run's own folder")
    args, overrides = parser.parse_known_args(argv)
    output = args.output.resolve()
    overrides = [*overrides, f"output={trainer_process.quoted(output)}"]
    overlay = [*overrides, "+shrink=tiny"]
    try:
        recipe, shrunk = compose(overrides), compose(overlay)
        batch = prompts(recipe, shrunk)
        prepare(output, recipe.actor_rollout_ref.model.path, shrunk.trainer.total_training_steps)
    except (ValueError, HydraException) as error:
        print(error, file=sys.stderr)
        return 2
    return train(output, ["--config-dir", str(RECIPES), "--config-name", "paper", *overlay, batch])


def compose(overrides):
    with hydra.initialize_config_dir(str(RECIPES), version_base=None):
        return hydra.compose("paper", overrides=overrides)


def prompts(recipe, shrunk):
    """The override of the number of prompts that makes the recipe's updates of the shrunk minibatches.

    Raises ValueError where the recipe's own minibatches do not divide its prompts.
    """
    batch, minibatch = recipe.data.train_batch_size, recipe.actor_rollout_ref.actor.ppo_mini_batch_size
    if batch % minibatch:
        raise ValueError(
            f"data.train_batch_size={batch} is not permitted: a multiple of "
            f"actor_rollout_ref.actor.ppo_mini_batch_size={minibatch}"
        )
    return f"data.train_batch_size={batch // minibatch * shrunk.actor_rollout_ref.actor.ppo_mini_batch_size}"


def prepare(output, path, steps):
    """Write data and the tiny model that stands for the model ``path`` to ``output``, unless they are there.

    Raises ValueError, and changes nothing, where ``output`` holds anything else or a run that has ended, and where
    ``path`` is neither a Qwen3 nor a DeepSeek-R1-Distill-Qwen.
    """
    architecture = next((name for model, name in ARCHITECTURES.items() if re.search(model, path)), None)
    if architecture is None:
        raise ValueError(
            f"actor_rollout_ref.model.path={path} is no Qwen3 and no DeepSeek-R1-Distill-Qwen: "
            "there is no tiny model of its architecture"
        )
    model_folder = output / "model"
    marker, tracker = model_folder / MARKER, output / "checkpoints" / "latest_checkpointed_iteration.txt"
    if marker.exists():
        held = json.loads(marker.read_text())["stands_for"]
        if held != path:
            raise ValueError(f"{output} holds a shrunk {held}, and {path} is asked for: give another --output")
        # verl would resume it at its end and train nothing.
        if tracker.exists() and int(tracker.read_text()) >= steps:
            raise ValueError(f"{output} holds a run that has ended: give another --output")
        return
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty and was not made by this script: give another --output")

    import pandas
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    train_file, _ = write_parquet("number_sorting", output / "data", train_size=512, validation_size=8, **TASK)
    frame = pandas.read_parquet(train_file)
    tokenizer = tiny_models.build_tokenizer(
        [prompt[0]["content"] for prompt in frame["prompt"]],
        [reward["ground_truth"] for reward in frame["reward_model"]],
    )
    if architecture == "Qwen2":
        tokenizer.add_tokens(DEEPSEEK_TOKENS, special_tokens=True)
    torch.manual_seed(0)
    experts = EXPERTS if architecture == "Qwen3Moe" else {}
    model = tiny_models.build_model(tokenizer, architecture, **SIZES, **experts)
    tiny_models.save(model, tokenizer, model_folder, MARKER, {"stands_for": path})


def train(output, arguments):
    """Run verl's trainer to the end; return its exit code."""
    logs = output / "logs"
    logs.mkdir(exist_ok=True)
    log = logs / f"train-{len(list(logs.glob('train-*.log')))}.log"
    environment = os.environ | {
        "VERL_PLATFORM": "cpu",
        "WANDB_MODE": os.environ.get("WANDB_MODE", "offline"),
        "WANDB_DIR": str(logs),
        "RAY_ADDRESS": "local",  # a Ray of its own, as in the quickstart
    }
    print(f"training for about two minutes; the log is {log}", flush=True)
    try:
        with trainer_process.trainer(arguments, log, environment) as trainer:
            pass
    except KeyboardInterrupt:
        print("interrupted", flush=True)
        return 130
    if trainer.returncode:
        trainer_process.show_failure(trainer, log)
    else:
        print(f"metrics: {output / 'checkpoints'}/metrics-*.jsonl")
    return trainer.returncode


if __name__ == "__main__":
    sys.exit(main())
