"""Every recipe, through verl's own entry point: what a stranger's command composes is the paper's run."""

import math
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import verl
from documented import shown
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from verl.experimental.agent_loop.agent_loop import _agent_loop_registry
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import omega_conf_to_dataclass, validate_config

from cppo_verl.artifacts.saved_config import flattened
from cppo_verl.data import prepare
from cppo_verl.evaluation import paper_results
from cppo_verl.evaluation.settings import SETTINGS
from cppo_verl.plugin.config import MaskedLossConfig

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
SCALES = sorted(path.stem for path in (RECIPES / "scale").glob("*.yaml"))
METHODS = sorted(path.stem for path in (ROOT / "cppo_verl" / "config" / "method").glob("[!_]*.yaml"))
MODULE = "verl.trainer.main_ppo"
FOLDERS = ["data_dir=/shared/data", "output=/shared/runs/a"]


@pytest.fixture(scope="module")
def recipe():
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(RECIPES), version_base=None):
        yield lambda *overrides: compose("paper", overrides=[*FOLDERS, *overrides])


# prompts, n, minibatch, updates, response, delta, delta_b, budget, T_stop
TABLE = {
    "qwen3_1.7b": (64, 8, 32, 2, 8192, 0.15, 0.015, "fixed", 1120),
    "qwen3_1.7b_base": (64, 8, 32, 2, 8192, 0.15, 0.02, "adaptive", 680),
    "qwen3_8b_base": (128, 8, 32, 4, 8192, 0.15, 0.02, "adaptive", 490),
    "qwen3_30b_a3b_base": (256, 16, 32, 8, 16384, 0.20, 0.02, "adaptive", 560),
    "r1d_1.5b_sanity": (64, 8, 16, 4, 8192, 0.15, 0.015, "fixed", 3500),
}
# No column of the paper's table: the field's test, as DPPO's authors run it.
SANITY = "r1d_1.5b_sanity"


def test_there_is_a_recipe_for_every_column_of_the_papers_table_and_for_the_sanity_test():
    assert set(SCALES) == TABLE.keys() == {*paper_results.MODELS, SANITY}


# eps_low, eps_high, verl's second clip; an eps_low above 1 is no lower bound, as no ratio is below zero.
CLIPS = {"grpo": (0.2, 0.28, 10000), "cispo": (10, 0.2, 3), "minpro": (10, 0.28, 3)}
# delta, delta_avg
TRM = {"trm_max": (0.1, None), "trm_avg": (None, 0.002), "trm_max_avg": (0.1, 0.002)}
# whether T is the padded length, upper clamp of (22), ratio cap
RELEASES = {"cppo_pr6731": (True, 5, 20), "cppo_unirl": (None, 2, None)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", SCALES)
def test_every_pair_passes_verls_checks_and_ours(recipe, scale, method):
    config = recipe(f"scale={scale}", f"method={method}")
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    assert not need_reference_policy(config)  # no KL term
    OmegaConf.to_container(config, resolve=True)
    for part in ("actor", "rollout"):
        omega_conf_to_dataclass(config.actor_rollout_ref[part])
    prompts, n, minibatch, updates, response, delta, delta_b, budget, t_stop = TABLE[scale]
    actor, rollout, data = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout, config.data
    assert (data.train_batch_size, rollout.n, actor.ppo_mini_batch_size) == (prompts, n, minibatch)
    assert data.train_batch_size / actor.ppo_mini_batch_size * actor.ppo_epochs == updates
    assert (data.max_response_length, config.trainer.total_training_steps) == (response, t_stop)
    assert (actor.optim.optimizer, actor.optim.lr, actor.entropy_coeff, actor.use_kl_loss) == ("AdamW", 1e-6, 0, False)
    assert (rollout.temperature, rollout.top_p, rollout.top_k, rollout.name) == (1, 1, -1, "vllm")
    validation = rollout.val_kwargs
    assert (validation.n, validation.temperature, validation.top_p, validation.do_sample) == (16, 0.7, 0.95, True)
    # the best mean on [0, T_stop] needs a validation at T_stop
    assert t_stop % config.trainer.test_freq == 0
    rule = omega_conf_to_dataclass(actor.policy_loss)
    partition = "binary" if scale == SANITY else "topk"
    if method in ("cppo", "cppo_soft", "cppo_no_weights"):
        assert (rule.delta, rule.delta_b, rule.budget) == (delta, delta_b, budget)
    if method in ("dppo", "cppo_no_budget", "cppo_shuffled"):
        assert (rule.delta, rule.budget) == (delta, "none")
    if isinstance(rule, MaskedLossConfig) and method not in RELEASES:
        kl = method == "cppo_kl" or method in TRM
        assert (rule.divergence, rule.top_k) == (f"{partition}_kl" if kl else f"{partition}_tv", 20)
    if method in CLIPS:
        assert (actor.clip_ratio_low, actor.clip_ratio_high, actor.clip_ratio_c) == CLIPS[method]
    if method in TRM:
        assert (rule.divergence, rule.ratio_cap, rule.delta, rule.delta_avg) == (f"{partition}_kl", 20, *TRM[method])
    if method in RELEASES:
        horizon, *rest = RELEASES[method]
        assert (rule.divergence, rule.delta, rule.delta_b, rule.budget) == ("binary_tv", delta, delta_b, "adaptive")
        assert [rule.horizon, rule.budget_clamp, rule.ratio_cap] == [horizon and response, *rest]
        assert (rule.w_min, rule.weights, rule.gate) == (0.8, "linear", "hard")
    # What the text and the releases say differently.
    assert (actor.loss_agg_mode, actor.loss_scale_factor) == ("seq-mean-token-sum-norm", response)
    assert (data.max_prompt_length, config.reward.custom_reward_function.name) == (1024, "math_verify")
    centred = method in RELEASES or scale == SANITY
    assert config.algorithm.norm_adv_by_std_in_grpo == rule.mask_std_0 == (not centred)


def test_verl_reads_every_key_of_its_own_that_a_recipe_sets():
    """A key may be in verl's YAML and its dataclasses, and nowhere else, as nccl_timeout is in 0.9.1."""
    folder = Path(verl.__file__).parent
    files = [path for path in folder.rglob("*.py") if path.parent != folder / "workers" / "config"]
    read = set(re.findall(r"\w+", "\n".join(path.read_text() for path in files)))
    of_verl = ("actor_rollout_ref.", "algorithm.", "critic.", "data.", "reward.", "trainer.")
    of_ours = ("actor_rollout_ref.actor.policy_loss.", "trainer.v1.trainer_mode", "trainer.stall", "trainer.stop")
    for path in RECIPES.rglob("*.yaml"):
        if path.parent.name in ("cluster", "sweep"):
            continue
        for key in flattened(OmegaConf.to_container(OmegaConf.load(path))):
            # what stands below an override_..._config is the engine's own
            name = next((part for part in key.split(".") if part.startswith("override_")), key.rpartition(".")[2])
            if key.startswith(of_verl) and not key.startswith(of_ours):
                assert name in read, f"{path}: {key}"


def test_the_sanity_test_trains_its_model_on_what_prepare_writes_for_it(recipe):
    config = recipe(f"scale={SANITY}")
    assert config.actor_rollout_ref.model.path == "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    (name,) = prepare.FILES["sanity-test"]
    assert config.data.train_files == f"/shared/data/sanity_test/{name}.parquet"
    command = "cppo-verl prepare sanity-test --output /shared/data/sanity_test"
    assert command in (RECIPES / "scale" / f"{SANITY}.yaml").read_text()
    assert command in (ROOT / "docs" / "recipes.md").read_text()
    assert config.actor_rollout_ref.rollout.agent.default_agent_loop in _agent_loop_registry


@pytest.mark.parametrize("scale", paper_results.MODELS)
def test_the_settings_of_a_recipe_are_those_that_the_paper_prints(recipe, scale):
    """As `table --settings` prints them."""
    config = flattened(OmegaConf.to_container(recipe(f"scale={scale}"), resolve=True))
    found = [where(config) if callable(where) else config[where] for where in SETTINGS.values()]
    as_numbers = {"8k": 8192, "16k": 16384, "none": 0}
    for name, ours, printed in zip(SETTINGS, found, paper_results.SETTINGS[scale], strict=True):
        wanted = as_numbers.get(printed, printed)
        assert ours == (wanted if isinstance(ours, str) else float(wanted)), name


@pytest.mark.parametrize(("scale", "experts", "offload"), [("qwen3_30b_a3b_base", 8, True), ("qwen3_1.7b", 1, False)])
def test_another_engine_changes_the_layout_alone_to_that_of_the_pull_request(recipe, scale, experts, offload):
    fsdp, config = recipe(f"scale={scale}"), recipe(f"scale={scale}", "backend=megatron")
    assert fsdp.actor_rollout_ref.actor.strategy == "fsdp2"
    assert fsdp.actor_rollout_ref.actor.fsdp_config.param_offload == offload
    validate_config(config, use_reference_policy=False, use_critic=False)
    actor, layout = config.actor_rollout_ref.actor, config.actor_rollout_ref.actor.megatron
    assert (actor.strategy, config.actor_rollout_ref.rollout.tensor_model_parallel_size) == ("megatron", 2)
    parallel = ("tensor_model", "pipeline_model", "expert_model", "expert_tensor")
    assert [layout[f"{name}_parallel_size"] for name in parallel] == [4, 1, experts, 1]
    assert layout.param_offload == layout.optimizer_offload == offload and actor.optim.lr == 1e-6
    method, before = (omega_conf_to_dataclass(c.actor_rollout_ref.actor).policy_loss for c in (config, fsdp))
    assert method.divergence == "topk_tv"
    assert all(method[f.name] == before[f.name] for f in fields(method) if f.name != "preflight")
    binary = recipe(f"scale={scale}", "backend=megatron", "method=cppo_pr6731")
    assert omega_conf_to_dataclass(binary.actor_rollout_ref.actor).policy_loss.divergence == "binary_tv"


@pytest.mark.parametrize("method", ["cppo", "grpo", "cppo_pr6731"])
def test_one_word_makes_of_any_method_what_both_releases_do(recipe, method):
    config = recipe("scale=qwen3_1.7b", f"method={method}", "+variant=released")
    actor = config.actor_rollout_ref.actor
    assert (actor.loss_agg_mode, actor.loss_scale_factor) == ("seq-mean-token-sum-norm", 8192)
    assert not config.algorithm.norm_adv_by_std_in_grpo and not actor.policy_loss.mask_std_0


# The paper's ablations: scale, further words of the command, T_stop, D_t, delta, delta_b, budget, w_min, weights, gate.
ABLATIONS = {
    "Figure 5, no weight": "qwen3_1.7b method=cppo_no_weights 1120 topk_tv 0.15 0.015 fixed 1.0 linear hard",
    "Figure 5, no budget": "qwen3_1.7b method=cppo_no_budget 1120 topk_tv 0.15 - none 0.8 linear hard",
    "Figure 5, shuffled": "qwen3_1.7b method=cppo_shuffled 1120 topk_tv 0.15 - none 0.8 shuffled hard",
    "Figure 5, soft": "qwen3_1.7b method=cppo_soft 1120 topk_tv 0.15 0.015 fixed 0.8 linear soft",
    "Figure 5, CPPO": "qwen3_1.7b method=cppo 1120 topk_tv 0.15 0.015 fixed 0.8 linear hard",
    "Figure 5, DPPO": "qwen3_1.7b method=dppo 1120 topk_tv 0.15 - none 1.0 linear hard",
    "Figure 6, (.02, .8)": "qwen3_1.7b_base method=cppo 680 topk_tv 0.15 0.02 adaptive 0.8 linear hard",
    "Figure 6, (.03, .8)": "qwen3_1.7b_base method=cppo_fixed 680 topk_tv 0.15 0.03 fixed 0.8 linear hard",
    "Figure 6, (.02, .6)": "qwen3_1.7b_base method=cppo_sensitivity_w60 680 topk_tv 0.15 0.02 adaptive 0.6 linear hard",
    "Figure 6, KL": "qwen3_1.7b_base method=cppo_kl 680 topk_kl 0.1 0.002 adaptive 0.8 linear hard",
    "Figure 6, binary": "qwen3_1.7b_base divergence=binary_tv 680 binary_tv 0.15 0.02 adaptive 0.8 linear hard",
}


@pytest.mark.parametrize("run", ABLATIONS)
def test_an_ablation_at_its_scale_is_the_papers(recipe, run):
    scale, word, t_stop, divergence, delta, delta_b, budget, w_min, weights, gate = ABLATIONS[run].split()
    config = recipe(f"scale={scale}", word)
    rule = omega_conf_to_dataclass(config.actor_rollout_ref.actor.policy_loss)
    assert config.trainer.total_training_steps == int(t_stop)
    assert (rule.divergence, rule.top_k, rule.budget) == (divergence, 20, budget)
    assert (rule.delta, rule.w_min, rule.weights, rule.gate) == (float(delta), float(w_min), weights, gate)
    assert delta_b == "-" or rule.delta_b == float(delta_b)
    assert (rule.budget_clamp, rule.horizon, rule.ratio_cap, rule.mask_std_0) == (2, None, 20, True)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("nodes", [1, 2, 4, 8])
def test_one_to_eight_nodes_divide_what_verl_divides(recipe, scale, nodes):
    config = recipe(f"scale={scale}", f"trainer.nnodes={nodes}")
    gpus = nodes * config.trainer.n_gpus_per_node
    actor, rollout = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    assert actor.ppo_mini_batch_size * rollout.n % gpus == 0
    assert gpus % rollout.tensor_model_parallel_size == 0
    # a response at full length fits into a micro-batch
    assert actor.ppo_max_token_len_per_gpu >= config.data.max_prompt_length + config.data.max_response_length


def test_a_recipe_follows_its_overrides(recipe):
    scale = "scale=qwen3_8b_base"
    rule = "actor_rollout_ref.actor.policy_loss"
    assert OmegaConf.select(recipe(scale, "divergence=binary_tv"), f"{rule}.divergence") == "binary_tv"
    swept = recipe(scale, "trust_region.delta_b=0.03", "method=cppo_soft", "seed=7")
    assert OmegaConf.select(swept, f"{rule}.delta_b") == 0.03
    seeds = ("data.seed", "actor_rollout_ref.actor.data_loader_seed", "actor_rollout_ref.rollout.seed")
    assert {OmegaConf.select(swept, key) for key in (*seeds, "actor_rollout_ref.actor.fsdp_config.seed")} == {7}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["method=cppo", *FOLDERS], "You must specify 'scale'"),
        (["scale=qwen3_9b", *FOLDERS], "Could not find 'scale/qwen3_9b'"),
        (["scale=qwen3_1.7b", "data_dir=/shared/data"], "Missing mandatory value: output"),
        (["scale=qwen3_1.7b", "method=cppo", "trust_region.dleta=0.1", *FOLDERS], "Key 'dleta' is not in struct"),
    ],
)
def test_verls_own_command_says_what_is_missing(arguments, message):
    command = [sys.executable, "-m", MODULE, "--config-dir", str(RECIPES), "--config-name", "paper"]
    result = subprocess.run([*command, *arguments], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1
    assert message in result.stderr


def test_the_pages_table_is_the_papers_and_its_runs_compose(recipe):
    text = (ROOT / "docs" / "recipes.md").read_text()
    for command in re.findall(r"`(scale=[^`]* method=[^`]*)`", text):
        recipe(*command.split())
    table = text.partition("## Table 1")[2]
    models = re.findall(r"`scale=([\w.]+)`", next(line for line in table.splitlines() if line.startswith("| row")))
    assert models == list(paper_results.MODELS)
    for method in paper_results.TABLE[models[0]]:
        row = next(line for line in table.splitlines() if f"`method={method}`" in line)
        for model, cell in zip(models, row.split("|")[2:-1], strict=True):
            recipe(f"scale={model}", f"method={method}")
            values = paper_results.TABLE[model][method]
            if values is paper_results.COLLAPSE:
                assert "collapse" in cell
            else:
                assert [float(value) for value in cell.split()] == [float(value) for value in values]


@pytest.mark.parametrize("scale", SCALES)
def test_the_pages_table_of_costs_is_that_of_the_scales(recipe, scale):
    text = (ROOT / "docs" / "recipes.md").read_text()
    row = next(line for line in text.splitlines() if re.search(rf"`{scale}`.* \| \d+ GB \|", line))
    own = RECIPES / "scale" / f"{scale}.yaml"
    comment = own.read_text() if "GB" in own.read_text() else (RECIPES / "scale" / "qwen3_1.7b_base.yaml").read_text()
    parts = re.search(r"#   training(.*?)#   rollout(.*?)\n(?!#  )", comment, re.DOTALL).groups()
    gigabytes = [sum(float(x) for x in re.findall(r"([\d.]+) GB$", part, re.MULTILINE)) for part in parts]
    nodes = {"one": 1, "four": 4}[row.split("|")[2].strip()]
    assert nodes == recipe(f"scale={scale}").trainer.nnodes
    assert [int(cell.removesuffix(" GB ")) for cell in row.split("|")[3:5]] == [round(x) for x in gigabytes]


@pytest.mark.parametrize("page", ["docs/recipes.md"])
def test_a_sweep_that_a_page_shows_is_one_to_hydra(recipe, page):
    commands = [words for words in shown(page, "python -m verl.trainer.main_ppo") if words[1:3] == ["-m", MODULE]]
    sweeps = [words for words in commands if "-m" in words[3:] or "+sweep" in " ".join(words)]
    assert sweeps
    for command in sweeps:
        # argparse takes the overrides in one piece: those after a -m in their midst are unknown to it.
        args = get_args_parser().parse_args(command[3:])
        swept = [o for o in OverridesParser.create().parse_overrides(args.overrides) if o.is_sweep_override()]
        assert args.multirun == bool(swept)
        points = [override.get_key_element() for override in swept]
        recipe(*(o.input_line for o in OverridesParser.create().parse_overrides(args.overrides) if o not in swept))
        assert points == (["method", "seed"] if swept else [])


@pytest.mark.parametrize("scale", SCALES)
def test_the_sizing_in_a_recipes_comment_is_arithmetic(recipe, scale):
    """The memory that the comment names, recomputed from the model's published shape."""
    text = (RECIPES / "scale" / f"{scale}.yaml").read_text()
    shape = {
        "qwen3_1.7b_base": (1.72e9, 28, 8, 2048),
        "qwen3_8b_base": (8.19e9, 36, 8, 4096),
        "qwen3_30b_a3b_base": (30.5e9, 48, 4, 2048),
        SANITY: (1.78e9, 28, 2, 1536),
    }.get(scale)
    if shape is None:
        assert "- qwen3_1.7b_base" in text
        return
    parameters, layers, kv_heads, hidden = shape
    config = recipe(f"scale={scale}")
    gpus = config.trainer.nnodes * 8
    tensor_parallel = config.actor_rollout_ref.rollout.tensor_model_parallel_size
    tokens = config.actor_rollout_ref.actor.ppo_max_token_len_per_gpu
    gigabytes = [float(x) for x in re.findall(r"([\d.]+) GB", text)]
    kv_bytes = layers * kv_heads * 128 * 2 * 2 / tensor_parallel
    wanted = {
        "sharded training state": parameters * 16 / gpus / 1e9,
        "logits": 3 * tokens * 151936 * 2 / 1e9,
        "rollout weights": parameters * 2 / tensor_parallel / 1e9,
    }
    if scale != "qwen3_1.7b_base":
        wanted["layer inputs"] = layers * tokens * hidden * 2 / 1e9
    for name, value in wanted.items():
        assert any(math.isclose(value, printed, rel_tol=0.02, abs_tol=0.06) for printed in gigabytes), (name, value)
    memory = config.actor_rollout_ref.rollout.gpu_memory_utilization * 80e9
    cached = (memory - wanted["rollout weights"] * 1e9) / kv_bytes
    printed, unit = re.search(r"KV cache at .* a token, ([\d.]+) ([kM]) tokens", text).groups()
    assert math.isclose(cached, float(printed) * {"k": 1e3, "M": 1e6}[unit], rel_tol=0.02)
