"""`Run`: what one extraction did to a cache, on what and at what cost; see docs/cache-format.md."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from transfercache.strict_json import each, take

#: Of one run; no disk holds as many.
MAX_ROWS = 10**12

#: What may change an embedding without changing the spec: packages, and the engine beside them.
_MAKERS = ("torch", "torchvision", "timm", "pillow", "torchcodec")

_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("date", "engine", "device"), str),
    **dict.fromkeys(("computed", "reused", "checked", "batch_size"), int),
    **dict.fromkeys(("seconds", "weights", "machine", "versions"), dict),
    "copied_from": (str, type(None)),
}


def makers_of(engine: str, versions: Mapping[str, str]) -> dict[str, str]:
    """Return the engine, and of the installed `versions` those of the packages that an embedding passes through."""
    return {"engine": engine, **{name: versions[name] for name in (*_MAKERS, engine) if name in versions}}


def vouch(runs: Iterable[Run], makers: Mapping[str, str]) -> bool:
    """Whether all rows that these runs, oldest first, have left were made by `makers`, or found equal to theirs.

    A run that checked rows of other makers joins its own to those that agree. One that added rows without a check, as
    none of the others was wanted, leaves rows of two kinds, for which none vouches until the next check.
    """
    agreeing: list[dict[str, str]] = []
    is_mixed = False
    for run in runs:
        if run.checked:
            agreeing, is_mixed = [*agreeing, run.makers], False
        elif not agreeing:
            agreeing = [run.makers]
        elif run.computed and run.makers not in agreeing:
            is_mixed = True
    return not is_mixed and dict(makers) in agreeing


@dataclass(frozen=True)
class Run:
    """One run that changed a cache, or the share of another cache's run whose rows were copied from there.

    Raises ValueError, naming the field, where the parts are not what a run leaves.
    """

    date: str  # ISO 8601
    computed: int  # view rows
    reused: int  # view rows, those copied from other caches included
    checked: int  # rows of other versions that were computed again, for comparison
    copied_from: str | None  # the folder name of the cache whose run this was; None: a run of this cache
    seconds: dict[str, float]  # by stage, and `total`
    engine: str
    device: str
    batch_size: int
    weights: dict[str, str]  # kind, where, licence
    machine: dict[str, Any]  # as `environment.describe_environment` has it
    versions: dict[str, str]

    def __post_init__(self) -> None:
        datetime.fromisoformat(self.date)
        if not all(0 <= count <= MAX_ROWS for count in (self.computed, self.reused, self.checked)):
            raise ValueError(f"a run's counts must lie between 0 and {MAX_ROWS}")
        if self.batch_size < 1:
            raise ValueError("a run's batch_size must be at least 1")
        numbers = list(self.seconds.values())
        if "total" not in self.seconds or not all(type(value) in (int, float) for value in numbers):
            raise ValueError("a run's seconds must be numbers, and have a total")
        if not all(math.isfinite(value) and value >= 0 for value in numbers):
            raise ValueError("a run's seconds must be finite and not negative")
        for name in ("weights", "versions"):
            each(list(getattr(self, name).values()), str, f"a run's {name}")
        if not all(type(value) in (str, int) for value in self.machine.values()):
            raise ValueError("a run's machine must hold strings and whole numbers")

    @property
    def makers(self) -> dict[str, str]:
        """The engine, and the versions of the packages that an embedding passes through."""
        return makers_of(self.engine, self.versions)

    @classmethod
    def from_json(cls, value: Any) -> Run:
        """Build a run from untrusted JSON; raises ValueError naming what is wrong."""
        return cls(**take(value, "a run", _TYPES))

    def to_json(self) -> dict[str, Any]:
        """Return the record as it stands in the catalogue."""
        return asdict(self)
