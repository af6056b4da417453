"""The study's second instrument: its commands have the loop's settings, its runs become cells."""

import json
import shlex

import numpy as np
import pandas as pd
import pytest
from commands import start_up
from documented import ROOT

from cppo_verl.doctor.checks import compose_command
from studies.trust_regions import results, trainer
from studies.trust_regions.loop import Settings
from studies.trust_regions.results import Cell, final_accuracy

RESULTS = ROOT / "studies/trust_regions/results/evaluation"


def loop(method):
    return results.read(RESULTS / f"{method}_h64_u16_share-0.05.parquet")


@pytest.mark.parametrize("method", trainer.METHODS)
def test_a_command_has_the_settings_and_thresholds_of_the_loops_cell(method, monkeypatch):
    monkeypatch.chdir(ROOT)
    about = loop(method).about
    arguments = shlex.split(trainer.command(loop(method)).replace("$PWD", str(ROOT)))[3:]
    seeds = arguments.index("-m") + 1
    assert arguments[seeds] == "seed=201,202,203,204,205"
    arguments[seeds - 1 : seeds + 1] = ["seed=201"]
    config = compose_command(arguments)
    start_up(config)

    settings, actor, rollout = (
        Settings(**about["settings"]),
        config.actor_rollout_ref.actor,
        config.actor_rollout_ref.rollout,
    )
    assert (config.data.train_batch_size, rollout.n, rollout.temperature) == (settings.prompts, settings.samples, 1.0)
    assert config.data.train_batch_size / actor.ppo_mini_batch_size == settings.updates
    assert config.data.max_response_length == settings.horizon and rollout.ignore_eos
    assert (config.trainer.total_training_steps, actor.grad_clip) == (settings.steps, settings.clip_grad)
    assert (actor.optim.lr, actor.optim.weight_decay, actor.ppo_epochs) == (settings.learning_rate, 0, 1)
    assert (actor.use_kl_loss, actor.entropy_coeff, actor.loss_agg_mode) == (False, 0, "token-mean")
    assert (rollout.dtype, actor.fsdp_config.model_dtype) == ("float32", "fp32")
    wanted = about["thresholds"] or {"delta": 1}
    assert {name: config.trust_region[name] for name in wanted} == wanted


def test_runs_become_a_cell_with_the_loops_columns(tmp_path):
    for seed in (201, 202):
        folder = tmp_path / f"seed={seed}"
        (folder / "hydra").mkdir(parents=True)
        (folder / "hydra/config.yaml").write_text(f"data: {{seed: {seed}}}\n")
        (folder / "hydra/hydra.yaml").write_text("hydra: {}\n")
        lines = [
            {
                "critic/score/mean": seed / 1000 + step / 100,
                "trust_region/masked_share": 0.05,
                "trust_region/budget_rejected_share": 0.4,
                "trust_region/divergence": 1e-3,
            }
            for step in range(1, 11)
        ]
        text = "".join(json.dumps({"step": step, "data": data}) + "\n" for step, data in enumerate(lines, 1))
        (folder / "metrics.jsonl").write_text(text)
    cell = trainer.collect(tmp_path, Cell(pd.DataFrame(), loop("cppo").about))
    assert final_accuracy(cell.rows).to_dict() == pytest.approx({201: 0.301, 202: 0.302})
    assert cell.rows["by_budget"].to_numpy() == pytest.approx(np.full(20, 0.02))
    assert cell.about["command"].startswith("python -m verl.trainer.main_ppo") and "seconds" not in cell.about
