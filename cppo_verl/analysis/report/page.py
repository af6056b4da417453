"""A report of runs, as the template takes it."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from cppo_verl.analysis.inspect import token_text
from cppo_verl.analysis.report.config_differences import overrides
from cppo_verl.analysis.report.runs import Line, ReportedRun, lines, reported, shown
from cppo_verl.analysis.report.sections import Section, sections
from cppo_verl.analysis.report.summary import setting_differences, summary
from cppo_verl.analysis.text import Table
from cppo_verl.artifacts.run_reader import Run


@dataclass(frozen=True)
class Report:
    """Everything on the page, except that its figures are still to be drawn."""

    runs: Sequence[ReportedRun]
    lines: Sequence[Line]
    sections: Sequence[Section]
    summary: Table
    differences: Table | None
    notes: Sequence[str]

    @property
    def names(self) -> list[str]:
        return [item.name for item in self.runs]

    @property
    def has_dumps(self) -> bool:
        return any(item.dumped for item in self.runs)

    @property
    def overrides(self) -> list[str]:
        """What the command of a single run set."""
        return [shown(text) for text in overrides(self.runs[0].run)] if len(self.runs) == 1 else []

    @property
    def unknown_settings(self) -> list[str]:
        return [item.name for item in self.runs if not item.settings]


def report(runs: Sequence[Run], notes: Sequence[str] = (), tokenizer: str | None = None) -> Report:
    """
    Args:
        notes: what was skipped before.
        tokenizer: a folder; None for the tokenizer that each dump names.
    """
    items = reported(runs)
    drawn = lines(items)
    loader = _Tokenizers(tokenizer)
    parts = sections(items, drawn, loader)
    of_runs = [f"{item.name}: {note}" for item in items for note in item.notes]
    of_panels = [note for section in parts for panel in section.panels for note in panel.notes]
    said = tuple(shown(note) for note in dict.fromkeys([*notes, *of_runs, *of_panels, *loader.notes]))
    return Report(items, drawn, parts, summary(items), setting_differences(items), said)


class _Tokenizers:
    """Loads each tokenizer once, and notes those that cannot be loaded."""

    def __init__(self, folder: str | None):
        self.folder = folder
        self.notes: list[str] = []
        self._loaded: dict[str | None, PreTrainedTokenizerBase | None] = {}

    def __call__(self, named: str | None) -> PreTrainedTokenizerBase | None:
        path = self.folder or named
        if path not in self._loaded:
            self._loaded[path], why = None, "the dump names none"
            try:
                if isinstance(path, str):
                    self._loaded[path] = token_text.load(path)
            except ValueError as error:
                why = f"{path}: {error}"
            if self._loaded[path] is None:
                self.notes.append(f"no tokenizer ({why}): tokens are shown without text; give --tokenizer FOLDER")
        return self._loaded[path]
