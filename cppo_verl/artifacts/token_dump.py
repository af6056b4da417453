"""A run's dump of tokens: what the trust region saw and did at each token of a few responses, every so many steps.

`trust_region.dump.every=N` writes it (`cppo_verl.plugin.token_recorder`), one parquet file a step. Reading never fails
over a damaged file; what was passed over stands in the ``notes``.
"""

import json
import math
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

FORMAT = 1
HEADER = b"cppo_verl"
"""Key of the file's metadata that holds its header, as JSON."""
PATTERN = "step-*.parquet"
RESPONSES_A_GROUP = 32
"""Responses that a damaged byte can cost."""

REASONS = ("", "kept", "towards_one", "token", "budget", "response", "clipped")
"""Why M_t is what it is; `Response.reason` holds positions in this tuple.

"" is no generated token (tool output). "kept" violates nothing. "towards_one" violates a constraint and is kept as
its update moves rho_t towards one. "token" is w_t D_t > delta, "budget" is c_t < w_t D_t <= delta; "response" was
dropped whole by TRM, "clipped" has its prefix ratio clipped. Under a gate other than the hard one, M_t says how much
of the update these constraints leave.
"""


@dataclass(eq=False, kw_only=True)
class Response:
    """One response at one update. Arrays have an entry a response token, 0 where the mask is false."""

    step: int
    update: int
    """Of the step, from 0, where pi is mu but for the engines' mismatch and an asynchronous trainer's staleness."""
    key: str
    """verl's, {uid of the prompt}_{sample}_{output}."""
    score: float
    """Sum of the reward's scores."""
    delta_b: float | None
    """Prefix-average threshold in force; None for a rule without a budget."""
    prompt: np.ndarray
    """Token ids."""
    response: np.ndarray
    """Token ids."""
    mask: np.ndarray
    """True on the generated tokens, which count as t = 1..T; false on tool output between them."""
    log_mu: np.ndarray
    log_pi: np.ndarray
    advantage: np.ndarray
    divergence: np.ndarray
    """D_t of the method's kind, see the header; binary TV under losses without one."""
    weighted_divergence: np.ndarray | None
    """w_t D_t; None but for CPPO and its ablations."""
    threshold: np.ndarray | None
    """Effective threshold c_t (8); likewise."""
    update_mask: np.ndarray | None
    """M_t in [0, 1]; None under verl's own losses."""
    reason: np.ndarray | None
    """Positions in `REASONS`; None under verl's own losses."""

    @property
    def uid(self) -> str:
        """The prompt's; responses to one prompt share it."""
        return self.key.rsplit("_", 2)[0]

    @property
    def position(self) -> np.ndarray:
        """t = 1..T of each generated token, 0 elsewhere."""
        return np.where(self.mask, np.cumsum(self.mask), 0)


# Where a list is null, the run's loss has no such quantity.
_TYPES = {
    "step": pa.int32(),
    "update": pa.int32(),
    "key": pa.string(),
    "score": pa.float32(),
    "delta_b": pa.float32(),
    "prompt": pa.list_(pa.int32()),
    "response": pa.list_(pa.int32()),
    "mask": pa.list_(pa.bool_()),
    "reason": pa.list_(pa.uint8()),
} | dict.fromkeys(
    ("log_mu", "log_pi", "advantage", "divergence", "weighted_divergence", "threshold", "update_mask"),
    pa.list_(pa.float32()),
)
_SCHEMA = pa.schema([(f.name, _TYPES[f.name]) for f in fields(Response)])
_OPTIONAL = ("delta_b", "weighted_divergence", "threshold", "update_mask", "reason")
_PER_TOKEN = tuple(f.name for f in fields(Response) if pa.types.is_list(_TYPES[f.name]) and f.name != "prompt")


def encode(responses: list[Response], header: dict) -> pa.Buffer:
    """A file's content.

    Args:
        header: what holds for all of them, as JSON can say it: step, settings of the method, divergence, tokenizer.
    """
    columns = {name: [getattr(response, name) for response in responses] for name in _SCHEMA.names}
    schema = _SCHEMA.with_metadata({HEADER: json.dumps({"format": FORMAT} | header).encode()})
    sink = pa.BufferOutputStream()
    # Digits of fp32 repeat too seldom for a dictionary; their leading bytes, split off, repeat often.
    noise = [f"{name}.list.element" for name in _SCHEMA.names if _TYPES[name] == pa.list_(pa.float32())]
    noise.remove("advantage.list.element")  # GRPO's is the same for a whole response
    noise.remove("update_mask.list.element")
    words = [name if not pa.types.is_list(_TYPES[name]) else f"{name}.list.element" for name in _SCHEMA.names]
    pq.write_table(
        pa.table(columns, schema=schema),
        sink,
        row_group_size=RESPONSES_A_GROUP,
        compression="zstd",
        use_dictionary=[name for name in words if name not in noise],
        use_byte_stream_split=noise,
        write_page_checksum=True,
    )
    return sink.getvalue()


@dataclass
class TokenDump:
    path: Path
    responses: list[Response] = field(default_factory=list)
    """In the order of step, update and batch."""
    headers: dict[int, dict] = field(default_factory=dict)
    """{step: header of its file}, see `encode`."""
    notes: list[str] = field(default_factory=list)


def read_tokens(path: Path) -> TokenDump:
    """The dump at ``path``: one file, its folder, or the folder of a run that has one.

    Raises:
        FileNotFoundError: no such path, or a folder without any file of a dump.
    """
    files = [path] if path.is_file() else sorted(path.rglob(PATTERN))
    if not files:
        raise FileNotFoundError(
            f"no dump of tokens at {path}: expected {PATTERN}, which a run with trust_region.dump.every=10 writes"
        )
    dump = TokenDump(path)
    folders = {str(file.parent) for file in files}
    if len(folders) > 1:
        dump.notes.append(f"dumps of {len(folders)} folders are taken for one run's: {', '.join(sorted(folders))}")
    for file in files:
        try:
            _read_file(file, dump)
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            dump.notes.append(f"{file.name}: not readable, skipped ({reason})")
    dump.responses.sort(key=lambda response: (response.step, response.update))
    return dump


def _read_file(file: Path, dump: TokenDump) -> None:
    # Checksums tell what was changed from what was recorded.
    with pq.ParquetFile(file, page_checksum_verification=True) as parquet:
        raw = (parquet.schema_arrow.metadata or {}).get(HEADER)
        if raw is None:
            dump.notes.append(f"{file.name}: no dump of tokens, skipped")
            return
        header = json.loads(raw)
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            found = header.get("format") if isinstance(header, dict) else header
            dump.notes.append(f"{file.name}: of format {found}, skipped; this version reads format {FORMAT}")
            return
        if not parquet.schema_arrow.equals(_SCHEMA):
            missing = sorted(set(_SCHEMA.names) - set(parquet.schema_arrow.names))
            dump.notes.append(f"{file.name}: columns missing or of another type {missing}, skipped")
            return
        lost = 0
        responses, bad = [], {}
        for group in range(parquet.num_row_groups):
            try:
                table = parquet.read_row_group(group)
            except (pa.ArrowException, OSError, ValueError):
                lost += parquet.metadata.row_group(group).num_rows
                continue
            for response in _responses(table):
                fault = _fault(response)
                if fault:
                    bad[fault] = bad.get(fault, 0) + 1
                else:
                    responses.append(response)
    if lost:
        dump.notes.append(f"{file.name}: {lost} response(s) in a damaged part of the file were skipped")
    for fault, count in bad.items():
        dump.notes.append(f"{file.name}: {count} response(s) with {fault} were skipped")
    for step in {response.step for response in responses}:
        dump.headers[step] = header
    dump.responses += responses


def _responses(table: pa.Table) -> list[Response]:
    columns = {}
    for name in _SCHEMA.names:
        column = table[name].combine_chunks()
        if pa.types.is_list(column.type):
            values, ends = column.values.to_numpy(zero_copy_only=False), column.offsets.to_numpy()
            columns[name] = [
                values[begin:end] if valid else None
                for begin, end, valid in zip(ends[:-1], ends[1:], column.is_valid().to_pylist(), strict=True)
            ]
        else:
            columns[name] = column.to_pylist()
    return [Response(**dict(zip(columns, row, strict=True))) for row in zip(*columns.values(), strict=True)]


def _fault(response: Response) -> str | None:
    """What makes a response unusable."""
    for f in fields(Response):
        if getattr(response, f.name) is None and f.name not in _OPTIONAL:
            return f"no {f.name}"
    for name in _PER_TOKEN:
        value = getattr(response, name)
        if value is None:
            continue
        if len(value) != len(response.response):
            return f"{name} of another length than the response"
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            return f"values of {name} that are not finite"
    for name in ("score", "delta_b"):
        if not math.isfinite(getattr(response, name) or 0):
            return f"values of {name} that are not finite"
    if response.reason is not None and len(response.reason) and response.reason.max() >= len(REASONS):
        return "unknown reasons"
    return None
