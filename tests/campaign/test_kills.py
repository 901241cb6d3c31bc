"""SIGKILL of the real extractor at or inside any call that changes a file; then the reader, `verify` and a rerun."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from signal import SIGKILL

import numpy as np
import pytest

from transfercache.cache.catalogue import FILE_NAME, Catalogue, Extent, ShardEntry, read_catalogue
from transfercache.cache.reader import open_cache
from transfercache.cache.shard import ShardReader
from transfercache.errors import CacheError

from .conftest import find_problems, write_photos
from .forks import BACKBONE, ENGINE, Call, Command, Ended, Forks

# What lies on the disk after a kill tells how far the extractor had come.
LAYING_OUT = "laying out"  # until the first row
WRITING = "writing"  # some rows of the shard are there
VERIFYING = "verifying"  # all are, and it is not finished yet
PUBLISHING = "publishing"  # the new rows file lies there, and is not in force
RENAMING = "renaming"  # so does the catalogue that names it and says that the shard is finished
DONE = "done"  # after the last rename
PHASES = (LAYING_OUT, WRITING, VERIFYING, PUBLISHING, RENAMING, DONE)
IN_BETWEEN = PHASES[1:-1]

# Kills by scenario: a tenth of the two hundred and more of --campaign.
N_KILLS = {"fresh": 10, "changed": 8, "neighbour": 6}
# Each kill aims at the phase that is furthest behind its share of the kills so far.
SHARES = {LAYING_OUT: 0.12, WRITING: 0.36, VERIFYING: 0.16, PUBLISHING: 0.2, RENAMING: 0.16}
# A call takes microseconds, or a millisecond where it syncs, and is held up for half a millisecond before: a kill comes
# while it waits, inside it, or soon after it.
MAX_DELAY_SECONDS = 0.001
WORDS = (f"--backbone={BACKBONE}", ENGINE, "--weights=random", "--batch-size=4", "--json", "--on-bad=skip")

N_IMAGES = 48

Served = dict[str, tuple[bytes, int, int]]  # path -> features, label, split


@dataclass(frozen=True, eq=False)
class Scenario:
    """An extraction of `data` into a copy of the caches at `before`, and what it leaves when nothing disturbs it."""

    data: Path
    before: Path
    folder_name: str
    served_before: Served | None  # None: no rows are in force
    calls: list[Call]
    after: Path
    n_copied: int = 0

    @cached_property
    def catalogue(self) -> Catalogue:
        return read_catalogue(self.after)

    @property
    def entry(self) -> ShardEntry:
        """The shard that the extraction makes."""
        return self.catalogue.shards[-1]

    @cached_property
    def served_after(self) -> Served:
        return _served(self.after)

    @cached_property
    def aims(self) -> dict[str, range]:
        """The lines of the extractor's report to kill it at, by phase."""
        row_writes = [i for i, call in enumerate(self.calls) if _slots_of(call, self.entry) and i > self._shard_named]
        renamed = [i for i, call in enumerate(self.calls) if call.name == "replace" and call.is_before]
        rows_renamed, last_rename = renamed[-2:]
        assert Path(self.calls[last_rename].target).name == FILE_NAME
        rows_synced, catalogue_synced = (self._last_sync(before=i) for i in (rows_renamed, last_rename))
        ends = [0, row_writes[0], row_writes[-1], rows_synced, catalogue_synced, last_rename]
        return {phase: range(*ends[i : i + 2]) for i, phase in enumerate(SHARES)}

    def _last_sync(self, *, before: int) -> int:
        return max(i for i in range(before) if self.calls[i].name == "fsync" and self.calls[i].is_before)

    @property
    def _shard_named(self) -> int:
        return max(i for i, call in enumerate(self.calls) if Path(call.target).name == self.entry.file)

    def run(self, forks: Forks, cache_dir: Path, *, kill_at: int | None = None, delay: float = 0.0) -> Ended:
        return _extract(forks, self.data, cache_dir, kill_at=kill_at, delay=delay)

    def phase(self, folder: Path) -> str:
        """How far an extraction into `folder` has come, by what lies there."""
        if not (folder / FILE_NAME).exists():
            return LAYING_OUT
        now = read_catalogue(folder)
        entry = next((entry for entry in now.shards if entry.file == self.entry.file), None)
        if entry is None:
            return LAYING_OUT
        if now.rows == self.catalogue.rows:
            return DONE
        assert not entry.finished
        written = ShardReader(folder / entry.file, entry).written()
        if not written.all():
            return WRITING if written.any() else LAYING_OUT
        if any(folder.glob(f".{FILE_NAME}.*.tmp")):
            return RENAMING
        rows = self.catalogue.rows
        assert rows is not None
        is_there = (folder / rows.file).exists() or any(folder.glob(f".{rows.file}.*.tmp"))
        return PUBLISHING if is_there else VERIFYING


@dataclass
class Tally:
    """Kills by scenario and phase; those of a scenario are done when they are first asked for."""

    kill: Callable[[str], Counter[str]]
    phases: dict[str, Counter[str]] = field(default_factory=dict)
    n_committed: int = 0  # rows that were committed before the kills

    def of(self, name: str) -> Counter[str]:
        if name not in self.phases:
            self.phases[name] = self.kill(name)
        return self.phases[name]

    def lines(self) -> list[str]:
        total = sum(self.phases.values(), Counter())
        rows = [*self.phases.items(), ("in all", total)]
        head = f"kills of the extractor: {'':12}" + "".join(f"{phase:>12}" for phase in (*PHASES, "in between", "all"))
        return [
            head,
            *(
                f"{'':23} {name:12}"
                + "".join(f"{n:12}" for n in (*(counts[p] for p in PHASES), _in_between(counts), counts.total()))
                for name, counts in rows
            ),
            f"{'':23} {self.n_committed} rows were committed before these kills; none was lost or computed again",
        ]


def _in_between(counts: Counter[str]) -> int:
    """Kills between the first written row and the last rename."""
    return sum(counts[phase] for phase in IN_BETWEEN)


def _extract(forks: Forks, data: Path, cache_dir: Path, *, kill_at: int | None = None, delay: float = 0.0) -> Ended:
    words = ["extract-features", str(data), *WORDS, f"--cache-dir={cache_dir}"]
    return forks.run(Command(words, kill_at=kill_at, delay=delay))


def _made(forks: Forks, data: Path, cache_dir: Path) -> tuple[Path, list[Call]]:
    """Extract undisturbed; return the cache's folder and the calls."""
    ended = _extract(forks, data, cache_dir)
    assert _has_ended_well(ended)
    return Path(json.loads(ended.out)["cache"]), ended.calls


def _has_ended_well(ended: Ended) -> bool:
    return ended.code == 0 and re.fullmatch(r"next: tlc train-head [^\n]+\n", ended.err) is not None


@pytest.fixture(scope="module")
def scenarios(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Callable[[], Scenario]]:
    folder = tmp_path_factory.mktemp("kills")

    def fresh() -> Scenario:
        """Nothing is there yet."""
        data, before = write_photos(folder / "fresh" / "pets", range(N_IMAGES)), folder / "fresh" / "before"
        before.mkdir()
        # The killed runs find the folder of all caches too: their reports then count as this one does.
        (folder / "fresh" / "after").mkdir()
        after, calls = _made(forks, data, folder / "fresh" / "after")
        return Scenario(data, before, after.name, None, calls, after)

    def changed() -> Scenario:
        """A published cache whose data got 30 new images, lost one, and had another moved to the other class."""
        data, before = write_photos(folder / "changed" / "pets", range(20)), folder / "changed" / "before"
        old, _ = _made(forks, data, before)
        write_photos(data, range(20, 50))
        (data / "cat" / "04.png").unlink()
        (data / "cat" / "06.png").rename(data / "dog" / "06.png")
        shutil.copytree(before, folder / "changed" / "after")
        after, calls = _made(forks, data, folder / "changed" / "after")
        return Scenario(data, before, old.name, _served(old), calls, after)

    def neighbour() -> Scenario:
        """Nothing is there yet, but another cache of the same spec holds 20 of the 48 images."""
        data, before = write_photos(folder / "neighbour" / "pets", range(N_IMAGES)), folder / "neighbour" / "before"
        _made(forks, write_photos(folder / "neighbour" / "some", range(10, 30)), before)
        shutil.copytree(before, folder / "neighbour" / "after")
        after, calls = _made(forks, data, folder / "neighbour" / "after")
        return Scenario(data, before, after.name, None, calls, after, n_copied=20)

    made: dict[str, Scenario] = {}

    def once(make: Callable[[], Scenario]) -> Callable[[], Scenario]:
        return lambda: made.get(make.__name__) or made.setdefault(make.__name__, make())

    return {make.__name__: once(make) for make in (fresh, changed, neighbour)}


@pytest.fixture(scope="module")
def tally(
    forks: Forks,
    scenarios: dict[str, Callable[[], Scenario]],
    tmp_path_factory: pytest.TempPathFactory,
    scale: int,
    figures: list[str],
) -> Tally:
    def kill(name: str) -> Counter[str]:
        scenario, counts = scenarios[name](), Counter[str]()
        rng = np.random.default_rng([*name.encode(), scale])
        n_kills = N_KILLS[name] * scale
        for number in range(
            3 * n_kills
        ):  # one that aims at the last moments may find that all is done: it does not count
            if counts.total() - counts[DONE] == n_kills:
                break
            cache_dir = tmp_path_factory.mktemp(f"{name}{number}") / "cache"
            shutil.copytree(scenario.before, cache_dir)
            n_counted = counts.total() - counts[DONE]
            aim = max(SHARES, key=lambda phase: SHARES[phase] * (n_counted + 1) - counts[phase])
            kill_at = int(rng.choice(scenario.aims[aim]))
            # The last rename follows within a sync: whoever waits there comes too late.
            delay = 0.0 if aim == RENAMING else float(rng.choice([0.0, rng.uniform(0, MAX_DELAY_SECONDS)]))
            what = f"{name}, number {number}, at call {kill_at} {scenario.calls[kill_at]} + {delay * 1000:.3f} ms"
            found = _kill_and_resume(forks, scenario, cache_dir, kill_at=kill_at, delay=delay, what=what)
            if found is not None:
                counts[found[0]] += 1
                made.n_committed += found[1]
            shutil.rmtree(cache_dir)
        return counts

    made = Tally(kill)
    yield made
    figures.extend(made.lines())


def _kill_and_resume(
    forks: Forks, scenario: Scenario, cache_dir: Path, *, kill_at: int, delay: float, what: str
) -> tuple[str, int] | None:
    """Return the phase in which the kill came, and how many rows were committed; None where the command ended first."""
    ended = scenario.run(forks, cache_dir, kill_at=kill_at, delay=delay)
    if ended.code == 0:
        return None
    assert (ended.code, ended.out, ended.err) == (-SIGKILL, "", ""), what
    folder, entry = cache_dir / scenario.folder_name, scenario.entry
    phase = scenario.phase(folder)
    assert find_problems(folder) == (), what
    _check_served(folder, scenario, phase, what)

    committed, valid = _committed(ended.calls, entry), np.zeros(entry.n_rows, bool)
    if phase != LAYING_OUT:
        valid = ShardReader(folder / entry.file, entry).valid()
    assert valid[sorted(committed)].all(), f"{what}: lost rows"

    again = scenario.run(forks, cache_dir)
    assert _has_ended_well(again), what
    written = {slot for call in again.calls for slot in _slots_of(call, entry) or () if call.name == "pwrite"}
    assert written == set(np.flatnonzero(~valid).tolist()), f"{what}: wrote other rows than those that were missing"
    document = json.loads(again.out)
    n_wanted = len({features for features, _, _ in scenario.served_after.values()})
    assert document["computed"] + document["reused"] == n_wanted, what
    assert document["computed"] <= len(written), what
    _check_equal(folder, scenario, what)
    return phase, len(committed)


def _check_served(folder: Path, scenario: Scenario, phase: str, what: str) -> None:
    """The old rows until the new ones are in force, and no others; where there are none, the reader is told so."""
    expected = scenario.served_after if phase == DONE else scenario.served_before
    if expected is not None:
        assert _served(folder) == expected, what
        return
    with pytest.raises(CacheError) as refused:
        open_cache(folder)
    assert re.search(r"is not finished: run the same|not a cache folder; make one", str(refused.value)), what


def _check_equal(folder: Path, scenario: Scenario, what: str) -> None:
    """The folder is, bit for bit, what the undisturbed run left; the catalogue but for what the runs took."""
    assert find_problems(folder) == (), what
    now, expected = read_catalogue(folder), scenario.catalogue
    assert (now.shards, now.rows, now.class_names) == (expected.shards, expected.rows, expected.class_names), what
    assert now.canaries.tobytes() == expected.canaries.tobytes(), what
    names = sorted(path.name for path in scenario.after.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == names, what
    for name in set(names) - {FILE_NAME}:
        assert (folder / name).read_bytes() == (scenario.after / name).read_bytes(), f"{what}: {name}"
    assert _served(folder) == scenario.served_after, what
    others = sorted(path.name for path in scenario.before.iterdir() if path.name != folder.name)
    assert sorted(path.name for path in folder.parent.iterdir() if path != folder) == others, what


def _served(folder: Path) -> Served:
    table = open_cache(folder).table()
    rows = zip(table.paths, table.features, table.labels.tolist(), table.split.tolist(), strict=True)
    return {path: (features.tobytes(), label, split) for path, features, label, split in rows}


def _slots_of(call: Call, entry: ShardEntry, *, of: str = "features") -> range | None:
    """The slots whose features (or checksums) a pwrite covers; None where it is another call."""
    extent: Extent = getattr(entry, of)
    if call.name != "pwrite" or not extent.offset <= call.offset < extent.offset + extent.length:
        return None
    row_bytes = extent.length // entry.n_rows
    start = (call.offset - extent.offset) // row_bytes
    return range(start, start + call.length // row_bytes)


def _committed(calls: list[Call], entry: ShardEntry) -> set[int]:
    """The slots whose features and checksum were written, and then synced, all three having returned."""
    features, whole, committed = set[int](), set[int](), set[int]()
    for call in calls:
        if call.is_before:
            continue
        features.update(_slots_of(call, entry) or ())
        whole.update(features.intersection(_slots_of(call, entry, of="checksums") or ()))
        if call.name == "fdatasync":  # of the shard, as all other files are synced with fsync
            committed |= whole
    return committed


@pytest.mark.parametrize("name", N_KILLS)
def test_extractor__killed_anywhere__loses_nothing_and_ends_bit_identical(tally: Tally, name: str, scale: int) -> None:
    kills = tally.of(name)
    assert kills.total() - kills[DONE] == N_KILLS[name] * scale


def test_kills__are_spread_over_the_phases(tally: Tally, scale: int) -> None:
    total = sum(map(tally.of, N_KILLS), Counter())
    assert _in_between(total) >= 18 * scale
    assert _in_between(total) >= 0.75 * total.total()
    assert all(total[phase] >= scale for phase in SHARES), total
    assert all(_in_between(tally.of(name)) * 2 > tally.of(name).total() for name in N_KILLS)


@pytest.mark.parametrize("name", N_KILLS)
def test_scenario__commits_every_row_it_makes(scenarios: dict[str, Callable[[], Scenario]], name: str) -> None:
    """What is not lost is known from the extractor's report."""
    scenario = scenarios[name]()
    assert _committed(scenario.calls, scenario.entry) == set(range(scenario.entry.n_rows))


def test_neighbour__gives_its_rows(scenarios: dict[str, Callable[[], Scenario]]) -> None:
    """The scenario is what it claims to be."""
    scenario = scenarios["neighbour"]()
    copied = [run for run in scenario.catalogue.provenance if run.copied_from]
    assert sum(run.computed for run in copied) == scenario.n_copied
    assert sum(run.computed for run in scenario.catalogue.provenance) == N_IMAGES
