from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from transfercache.comparison import schedule
from transfercache.comparison.pace import Pace
from transfercache.comparison.results import Seconds, load_result
from transfercache.comparison.schedule import plan_jobs, run_jobs
from transfercache.comparison.strategy import Outcome, Setting, Source, Strategy, Work
from transfercache.comparison.summary import Entry, LeftOut
from transfercache.errors import ResourceError

from .conftest import MakeSetting


class Recorded:
    """Strategies that do nothing but note that they ran; `work` is in images of one second each."""

    def __init__(self) -> None:
        self.ran: list[tuple[str, int]] = []

    def make(self, name: str, *, work: int | None = None, **changes: object) -> Strategy:
        def run(setting: Setting, seed: int) -> Outcome:
            self.ran.append((name, seed))
            for epoch in (1, 2, 3):
                setting.on_epoch(epoch, 3)
            return Outcome(np.full((6, 2), 0.5), Seconds(1.0, 1.0, {}), passes=0)

        return Strategy(
            name=name,
            source=Source.ARCHITECTURE,
            run=run,
            options=lambda setting: {},
            work=None if work is None else lambda setting: Work(work, 0),
            **changes,
        )


@pytest.fixture
def recorded() -> Recorded:
    return Recorded()


@pytest.fixture(autouse=True)
def one_second_an_image(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schedule, "measure_pace", lambda manifest, backbone, **_: Pace(trained=1.0, forward=0.1))


Plan = Callable[..., list[schedule.Job]]


@pytest.fixture
def plan(setting: Setting, tmp_path: Path) -> Plan:
    def make(
        *strategies: Strategy, settings: tuple[Setting, ...] = (setting,), seeds: int = 1, reuse: bool = True
    ) -> list[schedule.Job]:
        return plan_jobs(strategies, settings, seeds=range(seeds), folder=tmp_path / "results", reuse=reuse)

    return make


def test_run_jobs__shortest_first_and_each_is_kept_at_once(recorded: Recorded, plan: Plan, tmp_path: Path) -> None:
    jobs = plan(recorded.make("slow", work=90), recorded.make("instant"), recorded.make("medium", work=60))
    done = run_jobs(jobs)
    first = next(done)
    assert isinstance(first, Entry)
    assert first.label == "instant"
    assert [load_result(path).strategy for path in (tmp_path / "results").glob("*.safetensors")] == ["instant"]
    assert [item.label for item in done] == ["medium", "slow"]
    assert recorded.ran == [("instant", 0), ("medium", 0), ("slow", 0)]


def test_run_jobs__kept_results_are_shown_again(recorded: Recorded, plan: Plan) -> None:
    strategies = (recorded.make("a", work=60), recorded.make("b"))
    first = list(run_jobs(plan(*strategies)))
    again = list(run_jobs(plan(*strategies)))
    assert [(item.label, item.is_kept) for item in first if isinstance(item, Entry)] == [("b", False), ("a", False)]
    assert [(item.label, item.is_kept) for item in again if isinstance(item, Entry)] == [("a", True), ("b", True)]
    assert recorded.ran == [("b", 0), ("a", 0)]
    list(run_jobs(plan(*strategies, reuse=False)))
    assert recorded.ran == [("b", 0), ("a", 0), ("b", 0), ("a", 0)]


def test_run_jobs__where_no_result_can_be_kept__nothing_runs_but_kept_ones_are_shown(
    recorded: Recorded, plan: Plan, tmp_path: Path
) -> None:
    list(run_jobs(plan(recorded.make("a"))))
    kept, more = plan(recorded.make("a")), plan(recorded.make("a"), recorded.make("b"))
    (tmp_path / "results").rename(tmp_path / "moved")
    (tmp_path / "results").touch()
    with pytest.raises(ResourceError, match=rf"{tmp_path}/results/.* cannot be written .*; choose another path"):
        next(run_jobs(more))
    assert [item.label for item in run_jobs(kept)] == ["a"]
    assert recorded.ran == [("a", 0)]


def test_run_jobs__further_seeds_alone_are_run(recorded: Recorded, plan: Plan) -> None:
    drawn, fixed = recorded.make("drawn"), recorded.make("fixed", is_seeded=False)
    list(run_jobs(plan(drawn, fixed)))
    more = list(run_jobs(plan(drawn, fixed, seeds=3)))
    assert recorded.ran == [("drawn", 0), ("fixed", 0), ("drawn", 1), ("drawn", 2)]
    seeds = {item.label: [result.seed for result in item.results] for item in more if isinstance(item, Entry)}
    assert seeds == {"drawn": [0, 1, 2], "fixed": [0]}
    assert [item.is_kept for item in more if isinstance(item, Entry)] == [False, True]


def test_run_jobs__deadline_leaves_out_what_will_not_be_over(recorded: Recorded, plan: Plan) -> None:
    jobs = plan(recorded.make("short", work=5), recorded.make("long", work=500), recorded.make("instant"))
    done = list(run_jobs(jobs, deadline=time.perf_counter() + 60))
    assert [item.label for item in done] == ["instant", "short", "long"]
    assert done[2] == LeftOut("long", 500.0, "more than --max-minutes leaves")
    assert recorded.ran == [("instant", 0), ("short", 0)]


def test_run_jobs__deadline_counts_all_seeds(recorded: Recorded, plan: Plan) -> None:
    done = list(run_jobs(plan(recorded.make("short", work=25), seeds=3), deadline=time.perf_counter() + 60))
    assert done == [LeftOut("short", 75.0, "more than --max-minutes leaves")]


def test_run_jobs__left_out_for_some_seeds_shows_the_finished_ones(recorded: Recorded, plan: Plan) -> None:
    long = recorded.make("long", work=50)
    list(run_jobs(plan(long)))
    entry, left_out = run_jobs(plan(long, seeds=3), deadline=time.perf_counter() + 60)
    assert isinstance(entry, Entry)
    assert ([result.seed for result in entry.results], entry.is_kept) == ([0], True)
    assert left_out == LeftOut("long", 100.0, "seeds 1, 2: more than --max-minutes leaves")
    assert recorded.ran == [("long", 0)]


def test_run_jobs__nothing_is_timed_where_nothing_trains(
    recorded: Recorded, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(run_jobs(plan(recorded.make("trained", work=60))))

    def refuse(setting: Setting) -> Pace:
        raise AssertionError("nothing is left to be trained")

    monkeypatch.setattr(schedule, "measure_pace", refuse)
    list(run_jobs(plan(recorded.make("trained", work=60), recorded.make("instant"))))


def test_run_jobs__estimate_before_the_first_run_and_after_its_first_epoch(
    recorded: Recorded, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each reading of the clock is ten seconds after the one before it: two a run, at its start and its first epoch.
    ticks = iter(range(0, 10_000, 10))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    told: list[tuple[str, float]] = []
    list(run_jobs(plan(recorded.make("trained", work=60), seeds=2), on_estimate=lambda *line: told.append(line)))
    seconds = [round(line[1]) for line in told]
    # 10 s an epoch of three: two more of this run, and three of the next.
    assert {line[0] for line in told} == {"trained"}
    assert seconds == [120, 50, 20]


def test_run_jobs__interrupted_run_keeps_the_finished_ones(recorded: Recorded, plan: Plan) -> None:
    def interrupt(setting: Setting, seed: int) -> Outcome:
        raise KeyboardInterrupt

    stopped = Strategy("stopped", Source.ARCHITECTURE, interrupt, lambda setting: {}, lambda setting: Work(9, 0))
    done = []
    with pytest.raises(KeyboardInterrupt):
        done.extend(run_jobs(plan(recorded.make("instant"), stopped)))
    again = run_jobs(plan(recorded.make("instant"), stopped))
    kept = next(again)
    assert isinstance(kept, Entry)
    assert (kept.label, kept.is_kept) == ("instant", True)
    assert recorded.ran == [("instant", 0)]


def test_plan_jobs__labels_name_the_backbone_where_there_are_several(
    recorded: Recorded, plan: Plan, make_setting: MakeSetting, setting: Setting
) -> None:
    from dataclasses import replace

    others = (setting, replace(setting, backbone_name="resnet34"))
    pixels = replace(recorded.make("pixels"), source=Source.PIXELS)
    labels = [job.label for job in plan(recorded.make("a"), pixels, settings=others)]
    assert labels == ["a (resnet18)", "a (resnet34)", "pixels"]
    assert [job.label for job in plan(recorded.make("a"))] == ["a"]
