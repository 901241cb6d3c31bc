"""What a strategy is: a name, what it starts from, and a function from the shared setting and a seed to an outcome."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from transfercache import config
from transfercache.backbones.registry import Backbone
from transfercache.cache.table import FeatureTable
from transfercache.comparison.results import Seconds
from transfercache.comparison.rows import ComparedRows
from transfercache.finetuning.activations import Activations
from transfercache.spec import ExtractSpec


class Source(Enum):
    """What a strategy starts from, beside the labels."""

    PIXELS = "the images, and no network"
    EMBEDDINGS = "the cached embeddings of the backbone"
    BACKBONE = "the images, and the backbone with its weights"
    ARCHITECTURE = "the images, and the backbone with random weights"


class Embeddings(Protocol):
    """A finished extraction."""

    @property
    def record(self) -> Mapping[str, Any]:
        """What making its rows took, by run and in all: see `commands.extract.Extraction.record`."""
        ...

    def table(self) -> FeatureTable:
        """Read the good rows."""
        ...


@dataclass(frozen=True, eq=False)
class Setting:
    """What the strategies on one backbone share; weights are loaded and images embedded by whoever calls first."""

    rows: ComparedRows
    backbone_name: str
    backbone: Callable[[], Backbone]
    random_backbone: Callable[[], Backbone]  # the same architecture, untrained
    spec: Callable[[Backbone], ExtractSpec]
    embeddings: Callable[[], Embeddings]
    #: At the end of one of the backbone's stages, of all rows of the data.
    activations: Callable[[Backbone, str], tuple[Embeddings, Activations]]
    #: The spec of those, and in how many views of each image they are there or will be.
    planned_activations: Callable[[Backbone, str], tuple[ExtractSpec, int]]
    n_views: int  # of each training image in the embeddings
    device: torch.device
    workers: int | None
    epochs: int  # of fine-tuning; the tutorial has its own
    on_epoch: Callable[[int, int], None] = lambda epoch, n_epochs: None  # which is done, of how many


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a strategy's function leaves; its rows are the reported ones of `Setting.rows`, in their order."""

    probabilities: npt.NDArray[np.float64]  # float64 [M, C]
    seconds: Seconds
    passes: int  # image forwards through a network, evaluation included
    chosen: Mapping[str, Any] = field(default_factory=dict)
    best_on_reported: Mapping[str, Any] | None = None
    extraction: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Loop:
    """How a strategy feeds its network, on which its pace depends; the defaults are fine-tuning's."""

    batch_size: int = config.FINETUNE_BATCH_SIZE
    memory_format: torch.memory_format = torch.channels_last
    workers: int | None = None  # that decode; None: see `images.processes.decoding_workers`
    compute: str = "fp32"  # what it trains in


DEFAULT_LOOP = Loop()


@dataclass(frozen=True)
class Work:
    """Images that pass the network forward and back, and those that pass it forward alone."""

    trained: int
    forward: int
    loop: Loop = DEFAULT_LOOP


@dataclass(frozen=True)
class Strategy:
    """`options` name all that the outcome depends on beside the rows, the source and the seed."""

    name: str
    source: Source
    run: Callable[[Setting, int], Outcome]
    options: Callable[[Setting], Mapping[str, Any]]
    work: Callable[[Setting], Work] | None = None  # None: seconds, so it always runs
    is_seeded: bool = True  # False: further seeds would repeat it

    @property
    def has_backbone(self) -> bool:
        """Whether a network is in it."""
        return self.source is not Source.PIXELS


def uncached(stages: Mapping[str, float]) -> Seconds:
    """Return the seconds of a run that leaves nothing to reuse, from a stopwatch's stages and its `total`."""
    total = stages["total"]
    return Seconds(total, total, {name: value for name, value in stages.items() if name != "total"})


def extracted(record: Mapping[str, Any], stages: Mapping[str, float]) -> Seconds:
    """Return the same of a run that came after an extraction, whose `record` says what that took."""
    extract, own = float(record["seconds"]), uncached(stages)
    return Seconds(extract + own.again, own.again, {"extract": extract, **own.stages})
