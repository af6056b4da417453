"""The dump of tokens, in the order that it takes; `cppo_verl.artifacts.token_dump` reads what it writes.

`draw`: at a dumping step the trainer draws responses and ships the number of each with the batch.
`recording_loss`: in the workers, around verl's loss, keeps what the loss saw of these responses, on the host.
`take`: the trainer fetches that after the update. `DumpWriter` adds what the trainer has itself and writes one file.

A step that is trained again, by an attempt that resumed from before it, replaces its file, as verl does with that
step's checkpoint. No other file is touched.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from torch import Tensor
from verl.workers.utils.padding import no_padding_2_padding

from cppo_verl.artifacts.atomic import replacing
from cppo_verl.artifacts.token_dump import PATTERN, REASONS, Response, encode
from cppo_verl.core.divergence import binary_divergence
from cppo_verl.plugin.config import CPPOLossConfig, DumpConfig, MethodConfig, PrefixRatioLossConfig, TRMLossConfig
from cppo_verl.plugin.losses import Decision, Observed, Tokens, loss_context

logger = logging.getLogger(__name__)
logger.setLevel(os.getenv("VERL_LOGGING_LEVEL", "INFO"))

ROW = "cppo_dump_row"
"""Field of the batch: the row of a drawn response, -1 of the others, [B, 1] nested."""
FIELDS = ["prompts", "responses", "response_mask", "rollout_log_probs", "advantages", "rm_scores"]
"""What `DumpWriter` needs of the batch."""


# --- the trainer, before the update ---------------------------------------------------------------------------


def draw(response_mask: Tensor, responses: int, step: int) -> list[int]:
    """Rows of a batch, drawn at random without replacement; the same for a step, whatever else was drawn.

    Rows without a valid token, which verl's padding and left-out prompts have become, are not drawn.

    Args:
        response_mask: nested [B, (tokens)].
    """
    valid_before = torch.nn.functional.pad(response_mask.values().cumsum(0), (1, 0))[response_mask.offsets()]
    drawable = valid_before.diff().nonzero().flatten()
    order = torch.randperm(len(drawable), generator=torch.Generator().manual_seed(step))
    return drawable[order[:responses]].sort().values.tolist()


def row_field(drawn: list[int], rows: int) -> TensorDict:
    """`ROW` of a batch."""
    numbers = torch.full((rows,), -1)
    numbers[drawn] = torch.tensor(drawn)
    nested = torch.nested.nested_tensor_from_jagged(numbers, torch.arange(rows + 1))
    return TensorDict({ROW: nested}, batch_size=rows)


# --- the workers ----------------------------------------------------------------------------------------------


@dataclass
class Record:
    """What the loss saw of one response in one update; arrays [L]."""

    row: int
    update: int
    delta_b: float | None
    columns: dict[str, np.ndarray]


@dataclass
class _Kept:
    rows: int = 0
    """Of this rank, seen by the loss since the batch began."""
    records: list[Record] = field(default_factory=list)


_kept = _Kept()


def recording_loss(
    loss: Callable, *, data: TensorDict, model_output: dict | None = None, **kwargs
) -> tuple[Tensor, dict] | dict:
    """``loss``, verl's ``ppo_loss`` or `top_k_ppo_loss`, that keeps what it sees of the drawn responses."""
    if model_output is None or ROW not in data:  # a look at the logits; a step without a dump
        return loss(data=data, model_output=model_output, **kwargs)
    observed: list[Observed] = []
    with loss_context(observed=observed):
        result = loss(data=data, model_output=model_output, **kwargs)
    record(data, model_output, observed)
    return result


@torch.no_grad()
def record(data: TensorDict, model_output: dict, observed: list[Observed]) -> None:
    rows = data[ROW].values()
    # Micro-batches do not say which mini-batch they are of, but these come one after the other.
    update = _kept.rows // (data["global_batch_size"] // data["dp_size"])
    _kept.rows += len(rows)
    drawn = (rows >= 0).nonzero().flatten()
    if not len(drawn):
        return
    delta_b = [None] * len(drawn)
    if observed:
        columns = seen_by_rule(*observed[0])
        region = observed[0][2].region
        if region.delta_b is not None:
            delta_b = region.delta_b[drawn, 0].tolist()
    else:
        log_pi, log_mu = (no_padding_2_padding(model_output["log_probs"], data), data["old_log_probs"])
        log_mu = log_mu.to_padded_tensor(0.0)
        columns = {"log_pi": log_pi, "divergence": binary_divergence(log_pi, log_mu)}
    # One transfer to the host for everything.
    values = torch.stack([x[drawn].float() for x in columns.values()], dim=1).cpu().numpy()
    lengths = data["responses"].offsets().diff()[drawn].tolist()
    for row, length, budget, value in zip(rows[drawn].tolist(), lengths, delta_b, values, strict=True):
        # A copy: a view would keep the whole micro-batch.
        named = dict(zip(columns, value[:, :length].copy(), strict=True))
        _kept.records.append(Record(row, update, budget, named))


def seen_by_rule(method: MethodConfig, tokens: Tokens, decision: Decision) -> dict[str, Tensor]:
    """Columns of a micro-batch, [B, L] each."""
    columns = {
        "log_pi": tokens.log_pi,
        "divergence": decision.divergence,
        "update_mask": decision.update_mask,
        "reason": reasons(method, tokens, decision),
    }
    if isinstance(method, CPPOLossConfig):
        region = decision.region
        columns |= {"weighted_divergence": region.weighted_divergence, "threshold": region.threshold}
    return columns


def reasons(method: MethodConfig, tokens: Tokens, decision: Decision) -> Tensor:
    """Positions in `REASONS`, [B, L]."""
    code = {name: position for position, name in enumerate(REASONS)}
    if isinstance(method, CPPOLossConfig):
        region = decision.region
        reason = torch.where(region.weighted_divergence > method.delta, code["token"], code["budget"])
        reason[tokens.advantages * tokens.log_ratio <= 0] = code["towards_one"]
        reason[region.weighted_divergence <= region.threshold] = code["kept"]
    else:
        rejected = {TRMLossConfig: "response", PrefixRatioLossConfig: "clipped"}[type(method)]
        reason = torch.where(decision.update_mask > 0, code["kept"], code[rejected])
    return reason.masked_fill(~tokens.mask, code[""])


def take(_worker) -> list[Record]:
    """This process's records; called on every worker after the update."""
    global _kept
    records, _kept = _kept.records, _Kept()
    return records


# --- the trainer, after the update ----------------------------------------------------------------------------


class DumpWriter:
    def __init__(self, config: DictConfig, settings: DumpConfig):
        """
        Args:
            config: the run's, for the files' headers.
        """
        self.settings = settings
        self.folder = Path(settings.folder)
        actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
        method = OmegaConf.to_container(actor.policy_loss, resolve=True)
        self.header = {
            "method": {key: value for key, value in method.items() if key != "preflight"},
            "clip_ratio_low": actor.clip_ratio_low,
            "clip_ratio_high": actor.clip_ratio_high,
            "divergence": method.get("divergence", "binary_tv"),
            "trust_region": {key: value for key, value in config.trust_region.items() if key != "dump"},
            "max_response_length": config.data.max_response_length,
            "tokenizer": model.get("tokenizer_path") or model.path,
        }
        self.full = False

    def due(self, step: int) -> bool:
        return step % self.settings.every == 0 and not self.full

    def write(self, step: int, part: int | None, records: list[Record], keys: dict[int, str], data: TensorDict) -> None:
        """Write a step's file, unless the folder would grow beyond its bound or cannot be written to.

        A run does not end over its dump: either is logged, and nothing more is dumped.

        Args:
            part: which of the step's batches, where it has several.
            records: of all workers; those of one model-parallel group tell the same.
            keys: {row: verl's key} of the drawn rows, in the order of ``data``.
            data: `FIELDS` of these rows.
        """
        columns = {name: data[name].unbind() for name in FIELDS}
        rows = {row: {name: x[i].numpy() for name, x in columns.items()} for i, row in enumerate(keys)}
        distinct = {(record.update, record.row): record for record in records}
        responses = [_response(step, distinct[k], keys[k[1]], rows[k[1]]) for k in sorted(distinct)]
        content = encode(responses, self.header | {"step": step})
        name = f"{step:06d}" if part is None else f"{step:06d}-{part:03d}"
        file = self.folder / PATTERN.replace("*", name)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            size = sum(other.stat().st_size for other in self.folder.glob(PATTERN) if other != file) + content.size
            if size > self.settings.megabytes * 1e6:
                self.full = True
                logger.warning(
                    f"no more tokens are dumped: {self.folder} would hold {size / 1e6:.1f} MB after step {step}, more "
                    f"than trust_region.dump.megabytes={self.settings.megabytes}; to go on, raise that or remove files"
                )
                return
            with replacing(file) as (temporary,):
                temporary.write_bytes(content)
        except OSError as error:
            self.full = True
            logger.warning(f"no more tokens are dumped: {error}; choose another trust_region.dump.folder")


def _response(step: int, record: Record, key: str, row: dict[str, np.ndarray]) -> Response:
    mask = row["response_mask"].astype(bool)

    def valid(x: np.ndarray | None) -> np.ndarray | None:
        return None if x is None else np.where(mask, x, 0)

    columns = record.columns
    reason = columns.get("reason")
    return Response(
        step=step,
        update=record.update,
        key=key,
        score=float(row["rm_scores"].sum()),
        delta_b=record.delta_b,
        prompt=row["prompts"],
        response=row["responses"],
        mask=mask,
        log_mu=valid(row["rollout_log_probs"]),
        log_pi=valid(columns["log_pi"]),
        advantage=valid(row["advantages"]),
        divergence=valid(columns["divergence"]),
        weighted_divergence=valid(columns.get("weighted_divergence")),
        threshold=valid(columns.get("threshold")),
        update_mask=valid(columns.get("update_mask")),
        reason=None if reason is None else reason.astype(np.uint8),
    )
