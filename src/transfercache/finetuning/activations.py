"""Batches of cached activations: what a frozen part of the network gave, so that only the rest has to run."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from transfercache.arrays import Int64Array
from transfercache.backbones.cut import cut_after, stage_end
from transfercache.backbones.registry import Backbone
from transfercache.cache.table import EVAL_VIEW, FeatureTable
from transfercache.errors import UsageError
from transfercache.finetuning.batches import PREFETCHED_BATCHES, Batch, Reader, in_batches
from transfercache.finetuning.groups import unfrozen_stages
from transfercache.finetuning.options import FinetuneOptions
from transfercache.images.ahead import run_ahead
from transfercache.randomness import derive_rng

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
        assert shape is not None  # as embeddings have none
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
class ActivationReader(Reader):
    """Reads the rows of a manifest from a cache: `Batch.inputs` are float32 [B, D], of a view drawn for each epoch."""

    activations: Activations

    def __post_init__(self) -> None:
        table = self.activations.table
        self.bad.update(self.activations.bad)
        #: int64 [manifest rows, V]: where in the table a view of an image is.
        self._place = np.zeros((int(table.row.max(initial=-1)) + 1, self.activations.n_views), dtype=np.int64)
        self._place[table.row, table.view] = np.arange(len(table))

    def _batches(self, rows: Int64Array, epoch: int | None) -> Generator[Batch, None, None]:
        n_rows, n_views = self._place.shape
        if epoch is None:
            views = np.full(n_rows, EVAL_VIEW)
        else:
            views = derive_rng(self.options.seed, "view", epoch).integers(n_views, size=n_rows)
        parts = (np.array(part) for part in in_batches(rows.tolist(), self.options.batch_size))
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
