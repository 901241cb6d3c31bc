"""Batches of cached activations: what a frozen part of the network gave, so that only the rest has to run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from transfercache.backbones.cut import cut_after, stage_end
from transfercache.backbones.registry import Backbone
from transfercache.cache.table import EVAL_VIEW, FeatureTable
from transfercache.errors import UsageError
from transfercache.finetuning.batches import PREFETCHED_BATCHES, Batch, Int64Array
from transfercache.finetuning.groups import unfrozen_stages
from transfercache.finetuning.options import FinetuneOptions
from transfercache.images.ahead import run_ahead
from transfercache.randomness import derive_rng
from transfercache.stopwatch import Stopwatch

# They are read in order from one disk, and none of it is worth a core.
_READING_THREADS = 1


@dataclass(frozen=True, eq=False)
class Activations:
    """A cache's rows where `stage` ends, of all the manifest's good images; `bad` are the others (row -> reason)."""

    stage: str
    table: FeatureTable  # its `row` are the manifest's
    bad: Mapping[int, str]

    @property
    def n_views(self) -> int:
        """Rows of each image."""
        return int(self.table.view.max(initial=0)) + 1

    def describe(self) -> str:
        """Return what training depends on, in words."""
        spec = self.table.spec
        return f"{spec.boundary}, {spec.storage_dtype}, {self.n_views} views"

    def prepare(self, rows: torch.Tensor) -> torch.Tensor:
        """Return flattened rows [B, D] in the shape that the network goes on with, channels last where it has any."""
        shape = self.table.spec.row_shape
        if shape is None:
            raise ValueError(f"rows of {self.table.spec.boundary} are no activations")
        activations: torch.Tensor = rows.unflatten(1, shape)
        return activations.contiguous(memory_format=torch.channels_last) if activations.ndim == 4 else activations


def boundary_before(backbone: Backbone, options: FinetuneOptions) -> str:
    """Return the stage at whose end the activations are to be cached: the last one before the first that trains.

    Raises UsageError where there is none, where nothing but the head trains, and for augmentation of images.
    """
    if options.augment != "none":
        raise UsageError(
            f"--cached: --augment {options.augment} is of images, and none is read; cache more --views in its place"
        )
    trained, names = unfrozen_stages(backbone, options), [stage.name for stage in backbone.stages]
    if not trained:
        raise UsageError("--cached: with --unfreeze none the head alone trains; tlc train-head does that in seconds")
    if trained[0] == names[0]:
        raise UsageError(
            f"--cached: --unfreeze {options.unfreeze} trains from the first stage on, and what is not frozen cannot be "
            f"cached; give later stages, such as --unfreeze {names[-1]}"
        )
    return names[names.index(trained[0]) - 1]


def part_behind(backbone: Backbone, stage: str, network: nn.Module) -> nn.Module:
    """Return what of `network`, the backbone with a head, comes after `stage`; it shares the network's modules.

    Raises UsageError where the network cannot be cut there, or trains before.
    """
    before, behind = cut_after(network, stage_end(backbone, stage), name=backbone.name)
    if any(parameter.requires_grad for parameter in before.parameters()):
        raise UsageError(f"--cached: some of what trains lies before the end of {stage}; train on the images instead")
    return behind


@dataclass
class ActivationReader:
    """Reads the rows of a manifest from a cache: `Batch.inputs` are float32 [B, D]."""

    activations: Activations
    options: FinetuneOptions
    stopwatch: Stopwatch
    bad: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        table = self.activations.table
        self.bad.update(self.activations.bad)
        #: int64 [manifest rows, V]: where in the table a view of an image is.
        self._place = np.zeros((int(table.row.max(initial=-1)) + 1, self.activations.n_views), dtype=np.int64)
        self._place[table.row, table.view] = np.arange(len(table))

    def readable(self, rows: Int64Array) -> Int64Array:
        """Return `rows` without the bad ones, in the same order."""
        return rows[[row not in self.bad for row in rows.tolist()]]

    def training_batches(self, rows: Int64Array, epoch: int, *, after: int | None = None) -> Iterator[Batch]:
        """Yield the epoch's batches in the order in which images would come, of each image one view that is drawn.

        Those up to the row `after`, which ended a batch, are left out without being read.
        """
        order = derive_rng(self.options.seed, "order", epoch).permutation(rows)
        start = 0 if after is None else int(np.flatnonzero(order == after)[0]) + 1
        views = derive_rng(self.options.seed, "view", epoch).integers(self._place.shape[1], size=len(self._place))
        return self._batches(order[start:], views)

    def eval_batches(self, rows: Int64Array) -> Iterator[Batch]:
        """Yield the rows in their order, as the eval transform shows them."""
        return self._batches(self.readable(rows), np.full(len(self._place), EVAL_VIEW))

    def _batches(self, rows: Int64Array, views: Int64Array) -> Iterator[Batch]:
        parts = _split(rows, self.options.batch_size)
        ahead = run_ahead(
            parts, lambda part: self._read(part, views[part]), workers=_READING_THREADS, window=PREFETCHED_BATCHES
        )
        for part, inputs in ahead:
            yield Batch(part, inputs.result())

    def _read(self, rows: Int64Array, views: Int64Array) -> npt.NDArray[np.float32]:
        places = self._place[rows, views]
        in_order = np.argsort(places)  # as they lie on the disk
        with self.stopwatch.stage("read"):
            read = self.activations.table.blocks.take(places[in_order]).read(0, len(places))
            inputs = np.empty_like(read)
            inputs[in_order] = read
        return inputs


def _split(rows: Int64Array, batch_size: int) -> list[Int64Array]:
    """Return batches as `group_images` makes them: one row left over joins the batch before it."""
    ends = list(range(batch_size, len(rows), batch_size))
    if len(rows) - (ends[-1] if ends else 0) == 1 and batch_size > 1:
        ends = ends[:-1]
    return [part for part in np.split(rows, ends) if len(part)]
