"""What `inspect` compares: on one dump the run's own method, and others replayed at the run's thresholds."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from cppo_verl.analysis import replay
from cppo_verl.analysis.replay import Setting
from cppo_verl.artifacts.saved_config import flattened
from cppo_verl.artifacts.token_dump import Decisions, Response, TokenDump, read_tokens
from cppo_verl.plugin.config import CPPOLossConfig, NeighbourLossConfig, TRMLossConfig

RUN = "run"
"""Names the run's own method among those asked for."""


def read(path: Path, steps: Sequence[int] | None = None) -> TokenDump:
    """Read the dump at ``path``, or the given steps of it.

    Its responses have at least one generated token, its headers say what a replay needs to know.

    Raises:
        FileNotFoundError: there is no dump.
        ValueError: nothing in it is readable, or it lacks one of ``steps``.
    """
    dump = read_tokens(path)
    for step, header in list(dump.headers.items()):
        if missing := replay.lacking(header):
            dump.notes.append(f"step {step}: its header lacks {', '.join(missing)}, skipped")
            del dump.headers[step]
    readable = [r for r in dump.responses if r.step in dump.headers]
    responses = [r for r in readable if r.mask.any()]
    if len(responses) < len(readable):
        dump.notes.append(f"{len(readable) - len(responses)} response(s) without a generated token were skipped")
    if not responses:
        raise ValueError("\n".join([*dump.notes, f"no response in {path} is readable"]))
    present = sorted({r.step for r in responses})
    for step in steps or ():
        if step not in present:
            raise ValueError(f"no step {step} in {path}: it has {', '.join(map(str, present))}")
    chosen = steps or present
    dump.responses = [r for r in responses if r.step in chosen]
    dump.headers = {step: dump.headers[step] for step in chosen}
    return dump


@dataclass(frozen=True)
class Method:
    label: str
    settings: dict[int, Setting]
    """{step: its setting}; the run's own may change from step to step."""
    recorded: bool = False
    """Whether the dump has this method's decisions, unless it is one of verl's own losses."""

    @property
    def about(self) -> str:
        """Kind of D_t and thresholds."""
        return "; then ".join(dict.fromkeys(map(_about, self.settings.values())))

    def delta(self, response: Response) -> float | None:
        """Token threshold; None for a method without one."""
        return getattr(self.settings[response.step].actor.policy_loss, "delta", None)

    def decide(self, responses: Sequence[Response]) -> Iterator[Decisions]:
        """Yield the decisions about each response.

        Args:
            responses: ordered by step.
        """
        for setting, group in groupby(responses, key=lambda response: self.settings[response.step]):
            part = list(group)
            recorded = self.recorded and all(r.reason is not None and r.update_mask is not None for r in part)
            yield from part if recorded else replay.decisions(setting, part)


def choose(dump: TokenDump, asked: Sequence[str] | None) -> list[Method]:
    """The methods asked for; by default the run's own and every shipped one.

    Those that cannot be replayed on this dump are left out and noted.

    Raises:
        ValueError: there is no such method, or its config refuses the overrides.
    """
    texts = [RUN, *replay.METHODS] if asked is None else list(dict.fromkeys(asked))
    settings = [replay.setting(text, dump.header) for text in texts if text != RUN]
    methods = []
    if RUN in texts:
        changed = _note_changes(dump)
        try:
            methods.append(_of_run(dump, settings if asked is None else []))
        except ValueError as error:
            dump.notes.append(str(error))
        if asked is None and methods and not changed:  # do not show the run's own again under its shipped name
            own = methods[0].settings[max(dump.headers)]
            settings = [setting for setting in settings if setting.actor != own.actor]
    lacking = defaultdict(list)
    for setting in settings:
        if all(replay.is_replayable(setting, header) for header in dump.headers.values()):
            methods.append(Method(setting.label, dict.fromkeys(dump.headers, setting)))
        else:
            lacking[setting.divergence or ""].append(setting.label)
    recorded = "/".join(sorted({header["divergence"] for header in dump.headers.values()}))
    for divergence, labels in lacking.items():
        binary = divergence.replace("topk", "binary")
        dump.notes.append(
            f"{', '.join(labels)}: left out, because D_t is {divergence}, which cannot be computed from the "
            f"log-probabilities, and the dump has {recorded}; a run with divergence={divergence} records it, and "
            f"--method '{labels[0]} divergence={binary}' replays the method with the binary divergence"
        )
    return methods


def _of_run(dump: TokenDump, shipped: Sequence[Setting]) -> Method:
    """The run's own method, named after the shipped ones that it equals."""
    settings = {}
    for step, header in dump.headers.items():
        try:
            settings[step] = replay.run_setting(header)
        except ValueError as error:
            line = str(error).splitlines()[0]
            raise ValueError(f"the run's own method: not readable from the header of step {step} ({line})") from error
    names = dict.fromkeys(s.label for setting in settings.values() for s in shipped if s.actor == setting.actor)
    return Method(f"this run ({', then '.join(names)})" if names else "this run", settings, recorded=True)


def _note_changes(dump: TokenDump) -> bool:
    """Note what of the run's settings changed before its last dumped step; return whether anything did."""
    last, steps_of = flattened(dump.header), defaultdict(list)
    for step, header in dump.headers.items():
        values = flattened(header)
        keys = sorted((values.keys() | last.keys()) - {"step"})
        changed = [f"{k} {values.get(k)} instead of {last.get(k)}" for k in keys if values.get(k) != last.get(k)]
        if changed:
            steps_of[", ".join(changed)].append(str(step))
    for changes, steps in steps_of.items():
        dump.notes.append(
            f"step {', '.join(steps)}: dumped under other settings than step {max(dump.headers)} ({changes}); "
            "the run's own masks are the recorded ones, other methods are replayed at the last step's thresholds"
        )
    return bool(steps_of)


def _about(setting: Setting) -> str:
    loss = setting.actor.policy_loss
    if isinstance(loss, CPPOLossConfig):
        about = f"{loss.divergence}, delta {loss.delta:g}"
        about += "" if loss.budget == "none" else f", delta_b {loss.delta_b:g} {loss.budget}"
        about += f", w_min {loss.w_min:g}" if loss.w_min < 1 else ""
        return about + ("" if loss.gate == "hard" else f", {loss.gate} gate")
    if isinstance(loss, TRMLossConfig):
        thresholds = [f"{name} {getattr(loss, name):g}" for name in ("delta", "delta_avg") if getattr(loss, name)]
        return ", ".join([loss.divergence, *thresholds])
    if isinstance(loss, NeighbourLossConfig):
        return f"{loss.rule}, delta {loss.delta:g}"
    low, high = 1 - setting.actor.clip_ratio_low, 1 + setting.actor.clip_ratio_high
    return f"clips above {high:g}" if low <= 0 else f"clips below {low:g} and above {high:g}"
