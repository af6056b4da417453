"""verl's v1 trainers with the trust region's metrics, mask_std_0, token dumps, stop requests and the best checkpoint.

trainer.v1.trainer_mode=cppo_<verl's mode> chooses them.
"""

import logging
import os
import socket
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import ray
import torch
import transfer_queue as tq
import wrapt
from omegaconf import DictConfig, OmegaConf, open_dict
from tensordict import TensorDict
from torch import Tensor
from transfer_queue import KVBatchMeta
from verl.trainer.ppo.v1.trainer_base import register_trainer
from verl.trainer.ppo.v1.trainer_colocate_async import PPOTrainerColocateAsync
from verl.trainer.ppo.v1.trainer_separate_async import PPOTrainerSeparateAsync
from verl.trainer.ppo.v1.trainer_sync import PPOTrainerSync
from verl.utils.config import omega_conf_to_dataclass
from verl.utils.debug import marked_timer
from verl.utils.import_utils import load_class_from_fqn
from verl.utils.tensordict_utils import index_select_tensor_dict
from verl.workers.utils.losses import ppo_loss

from cppo_verl.artifacts import run_lock, stop_request
from cppo_verl.artifacts.log_lines import LINE
from cppo_verl.plugin import checkpoints
from cppo_verl.plugin.constants import TOP_K_AGENT_LOOP_MANAGER, TOP_K_ROLLOUT, TRAINER_MODE_PREFIX
from cppo_verl.plugin.health import Watch, with_responses
from cppo_verl.plugin.losses import METRIC_PREFIX
from cppo_verl.plugin.preflight import captured_bytes, lacks_qwens_end_of_turn, missing_files
from cppo_verl.plugin.step_metrics import step_shares
from cppo_verl.plugin.token_recorder import FIELDS, DumpWriter, draw, recording_loss, row_field, take
from cppo_verl.plugin.topk.codec import ABSENT
from cppo_verl.plugin.topk.loss import top_k_ppo_loss
from cppo_verl.plugin.zero_std_filter import changed_rows, leave_out, mini_batch_of_row, rows_with_spread

logger = logging.getLogger(__name__)
logger.setLevel(os.getenv("VERL_LOGGING_LEVEL", "INFO"))


if TYPE_CHECKING:
    from verl.experimental.agent_loop import AgentLoopManager
    from verl.single_controller.ray import RayWorkerGroup
    from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer as VerlTrainer
else:
    VerlTrainer = object


class TrustRegionTrainer(VerlTrainer):
    """Mixin over each of verl's v1 trainers; docs/seams.md lists what it overrides."""

    total_training_steps: int
    saved_step: int | None
    """Of the last checkpoint that was saved since the start."""
    update_sums: dict[str, list[float]]
    """The loss's sums of the step's updates so far."""

    def __init__(self, config: DictConfig) -> None:
        missing = missing_files(config)
        if missing:
            raise FileNotFoundError(f"on {socket.gethostname()}, where the trainer runs: no {', no '.join(missing)}")
        for key in ("stall_seconds", "stop_seconds"):
            seconds = config.trainer.get(key)
            if seconds is not None and (isinstance(seconds, bool | str) or seconds <= 0):
                raise ValueError(f"trainer.{key}={seconds} is not permitted: seconds above 0, or null for never")
        for key in ("actor_rollout_ref.actor.checkpoint.async_save", "critic.checkpoint.async_save"):
            if OmegaConf.select(config, key):
                raise ValueError(
                    f"{key}=True loses every checkpoint: verl leaves it to Megatron-Core to finish one and to name it "
                    f"as the newest, and never asks it to, so that the next attempt begins at step 0; set {key}=false"
                )
        # verl compares the mode with its own.
        config.trainer.v1.trainer_mode = config.trainer.v1.trainer_mode.removeprefix(TRAINER_MODE_PREFIX)
        method = omega_conf_to_dataclass(config.actor_rollout_ref.actor.policy_loss)
        self.captures = getattr(method, "captures", False)  # verl's own losses have no divergence
        if self.captures:
            capture_top_k(config)
        if not config.trainer.get("val_only", False):
            self.lock = run_lock.hold(config.trainer.default_local_dir)
            stop_request.forget_answer(config.trainer.default_local_dir)
        checkpoints.check_resume(config)
        self.saved_step, self.stopping = None, False
        dump = getattr(method, "dump", None)
        self.token_dump = DumpWriter(config, dump) if dump is not None and dump.every else None
        super().__init__(config)

    def _init_tokenizer(self) -> None:
        super()._init_tokenizer()
        actor, model = self.config.actor_rollout_ref.actor, self.config.actor_rollout_ref.model.path
        loop = self.config.actor_rollout_ref.rollout.agent.default_agent_loop
        if loop == "single_turn_agent" and lacks_qwens_end_of_turn(self.tokenizer):
            raise ValueError(
                f"{model} is a qwen2 without <|im_end|>, as DeepSeek's distilled Qwens are: each prompt would fail in "
                "verl's agent loop; set actor_rollout_ref.rollout.agent.default_agent_loop=single_turn_deepseek"
            )
        if not self.captures:
            return
        top_k, tokens = actor.policy_loss.top_k, len(self.tokenizer)
        if tokens > ABSENT:
            raise ValueError(
                f"{model} has {tokens} tokens, the top-K divergences pack ids below {ABSENT}: use divergence=binary_tv"
            )
        if top_k > tokens:
            raise ValueError(
                f"policy_loss.top_k={top_k} is more than the {tokens} tokens that {model} can generate: "
                f"set actor_rollout_ref.actor.policy_loss.top_k={min(20, tokens)}"
            )

    def _setup(self) -> None:
        super()._setup()
        workers = self.actor_rollout_wg
        self.actor_rollout_wg = ActorWorkers(workers)
        if getattr(self, "ref_policy_wg", None) is workers:  # verl tells by it that these are profiled already
            self.ref_policy_wg = self.actor_rollout_wg
        self.actor_rollout_wg.choose_loss(self.config, self.captures, records=self.token_dump is not None)

    def _load_checkpoint(self) -> None:
        super()._load_checkpoint()
        if self.trainer_mode != "sync":
            forget_trained_responses()

    def fit(self, agent_loop_manager: "AgentLoopManager") -> None:
        Path(self.config.trainer.default_local_dir).mkdir(parents=True, exist_ok=True)  # for a request to stop
        checkpoints.log_to_file(self.config)
        self._set_aside_best()
        self.validation: dict[str, float] = {}
        self.step_seconds: list[float] = []
        trainer, self.timing_raw = self.config.trainer, {}
        folder = trainer.default_local_dir
        with (
            Watch(
                # A timer is added to, or grows, as a part of the step ends.
                lambda: (self.global_steps, self.timing_raw.copy()),
                trainer.get("stall_seconds"),
                lambda: checkpoints.how_to_continue(folder),
                lambda: stop_request.waits(folder),
                trainer.get("stop_seconds"),
            ),
            checkpoints.naming_a_full_disk(folder),
        ):
            super().fit(agent_loop_manager)

    def on_train_begin(self) -> None:
        if not self._end_if_asked("before"):
            super().on_train_begin()

    def on_step_end(self) -> None:
        # Where verl itself saves: in its on_step_end the asynchronous trainers go on generating.
        self._end_if_asked("after")
        super().on_step_end()

    def _end_if_asked(self, when: str) -> bool:
        """If there is a stop request, make the current step the last one, with a checkpoint after it."""
        folder, step = self.config.trainer.default_local_dir, self.global_steps
        reason = stop_request.requested(folder)
        if reason is None:
            return False
        if when == "before":
            reason += f" (requested {stop_request.age(folder)} ago)"
        if when == "after" and self.saved_step != step:
            with marked_timer("save_checkpoint", self.timing_raw, color="green"):
                self._save_checkpoint()
        what = f"stopped {when} step {step} of {self.total_training_steps}: {reason}"
        print(f"{LINE}{what}; the same command continues", flush=True)
        stop_request.answer(folder, what)
        self.stopping = True
        # verl's fit ends at this step.
        self.total_training_steps = step if when == "after" else step - 1
        return True

    def _validate(self) -> dict[str, float]:
        # Before its first step a run validates the checkpoint that it resumes from.
        if self.stopping and self.config.trainer.get("val_before_train", True):
            self.validation = {}
            return {}
        return super()._validate()

    def _save_checkpoint(self) -> None:
        trainer = self.config.trainer
        folder, step = os.path.abspath(trainer.default_local_dir), self.global_steps
        self._everywhere(lambda: checkpoints.unshare(folder, step))
        try:
            super()._save_checkpoint()
        except Exception as error:
            raise RuntimeError(checkpoints.not_written(folder, step, error)) from error
        self.saved_step = step
        if trainer.resume_mode != "disable" and checkpoints.newest(folder) == str(step):
            for role in ("actor", "critic"):
                keep = trainer.get(f"max_{role}_ckpt_to_keep")
                self._everywhere(partial(checkpoints.rotate, folder, step, role, keep))

    def _set_aside_best(self) -> None:
        """Keep the best checkpoint of a run that this one does not continue, apart from this one's."""
        folder = Path(self.config.trainer.default_local_dir).absolute()
        if (
            self.config.trainer.get("val_only", False)
            or (name := checkpoints.set_aside_best(folder, self.global_steps)) is None
        ):
            return

        def move() -> None:
            with suppress(FileNotFoundError):
                (folder / checkpoints.BEST).rename(folder / name)

        self._everywhere(move)
        print(f"{LINE}{folder / checkpoints.BEST} is of a later step or another run: now {name}", flush=True)

    def _everywhere(self, function: Callable[[], None]) -> None:
        """Call on every machine that holds a part of a checkpoint, once per worker, and on the trainer's."""
        ray.get([worker.__ray_call__.remote(lambda _: function()) for worker in self.actor_rollout_wg.workers])
        function()

    def _val_metrics_update(
        self, data_sources: list[str], sample_uids: list[str], *args: Any, **kwargs: Any
    ) -> dict[str, float]:
        self.validation = super()._val_metrics_update(data_sources, sample_uids, *args, **kwargs)
        folder = self.config.trainer.get("validation_data_dir")
        if folder:
            checkpoints.write_sources(folder, self.global_steps, sample_uids, data_sources)
        return self.validation

    def on_validate_end(self) -> None:
        """Keep the checkpoint of the step just validated if none before was better."""
        super().on_validate_end()
        accuracy = checkpoints.mean_accuracy(self.validation)
        folder, step = os.path.abspath(self.config.trainer.default_local_dir), self.global_steps
        # A validation alone holds no lock, and its settings need not be those of the run whose best is compared.
        alone = self.config.trainer.get("val_only", False)
        if alone or accuracy is None or checkpoints.newest(folder) != str(step):
            return
        best = checkpoints.best_so_far(folder)
        if best is not None and best["accuracy"] >= accuracy:
            return
        # An attempt that was killed here has left links, perhaps of another checkpoint of this step.
        self._everywhere(lambda: checkpoints.forget_others(folder, best["step"] if best else None))
        self._everywhere(lambda: checkpoints.link_checkpoint(folder, step))
        checkpoints.write_best(folder, step, accuracy)
        self._everywhere(lambda: checkpoints.forget_others(folder, step))

    def _compute_metrics(
        self, batch: KVBatchMeta, metrics: dict, timing_raw: dict[str, float], *args: Any, **kwargs: Any
    ) -> None:
        super()._compute_metrics(batch, metrics, timing_raw, *args, **kwargs)
        self.step_seconds.append(timing_raw["step"])
        left = (self.total_training_steps - self.global_steps) * median(self.step_seconds)
        steps, accuracy = self.total_training_steps, checkpoints.mean_accuracy(self.validation)
        print(checkpoints.progress_line(self.global_steps, steps, left, metrics, accuracy), flush=True)

    def _build_replay_buffer(self) -> "ReplayBuffer":
        replay_buffer = super()._build_replay_buffer()
        # verl polls for finished generations every two seconds; a small model generates in less.
        kwargs = self.config.trainer.v1.sampler.sampler_kwargs
        replay_buffer.poll_interval = kwargs.get("poll_interval", replay_buffer.poll_interval)
        replay_buffer.sample = with_responses(replay_buffer.sample)  # type: ignore[method-assign]  # of this one alone
        return replay_buffer

    def _update_actor(self, batch: KVBatchMeta, metrics: dict) -> KVBatchMeta:
        original = self._leave_out(batch, metrics)
        begin = time.perf_counter()
        drawn = self._draw_rows(batch)
        seconds = time.perf_counter() - begin
        batch = super()._update_actor(batch, metrics)
        if original is not None:
            # The step's other metrics are about all responses.
            self._put(batch, *original)
        if drawn:
            begin = time.perf_counter()
            self._dump_tokens(batch, drawn)
            metrics["timing_s/dump_tokens"] = seconds + time.perf_counter() - begin
        # Between two weight syncs the separate trainer calls this for one mini-batch after another, and verl averages
        # what they report: the step's shares are reported once, with the last.
        if self.local_trigger_step == 0:
            self.update_sums = defaultdict(list)
        for key in [key for key in self.actor_rollout_wg.last_metrics if key.startswith(METRIC_PREFIX)]:
            self.update_sums[key] += self.actor_rollout_wg.last_metrics[key]
            metrics.pop(key, None)
        if self.local_trigger_step == self.parameter_sync_step - 1:
            metrics.update(step_shares(self.update_sums))
        return batch

    def _leave_out(self, batch: KVBatchMeta, metrics: dict) -> tuple[TensorDict, Tensor] | None:
        """Apply mask_std_0 to the stored batch; return the fields and rows to put back after the update, if any."""
        actor, algorithm = self.config.actor_rollout_ref.actor, self.config.algorithm
        filters = actor.policy_loss.get("mask_std_0", False)
        padding = [tag.get("is_padding", False) for tag in batch.tags]
        if not filters and not any(padding):
            return None
        seq_mean = actor.loss_agg_mode.startswith("seq-mean")
        fields = ["uid", "rm_scores", "response_mask", "loss_mask"]
        if seq_mean:
            fields.append("advantages")
        if algorithm.use_kl_in_reward:
            fields.append("token_level_rewards")
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=fields)
        kept = torch.ones(len(padding), dtype=torch.bool)
        if filters:
            rewards = torch.nested.to_padded_tensor(data.get("token_level_rewards", data["rm_scores"]), 0.0).sum(-1)
            keys = batch.keys if algorithm.adv_estimator == "grpo" else None
            kept, share = rows_with_spread(list(data["uid"]), rewards.tolist(), padding, keys)
            metrics["trust_region/left_out_prompt_share"] = share
        if kept.all() and not any(padding):
            return None
        dp_size = max(self.actor_rollout_wg._dispatch_info["actor"]) + 1
        mini_batch_size = actor.ppo_mini_batch_size * self.config.actor_rollout_ref.rollout.n
        mini_batches = mini_batch_of_row(len(batch), dp_size, mini_batch_size)
        masked = leave_out(data, kept, mini_batches, seq_mean=seq_mean)
        rows = changed_rows(data, masked)
        if not len(rows):
            return None
        self._put(batch, masked, rows)
        return data.select(*masked.keys()), rows

    def _draw_rows(self, batch: KVBatchMeta) -> list[int]:
        """Draw the responses whose tokens are dumped at this step, if any, and send the workers their rows."""
        if self.token_dump is None or not self.token_dump.due(self.global_steps):
            return []
        data = tq.kv_batch_get(keys=batch.keys, partition_id=batch.partition_id, select_fields=["response_mask"])
        drawn = draw(data["response_mask"], self.token_dump.settings.responses, self.global_steps)
        if drawn:
            field = row_field(drawn, len(batch))
            self._put(batch, field)
            if batch.fields is not None:  # None: the workers get all fields
                batch.fields = [*batch.fields, *field.keys()]
        return drawn

    def _dump_tokens(self, batch: KVBatchMeta, drawn: list[int]) -> None:
        """Write what the workers recorded in the update."""
        assert self.token_dump is not None  # or no rows would be drawn
        workers = self.actor_rollout_wg.workers
        records = [record for part in ray.get([w.__ray_call__.remote(take) for w in workers]) for record in part]
        keys = {row: batch.keys[row] for row in drawn}
        data = tq.kv_batch_get(keys=list(keys.values()), partition_id=batch.partition_id, select_fields=FIELDS)
        part = None
        if self.parameter_sync_step > 1:
            part = self.local_trigger_step
            for record in records:  # each part is one mini-batch
                record.update += part * self.config.actor_rollout_ref.actor.ppo_epochs
        self.token_dump.write(self.global_steps, part, records, keys, data)

    @staticmethod
    def _put(batch: KVBatchMeta, fields: TensorDict, rows: Tensor | None = None) -> None:
        """Store fields of the batch: of these rows, or of all."""
        keys = batch.keys
        if rows is not None:
            keys, fields = [keys[row] for row in rows.tolist()], index_select_tensor_dict(fields, rows)
        tq.kv_batch_put(keys=keys, partition_id=batch.partition_id, fields=fields)


class ActorWorkers(wrapt.ObjectProxy):
    """verl's worker group of the actor, with verl's logits hook and each mini-batch's metrics.

    verl's `_update_actor` turns the logits hook on for distillation alone, and averages the metrics over mini-batches
    before it returns. Its batches carry each column of the dataset to the workers, see `fields_of_models`.
    """

    def __init__(self, wrapped: "RayWorkerGroup") -> None:
        super().__init__(wrapped)
        self._self_logits_hook = False
        self._self_last_metrics: dict[str, list[float]] = {}

    def choose_loss(self, config: DictConfig, captures: bool, records: bool) -> None:
        """Replace verl's ``ppo_loss`` where the run needs another loss function.

        Args:
            captures: take D_t in the forward pass, by `top_k_ppo_loss`.
            records: keep what the loss sees of the drawn responses, by `recording_loss`.
        """
        self._self_logits_hook = captures
        if not captures and not records:
            return
        actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
        loss = partial(top_k_ppo_loss if captures else ppo_loss, config=actor)
        self.set_loss_fn(partial(recording_loss, loss) if records else loss)

    @property
    def last_metrics(self) -> dict[str, list[float]]:
        """Metrics of the last `update_actor`: one value per mini-batch, in the order of the updates."""
        return self._self_last_metrics

    def update_actor(self, batch: KVBatchMeta) -> TensorDict:
        if self._self_logits_hook:
            batch.extra_info["distillation_use_topk"] = True
        output = self.__wrapped__.update_actor(replace(batch, fields=fields_of_models(batch)))
        self._self_last_metrics = dict(output["metrics"])
        return output

    def compute_log_prob(self, batch: KVBatchMeta) -> KVBatchMeta:
        return self.__wrapped__.compute_log_prob(replace(batch, fields=fields_of_models(batch)))

    def compute_ref_log_prob(self, batch: KVBatchMeta) -> KVBatchMeta:
        return self.__wrapped__.compute_ref_log_prob(replace(batch, fields=fields_of_models(batch)))


NOT_FOR_THE_ACTOR = {"rm_scores", "token_level_rewards", "returns", "dummy_tensor"}
"""Tensors of a stored batch that the advantage estimator, a critic or nobody reads."""


def fields_of_models(batch: KVBatchMeta) -> list[str]:
    """The fields of a stored batch that a forward pass or a loss of verl's actor can read.

    These are most of its tensors, and the images, videos and sounds of its prompts. The others are Python objects, one
    for each response and column of the dataset, which the workers would split into micro-batches one by one.
    """
    schema = tq.get_client().kv_retrieve_meta(batch.keys[:1], batch.partition_id).field_schema
    tensors = {name for name, field in schema.items() if not field["is_non_tensor"]}
    read = (tensors | {"multi_modal_inputs"} & schema.keys()) - NOT_FOR_THE_ACTOR
    return sorted(read if batch.fields is None else read & set(batch.fields))


def forget_trained_responses(partition_id: str = "train") -> None:
    """Clear the responses in TransferQueue whose prompt is gone from it, as a batch's prompts are once it is drawn.

    verl saves TransferQueue before it clears the step's batch. Restored with a checkpoint, that batch would be drawn
    by nobody and cleared by nobody: it would stay in memory, and in each checkpoint to come.
    """
    tags = (tq.kv_list(partition_id) or {}).get(partition_id, {})
    prompts = {key for key, tag in tags.items() if tag.get("is_prompt")}
    trained = [key for key in tags if key.split("_")[0] not in prompts]
    if trained:
        tq.kv_clear(keys=trained, partition_id=partition_id)


def capture_top_k(config: DictConfig) -> None:
    """Replace verl's rollout and agent loops by those that return mu's most likely tokens."""
    rollout = config.actor_rollout_ref.rollout
    with open_dict(config):
        rollout.name = TOP_K_ROLLOUT
        manager = rollout.agent.get("agent_loop_manager_class")
        if manager is None:
            rollout.agent.agent_loop_manager_class = TOP_K_AGENT_LOOP_MANAGER
        else:
            own = load_class_from_fqn(TOP_K_AGENT_LOOP_MANAGER)
            if not issubclass(load_class_from_fqn(manager, "AgentLoopManager"), own):
                raise ValueError(
                    f"actor_rollout_ref.rollout.agent.agent_loop_manager_class={manager} does not hand mu's most "
                    f"likely tokens over: make it a subclass of {TOP_K_AGENT_LOOP_MANAGER}, or use divergence=binary_tv"
                )
    logger.info(captured_bytes(config))


@register_trainer(TRAINER_MODE_PREFIX + "sync")
class TrustRegionTrainerSync(TrustRegionTrainer, PPOTrainerSync):
    pass


@register_trainer(TRAINER_MODE_PREFIX + "colocate_async")
class TrustRegionTrainerColocateAsync(TrustRegionTrainer, PPOTrainerColocateAsync):
    pass


@register_trainer(TRAINER_MODE_PREFIX + "separate_async")
class TrustRegionTrainerSeparateAsync(TrustRegionTrainer, PPOTrainerSeparateAsync):
    pass
