"""Which strategy runs when: what is kept first, then the cheapest, within the time that is given."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from transfercache.comparison.pace import Pace, measure_pace
from transfercache.comparison.results import RunResult, save_result
from transfercache.comparison.strategies import load_kept, result_path, run_strategy
from transfercache.comparison.strategy import Loop, Setting, Strategy
from transfercache.comparison.summary import Entry, LeftOut
from transfercache.files import check_writable

#: Told a label and how many seconds its runs will still take: before the first, and again after the first epoch.
OnEstimate = Callable[[str, float], None]


@dataclass(frozen=True, eq=False)
class Job:
    """One strategy on one backbone: its runs by seed, and the results of those that are kept already."""

    label: str
    strategy: Strategy
    setting: Setting
    paths: dict[int, Path]  # seed -> where its result is kept
    kept: dict[int, RunResult]

    @property
    def missing(self) -> list[int]:
        """The seeds whose runs are still to be made."""
        return [seed for seed in self.paths if seed not in self.kept]


def plan_jobs(
    strategies: Sequence[Strategy], settings: Sequence[Setting], *, seeds: Sequence[int], folder: Path, reuse: bool
) -> list[Job]:
    """Cross strategies and backbones in the order of the strategies; without `reuse` no kept result is looked up."""
    jobs = []
    for strategy in strategies:
        for setting in settings if strategy.has_backbone else settings[:1]:
            own_seeds = seeds if strategy.is_seeded else seeds[:1]
            paths = {seed: result_path(folder, strategy, setting, seed) for seed in own_seeds}
            found = {seed: load_kept(path, strategy, setting, seed) for seed, path in paths.items()} if reuse else {}
            kept = {seed: result for seed, result in found.items() if result is not None}
            is_ambiguous = len(settings) > 1 and strategy.has_backbone
            label = f"{strategy.name} ({setting.backbone_name})" if is_ambiguous else strategy.name
            jobs.append(Job(label, strategy, setting, paths, kept))
    return jobs


def run_jobs(
    jobs: Sequence[Job], *, deadline: float = math.inf, on_estimate: OnEstimate = lambda label, seconds: None
) -> Iterator[Entry | LeftOut]:
    """Yield each job's results as soon as they are there, the shortest first; every run is kept at once.

    A job that will not be over before `deadline` (on the clock of `time.perf_counter`) is left out. The estimates
    come from a few images timed on this machine, so those are read only where something has to be trained.
    Raises ResourceError at once where there is something to run, and its result could not be kept.
    """
    for path in [job.paths[seed] for job in jobs for seed in job.missing][:1]:  # all lie in one folder
        check_writable(path)

    @functools.cache
    def pace_of(setting: Setting, loop: Loop) -> Pace:
        # Random weights run as fast, and none need be downloaded.
        return measure_pace(setting.rows.manifest, setting.random_backbone(), device=setting.device, loop=loop)

    def estimate(job: Job) -> float:
        if not job.missing or job.strategy.work is None:
            return 0.0
        work = job.strategy.work(job.setting)
        return len(job.missing) * pace_of(job.setting, work.loop).estimate(work)

    for seconds, job in sorted([(estimate(job), job) for job in jobs], key=lambda item: item[0]):
        if seconds and time.perf_counter() + seconds > deadline:
            yield from _leave_out(job, seconds)
            continue
        if seconds:
            on_estimate(job.label, seconds)
        yield _run(job, on_estimate)


def _leave_out(job: Job, seconds: float) -> Iterator[Entry | LeftOut]:
    """Yield what some seeds have left already, and that the others are left out."""
    reason = "more than --max-minutes leaves"
    if job.kept:
        yield Entry(job.label, tuple(job.kept.values()), is_kept=True)
        reason = f"seeds {', '.join(map(str, job.missing))}: {reason}"
    yield LeftOut(job.label, seconds, reason)


def _run(job: Job, on_estimate: OnEstimate) -> Entry:
    results = []
    n_left = len(job.missing)
    for seed, path in job.paths.items():
        result = job.kept.get(seed)
        if result is None:
            n_left -= 1
            setting = replace(job.setting, on_epoch=_refine(job.label, n_left, on_estimate))
            result = run_strategy(job.strategy, setting, seed)
            save_result(result, path)
        results.append(result)
    return Entry(job.label, tuple(results), is_kept=not job.missing)


def _refine(label: str, n_further: int, on_estimate: OnEstimate) -> Callable[[int, int], None]:
    """Return what tells the time left by the first epoch's own pace, `n_further` runs of the same length included."""
    start = time.perf_counter()

    def on_epoch(epoch: int, n_epochs: int) -> None:
        seconds = time.perf_counter() - start
        if epoch == 1 and n_epochs > 1:
            on_estimate(label, seconds * (n_epochs - 1 + n_further * n_epochs))

    return on_epoch
