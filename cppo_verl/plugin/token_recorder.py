"""Records the token dump during training; `cppo_verl.artifacts.token_dump` defines its schema and reads it.

1. `draw`: at a dumping step the trainer draws responses at random and ships their row numbers with the batch.
2. `recording_loss`: in the workers, wraps verl's loss and keeps what the loss saw of these responses, on the host.
3. `take`: after the update the trainer fetches these records from the workers.
4. `DumpWriter` adds what only the trainer has, such as prompts and scores, and writes one file.

If an attempt resumes from an earlier step and trains this one again, the step's file is replaced, as verl replaces that
step's checkpoint. No other file is touched.
"""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from tensordict import TensorDict
from torch import Tensor
from verl.workers.utils.padding import no_padding_2_padding

from cppo_verl.artifacts.atomic import replacing
from cppo_verl.artifacts.token_dump import CODE, DECISION_COLUMNS, PATTERN, Response, encode
from cppo_verl.core.divergence import binary_divergence
from cppo_verl.plugin.config import CPPOLossConfig, DumpConfig, MethodConfig, NeighbourLossConfig
from cppo_verl.plugin.constants import CLIP_RATIOS
from cppo_verl.plugin.losses import Decision, Observed, Tokens, loss_context

logger = logging.getLogger(__name__)
logger.setLevel(os.getenv("VERL_LOGGING_LEVEL", "INFO"))

ROW = "cppo_dump_row"
"""Field of the batch, [B, 1] nested: the row number of a drawn response, -1 for the others."""
FIELDS = ["prompts", "responses", "response_mask", "rollout_log_probs", "advantages", "rm_scores"]
"""Fields of the batch that `DumpWriter` needs."""


def draw(response_mask: Tensor, responses: int, step: int) -> list[int]:
    """Draw rows of a batch at random, without replacement; the draw depends on the step alone.

    Rows without a valid token are not drawn: verl's padding and the prompts left out of the update.

    Args:
        response_mask: nested [B, (tokens)].
    """
    valid_before = torch.nn.functional.pad(response_mask.values().cumsum(0), (1, 0))[response_mask.offsets()]  # type: ignore[attr-defined]  # it is nested
    drawable = valid_before.diff().nonzero().flatten()
    order = torch.randperm(len(drawable), generator=torch.Generator().manual_seed(step))
    return drawable[order[:responses]].sort().values.tolist()


def row_field(drawn: list[int], rows: int) -> TensorDict:
    """The field `ROW` of a batch with ``rows`` rows."""
    numbers = torch.full((rows,), -1)
    numbers[drawn] = torch.tensor(drawn)
    nested = torch.nested.nested_tensor_from_jagged(numbers, torch.arange(rows + 1))
    return TensorDict({ROW: nested}, batch_size=rows)


@dataclass
class Record:
    """What the loss saw of one response in one update."""

    row: int
    update: int
    delta_b: float | None
    columns: dict[str, np.ndarray]
    """{field of `Response`: values [L]}, as `token_columns` names them."""


@dataclass
class _Kept:
    rows: int = 0
    """Rows of this rank that the loss has seen since the batch began."""
    records: list[Record] = field(default_factory=list)


_kept = _Kept()


def recording_loss(
    loss: Callable, *, data: TensorDict, model_output: dict | None = None, **kwargs: Any
) -> tuple[Tensor, dict] | dict:
    """Call ``loss``, verl's ``ppo_loss`` or `top_k_ppo_loss`, and record what it sees of the drawn responses."""
    if model_output is None or ROW not in data:  # verl's logits hook; a step without a dump
        return loss(data=data, model_output=model_output, **kwargs)
    observed: list[Observed] = []
    with loss_context(observed=observed):
        result = loss(data=data, model_output=model_output, **kwargs)
    record(data, model_output, observed)
    return result


@torch.no_grad()
def record(data: TensorDict, model_output: dict, observed: list[Observed]) -> None:
    """Keep the drawn rows of a micro-batch; without an observed decision, what verl's own losses are given."""
    rows = data[ROW].values()
    # A micro-batch does not say which mini-batch it belongs to, but mini-batches come one after the other.
    update = _kept.rows // (data["global_batch_size"] // data["dp_size"])
    _kept.rows += len(rows)
    drawn = (rows >= 0).nonzero().flatten()
    if not len(drawn):
        return
    delta_b = [None] * len(drawn)
    if observed:
        method, tokens, decision = observed[0]
        columns = token_columns(method, tokens, decision)
        if decision.region.delta_b is not None:
            delta_b = decision.region.delta_b[drawn, 0].tolist()
    else:
        log_pi = no_padding_2_padding(model_output["log_probs"], data)
        log_mu = data["old_log_probs"].to_padded_tensor(0.0)
        columns = {"log_pi": log_pi, "divergence": binary_divergence(log_pi, log_mu)}
    # One transfer to the host for everything.
    values = torch.stack([x[drawn].float() for x in columns.values()], dim=1).cpu().numpy()
    lengths = data["responses"].offsets().diff()[drawn].tolist()
    for row, length, budget, value in zip(rows[drawn].tolist(), lengths, delta_b, values, strict=True):
        # Copied, because a view would keep the whole micro-batch in memory.
        named = dict(zip(columns, value[:, :length].copy(), strict=True))
        _kept.records.append(Record(row, update, budget, named))


def token_columns(method: MethodConfig, tokens: Tokens, decision: Decision) -> dict[str, Tensor]:
    """log pi_t and every column of the dump's `Decisions` that this method has, [B, L] each.

    A column is looked up by its name in the decision, in its trust region, and among the loss's own inputs. The trust
    region's columns are CPPO's alone: other methods fill it with thresholds that they do not apply.
    """
    computed = tokens._asdict() | decision._asdict() | {"reason": reasons(method, tokens, decision)}
    if isinstance(method, CPPOLossConfig):
        computed |= decision.region._asdict()
    return {name: computed[name] for name in ("log_pi", *DECISION_COLUMNS) if name in computed}


def reasons(method: MethodConfig, tokens: Tokens, decision: Decision) -> Tensor:
    """Why each token's M_t has its value: positions in `REASONS`, [B, L]."""
    if isinstance(method, CPPOLossConfig):
        region = decision.region
        reason = torch.where(region.weighted_divergence > method.delta, CODE["token"], CODE["budget"])
        reason[tokens.advantages * tokens.log_ratio <= 0] = CODE["towards_one"]
        reason[region.weighted_divergence <= region.threshold] = CODE["kept"]
    else:
        rejected = {"trm": "response", "vaco": "response", "kpop": "token", "prefix_ratio": "clipped"}
        name = method.rule if isinstance(method, NeighbourLossConfig) else method.loss_mode
        reason = torch.where(decision.update_mask > 0, CODE["kept"], CODE[rejected[name]])
    return reason.masked_fill(~tokens.mask, CODE[""])


def take(_worker: object) -> list[Record]:
    """Hand over this process's records and forget them; called on every worker after the update."""
    global _kept
    records, _kept = _kept.records, _Kept()
    return records


class DumpWriter:
    """Writes the files of one run's token dump."""

    def __init__(self, config: DictConfig, settings: DumpConfig):
        self.settings = settings
        self.folder = Path(settings.folder)
        actor, model = config.actor_rollout_ref.actor, config.actor_rollout_ref.model
        method = cast(dict, OmegaConf.to_container(actor.policy_loss, resolve=True))
        self.header = {
            "method": {key: value for key, value in method.items() if key != "preflight"},
            **{key: actor[key] for key in CLIP_RATIOS},
            "divergence": method.get("divergence", "binary_tv"),
            "trust_region": {key: value for key, value in config.trust_region.items() if key != "dump"},
            "max_response_length": config.data.max_response_length,
            "tokenizer": model.get("tokenizer_path") or model.path,
        }
        self.full = False

    def due(self, step: int) -> bool:
        return step % self.settings.every == 0 and not self.full

    def write(self, step: int, part: int | None, records: list[Record], keys: dict[int, str], data: TensorDict) -> None:
        """Write a step's file, unless the folder would exceed its size limit or cannot be written to.

        Neither ends the run: it is logged, and nothing more is dumped.

        Args:
            part: the number of the batch within the step, where a step has several.
            records: from all workers; the workers of one model-parallel group send equal ones.
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
    columns = {"log_mu": row["rollout_log_probs"], "advantage": row["advantages"]} | record.columns
    columns = {name: np.where(mask, values, 0) for name, values in columns.items()}
    if "reason" in columns:
        columns["reason"] = columns["reason"].astype(np.uint8)
    return Response(
        step=step,
        update=record.update,
        key=key,
        score=float(row["rm_scores"].sum()),
        delta_b=record.delta_b,
        prompt=row["prompts"],
        response=row["responses"],
        mask=mask,
        **columns,
    )
