"""What `tlc finetune` returns: the MODEL, its figures, what was tried before, and what all of it cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transfercache.commands.inputs import BadImage
from transfercache.finetuning.groups import ParameterGroup
from transfercache.finetuning.result import EpochRecord
from transfercache.finetuning.search import Trial, choose_trial
from transfercache.metrics import Report
from transfercache.plain import fields_of, plain
from transfercache.text import name_flag, name_value

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True, eq=False)
class FinetuneOutcome:
    """A fine-tuned model, where it was written, how it was trained, and its figures on the reported split."""

    model: Path
    groups: tuple[ParameterGroup, ...]
    compute: str  # that of training; the figures are fp32's
    epochs: tuple[EpochRecord, ...]
    chosen_epoch: int
    n_train: int
    straddling: int  # groups, or sets of equal images, that the given split divides
    reported: Report | None
    seconds: dict[str, float]  # by stage; with `grid` the stage `search`, which `total` includes
    backbone_passes: int  # those of the search included
    bad: tuple[BadImage, ...]
    data: str
    extraction: dict[str, Any] | None = None  # with `cached`: the cache, what making its rows took, and by which runs
    trials: tuple[Trial, ...] = ()  # with `grid`: what was tried on held-out training rows, in order

    @property
    def next_command(self) -> tuple[str, ...]:
        """The words of the command a person would run next."""
        return ("tlc", "predict", str(self.model), self.data)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON document of `tlc finetune`."""
        return {
            **fields_of(self, without=("bad", "data", "extraction", "trials")),
            "search_passes": self._search_passes,
            "trials": trials_to_json(self.trials),
            "bad": plain(self.bad),
            "extraction": self.extraction,
        }

    def render(self) -> RenderableType:
        """Return the same for a terminal."""
        from rich.console import Group

        from transfercache.report.heads import render_report

        footer = "\n".join((str(self.model), *map(describe_group, self.groups), self._cost()))
        report = render_report(self.reported, title=f"fine-tuned on {self.n_train} training rows", footer=footer)
        return Group(_render_trials(self.trials), report) if self.trials else report

    @property
    def _search_passes(self) -> int:
        return sum(trial.passes for trial in self.trials)

    def _cost(self) -> str:
        last, search = self.epochs[-1], self.seconds.get("search", 0.0)
        seconds, passes = self.seconds["total"] - search, self.backbone_passes - self._search_passes
        before = f"\nthe search before it took {search:.1f} s and {self._search_passes:,} passes" if self.trials else ""
        return (
            f"epoch {self.chosen_epoch} of {len(self.epochs)} in {self.compute}, {seconds:.1f} s "
            f"({last.seconds:.1f} s an epoch, {last.images_per_second:.1f} images/s), {passes:,} passes, "
            f"at most {last.peak_memory_bytes / 2**30:.1f} GiB of memory{before}{self._extraction_cost()}"
        )

    def _extraction_cost(self) -> str:
        if self.extraction is None:
            return ""
        seconds, passes, cache = (self.extraction[name] for name in ("seconds", "images", "cache"))
        return f"\nthe activations before them took {seconds:.1f} s and {passes:,} passes, in {cache}"


def describe_group(group: ParameterGroup) -> str:
    """Return one line for a person."""
    return f"{group.name}: {group.parameters:,} parameters, lr {group.lr:.3g}, weight decay {group.weight_decay:g}"


def add_search(seconds: Mapping[str, float], trials: Sequence[Trial]) -> dict[str, float]:
    """Return a run's seconds by stage with those of its search, if any, as one stage more."""
    if not trials:
        return dict(seconds)
    search = sum(trial.seconds for trial in trials)
    return {**seconds, "search": search, "total": seconds["total"] + search}


def trials_to_json(trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Return what was tried, each with whether it was chosen, in JSON's types."""
    return [{**asdict(trial), "is_chosen": trial is choose_trial(trials)} for trial in trials]


def _render_trials(trials: Sequence[Trial]) -> RenderableType:
    from rich.table import Table

    title = f"tried with {trials[0].n_held_out} training rows held out"
    table = Table(*map(name_flag, trials[0].values), title=title, title_justify="left")
    for name in ("log loss", "accuracy", "epoch", "seconds"):
        table.add_column(name, justify="right")
    table.add_column()
    for trial in trials:
        loss, accuracy = trial.held_out_log_loss, trial.held_out_accuracy
        figures = (trial.failure, "-") if loss is None else (f"{loss:.4f}", f"{accuracy:.3f}")
        values = map(name_value, trial.values.values())
        mark = "chosen" if trial is choose_trial(trials) else ""
        table.add_row(*values, *figures, str(trial.epoch), f"{trial.seconds:.1f}", mark)
    return table
