"""The token dump of a run: what the trust region saw and did at each token of some responses, at every N-th step.

`trust_region.dump.every=N` makes a run write it (`cppo_verl.plugin.token_recorder`), one parquet file per step.
`Decisions` and `Response` are its schema. The recorder, the files, the replay of other methods
(`cppo_verl.analysis.replay`) and the data in the pages take their list of columns from these two classes.

A damaged file never makes reading fail: what was skipped is listed in the ``notes``.
"""

import json
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cppo_verl.artifacts.folders import files_below

FORMAT = 1
HEADER = b"cppo_verl"
"""Key of the file's metadata under which its header is stored, as JSON."""
PATTERN = "step-*.parquet"
ROW_GROUP_SIZE = 32
"""Responses per parquet row group; one corrupted byte loses at most this many."""

REASONS = ("", "kept", "towards_one", "token", "budget", "response", "clipped")
"""Why a token's M_t has its value; `Decisions.reason` holds positions in this tuple.

- "": not a generated token (tool output);
- "kept": violates no constraint;
- "towards_one": violates a constraint, but is kept because its update moves rho_t towards one;
- "token": w_t D_t > delta;
- "budget": c_t < w_t D_t <= delta;
- "response": TRM dropped the whole response;
- "clipped": its (prefix) ratio is clipped.

Under a gate other than the hard one, M_t says how much of the token's update is left.
"""
REJECTING = ("token", "budget", "response", "clipped")
CODE = {name: position for position, name in enumerate(REASONS)}


class Storage(NamedTuple):
    """How parquet stores a field."""

    type: pa.DataType
    repeats: bool = True
    """Whether values recur, so that a dictionary pays. The digits of most fp32 columns do not; only their leading
    bytes do, and these are split off."""


Floats = Annotated[np.ndarray, Storage(pa.list_(pa.float32()), repeats=False)]
RepeatedFloats = Annotated[np.ndarray, Storage(pa.list_(pa.float32()))]
Codes = Annotated[np.ndarray, Storage(pa.list_(pa.uint8()))]
Flags = Annotated[np.ndarray, Storage(pa.list_(pa.bool_()))]
TokenIds = Annotated[np.ndarray, Storage(pa.list_(pa.int32()))]
Integer = Annotated[int, Storage(pa.int32())]
Number = Annotated[float, Storage(pa.float32())]
Text = Annotated[str, Storage(pa.string())]


@dataclass(eq=False, kw_only=True)
class Decisions:
    """What a method decides about the tokens of one response at one update.

    Arrays have one entry per response token, 0 where the response's mask is false. A field is None where the method
    has no such quantity. To record another quantity, add a field here: the recorder finds it by this name in what the
    loss computes (`cppo_verl.plugin.token_recorder.token_columns`).
    """

    divergence: Floats | None = None
    """D_t of the method's kind."""
    weighted_divergence: Floats | None = None
    """w_t D_t, of CPPO and its ablations."""
    threshold: Floats | None = None
    """Effective threshold c_t (8), of CPPO and its ablations."""
    update_mask: RepeatedFloats | None = None
    """M_t in [0, 1]. For verl's own losses a replay sets it to the part of rho_t A_t that is left in the gradient."""
    reason: Codes | None = None
    """Positions in `REASONS`."""
    delta_b: Number | None = None
    """Prefix-average threshold in force; None without a prefix budget."""

    @property
    def rejected(self) -> np.ndarray:
        """1 - M_t per response token: 1 if masked, in between under a smooth gate, 0 if not a generated token.

        Raises:
            ValueError: the decisions of verl's own losses as recorded, which have no M_t.
        """
        if self.update_mask is None or self.reason is None:
            raise ValueError("no update mask was recorded: the run trained with one of verl's own losses")
        return np.where(self.reason == 0, 0, 1 - self.update_mask).astype(np.float32)

    def has_reason(self, *names: str) -> np.ndarray:
        """Whether the reason of each response token is one of these `REASONS`; false if no reason was recorded."""
        return np.isin(-1 if self.reason is None else self.reason, [CODE[name] for name in names])


@dataclass(eq=False, kw_only=True)
class Response(Decisions):
    """One response at one update, with what the run's own method decided about it."""

    step: Integer
    update: Integer
    """The number of the update within the step, from 0. At update 0, pi differs from mu only by engine mismatch and, in
    an asynchronous trainer, by staleness."""
    key: Text
    """verl's key: {uid of the prompt}_{sample}_{output}."""
    score: Number
    """Sum of the reward's scores."""
    prompt: TokenIds
    response: TokenIds
    mask: Flags
    """True on the generated tokens, which count as t = 1..T; false on tool output between them."""
    log_mu: Floats
    log_pi: Floats
    advantage: RepeatedFloats
    divergence: Floats = field()  # not optional here
    """D_t of the kind in the header; binary TV under losses that have none."""

    @property
    def uid(self) -> str:
        """The prompt's uid, which all responses to it share."""
        return self.key.rsplit("_", 2)[0]

    @property
    def position(self) -> np.ndarray:
        """t = 1..T of each generated token, 0 elsewhere."""
        return np.where(self.mask, np.cumsum(self.mask), 0)


def _storage(hint: Any) -> Storage:
    """From a field's type, which may be optional."""
    annotated = next(part for part in (hint, *get_args(hint)) if hasattr(part, "__metadata__"))
    return annotated.__metadata__[0]


_HINTS = get_type_hints(Response, include_extras=True)
_STORAGE = {f.name: _storage(_HINTS[f.name]) for f in fields(Response)}
_OPTIONAL = [name for name in _STORAGE if NoneType in get_args(_HINTS[name])]
_UNBOUNDED = ("threshold", "delta_b")
"""Fields that may be infinite: a divergence without an upper bound may have thresholds that bound nothing."""
_LARGEST_LOG_PROB = 1e-3
"""As in the losses: log-probabilities are sums of rounded terms; more than this above zero is no rounding."""
_SCHEMA = pa.schema([(name, storage.type) for name, storage in _STORAGE.items()])
TOKEN_COLUMNS = tuple(
    name for name, storage in _STORAGE.items() if pa.types.is_list(storage.type) and name not in ("prompt", "response")
)
"""Fields with one entry per response token."""
DECISION_COLUMNS = tuple(f.name for f in fields(Decisions) if f.name in TOKEN_COLUMNS)
"""Those of them that a method decides or computes."""


def encode(responses: list[Response], header: dict) -> pa.Buffer:
    """The content of one file.

    Args:
        header: what all its responses share, as JSON: step, settings of the method, divergence, tokenizer.
    """
    columns = {name: [getattr(response, name) for response in responses] for name in _STORAGE}
    schema = _SCHEMA.with_metadata({HEADER: json.dumps({"format": FORMAT} | header).encode()})
    paths = {name: f"{name}.list.element" if pa.types.is_list(s.type) else name for name, s in _STORAGE.items()}
    sink = pa.BufferOutputStream()
    pq.write_table(
        pa.table(columns, schema=schema),
        sink,
        row_group_size=ROW_GROUP_SIZE,
        compression="zstd",
        use_dictionary=[path for name, path in paths.items() if _STORAGE[name].repeats],
        use_byte_stream_split=[path for name, path in paths.items() if not _STORAGE[name].repeats],
        write_page_checksum=True,
    )
    return sink.getvalue()


@dataclass
class TokenDump:
    path: Path
    responses: list[Response] = field(default_factory=list)
    """Ordered by step and update; within an update, in the order of the batch."""
    headers: dict[int, dict] = field(default_factory=dict)
    """{step: header of its file}, see `encode`."""
    notes: list[str] = field(default_factory=list)
    """What was skipped, and why."""

    @property
    def header(self) -> dict:
        """The last step's."""
        return self.headers[max(self.headers)]


def read_tokens(path: Path) -> TokenDump:
    """Read the dump at ``path``: one file, its folder, or the folder of a run that has one.

    Raises:
        FileNotFoundError: there is no such path, or the folder holds no file of a dump.
    """
    files = [path] if path.is_file() else sorted(files_below(path, PATTERN))
    if not files:
        raise FileNotFoundError(
            f"no token dump at {path}: expected {PATTERN}, which a run with trust_region.dump.every=10 writes"
        )
    dump = TokenDump(path)
    folders = {str(file.parent) for file in files}
    if len(folders) > 1:
        dump.notes.append(f"token dumps in {len(folders)} folders are read as one run's: {', '.join(sorted(folders))}")
    for file in files:
        try:
            _read_file(file, dump)
        except (pa.ArrowException, OSError, ValueError, RecursionError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            dump.notes.append(f"{file.name}: not readable, skipped ({reason})")
    dump.responses.sort(key=lambda response: (response.step, response.update))
    return dump


def _read_file(file: Path, dump: TokenDump) -> None:
    # Without the checksums, a changed byte could pass for a recorded value.
    with file.open("rb") as content, pq.ParquetFile(content, page_checksum_verification=True) as parquet:
        header, fault = _header(parquet.schema_arrow)
        if header is None:
            dump.notes.append(f"{file.name}: {fault}")
            return
        lost, faults = 0, Counter[str]()
        responses: list[Response] = []
        for group in range(parquet.num_row_groups):
            try:
                table = parquet.read_row_group(group, columns=list(_STORAGE))
            except (pa.ArrowException, OSError, ValueError):
                lost += parquet.metadata.row_group(group).num_rows
                continue
            for response in _responses(table):
                if defect := _fault(response):
                    faults[defect] += 1
                else:
                    responses.append(response)
    if lost:
        dump.notes.append(f"{file.name}: {lost} response(s) in a damaged part of the file were skipped")
    for defect, count in faults.items():
        dump.notes.append(f"{file.name}: {count} response(s) with {defect} were skipped")
    dump.headers |= {response.step: header for response in responses}
    dump.responses += responses


def _header(schema: pa.Schema) -> tuple[dict | None, str]:
    """The header of a file; or None, and why the file is skipped."""
    raw = (schema.metadata or {}).get(HEADER)
    if raw is None:
        return None, "not a token dump, skipped"
    header = json.loads(raw)
    found = header.get("format") if isinstance(header, dict) else header
    if not isinstance(header, dict) or found != FORMAT:
        return None, f"of format {found}, skipped; this version reads format {FORMAT}"
    types = dict(zip(schema.names, schema.types, strict=True))
    wrong = sorted(name for name, storage in _STORAGE.items() if types.get(name) != storage.type)
    if wrong:
        return None, f"columns missing or of another type {wrong}, skipped"
    return header, ""


def _responses(table: pa.Table) -> list[Response]:
    columns = {name: table[name] for name in _STORAGE}
    values = [x.to_numpy() if pa.types.is_list(x.type) else x.to_pylist() for x in columns.values()]
    return [Response(**dict(zip(columns, row, strict=True))) for row in zip(*values, strict=True)]


def _usable(name: str, values: np.ndarray | float) -> np.ndarray:
    return ~np.isnan(values) if name in _UNBOUNDED else np.isfinite(values)


def _fault(response: Response) -> str | None:
    """Why a response is unusable; None if it is usable."""
    for name, storage in _STORAGE.items():
        value = getattr(response, name)
        if value is None:
            if name not in _OPTIONAL:
                return f"no {name}"
        elif name in TOKEN_COLUMNS and len(value) != len(response.response):
            return f"{name} of another length than the response"
        elif pa.types.is_floating(getattr(storage.type, "value_type", storage.type)) and not _usable(name, value).all():
            return f"values of {name} that are not finite"
    if any((getattr(response, name)[response.mask] > _LARGEST_LOG_PROB).any() for name in ("log_mu", "log_pi")):
        return "log-probabilities above zero"
    if (response.divergence[response.mask] < 0).any():
        return "values of divergence below zero"
    if response.reason is not None and len(response.reason) and response.reason.max() >= len(REASONS):
        return "unknown reasons"
    return None
