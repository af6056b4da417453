"""The part of a token dump on which methods can be replayed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cppo_verl.artifacts.token_dump import Response, read_tokens

_NEEDED = ("method", "divergence", "clip_ratio_low", "clip_ratio_high", "trust_region", "max_response_length")


@dataclass
class ReplayableDump:
    """Responses with at least one generated token, from files whose header says what a replay needs to know."""

    path: Path
    responses: list[Response]
    """Ordered by step and update."""
    headers: dict[int, dict]
    """{step: header}."""
    notes: list[str]

    @property
    def header(self) -> dict:
        """The last step's header; other methods are replayed at its thresholds."""
        return self.headers[max(self.headers)]


def read(path: Path, steps: Sequence[int] | None = None) -> ReplayableDump:
    """Read the dump at ``path``, or the given steps of it.

    Raises:
        FileNotFoundError: there is no dump.
        ValueError: nothing in it is readable, or it lacks one of ``steps``.
    """
    dump = read_tokens(path)
    notes, headers = dump.notes, dict(dump.headers)
    for step, header in dump.headers.items():
        missing = [key for key in _NEEDED if key not in header]
        missing += [key for key in ("method", "trust_region") if not isinstance(header.get(key, {}), dict)]
        if missing:
            notes.append(f"step {step}: its header lacks {', '.join(missing)}, skipped")
            del headers[step]
    readable = [r for r in dump.responses if r.step in headers]
    responses = [r for r in readable if r.mask.any()]
    if len(responses) < len(readable):
        notes.append(f"{len(readable) - len(responses)} response(s) without a generated token were skipped")
    if not responses:
        raise ValueError("\n".join([*notes, f"no response in {path} is readable"]))
    present = sorted({r.step for r in responses})
    for step in steps or ():
        if step not in present:
            raise ValueError(f"no step {step} in {path}: it has {', '.join(map(str, present))}")
    chosen = steps or present
    return ReplayableDump(path, [r for r in responses if r.step in chosen], {s: headers[s] for s in chosen}, notes)
