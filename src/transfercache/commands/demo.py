"""`tlc demo`: the tutorial's ants and bees, or, where they cannot be had, digits and a backbone from the registry."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from transfercache import config
from transfercache.backbones.devices import pick_device
from transfercache.backbones.registry import load_backbone
from transfercache.cache.store import find
from transfercache.commands.compare import Comparison, compare
from transfercache.commands.inputs import EmbedOptions, cache_root
from transfercache.comparison.pace import measure_pace
from transfercache.comparison.schedule import OnEstimate
from transfercache.comparison.strategy import Loop, Work
from transfercache.errors import WeightsError
from transfercache.finetuning.precision import training_compute
from transfercache.images.named import digits_subset, materialise
from transfercache.images.sources import read_source
from transfercache.splits import Split

logger = logging.getLogger(__name__)

DATA = "hymenoptera"
FALLBACK_BACKBONE = "efficientnet_lite0"
FALLBACK_DIGITS_PER_CLASS = 30
FALLBACK_EPOCHS = 2


def demo(
    *,
    device: config.Device = config.DEVICE,
    cache_dir: Path | str | None = None,
    seed: int = config.SEED,
    on_result: Callable[[Comparison], None] | None = None,
    on_estimate: OnEstimate = lambda label, seconds: None,
) -> Comparison:
    """Compare strategies on the ants and bees of the PyTorch tutorial with a ResNet-18.

    Where the photographs or the weights cannot be downloaded, the log says which and why, and the demo runs on some
    handwritten digits with a backbone from the package registry; the table's title says so. A second run reuses all.
    """
    data, backbone, epochs, why = _what_can_be_had()
    _estimate(data, backbone, epochs, device=device, cache_dir=cache_root(cache_dir), on_estimate=on_estimate)
    note = ""
    if why is not None:
        note = f"in place of {DATA} with {config.BACKBONE}, which cannot be had here; {epochs} epochs of fine-tuning"
    what = {"data": str(data), "backbone": backbone, "why": why}
    comparison = compare(
        data,
        backbone=backbone,
        device=device,
        cache_dir=cache_dir,
        seed=seed,
        epochs=epochs,
        on_result=None if on_result is None else lambda so_far: on_result(so_far.as_demo(what, note=note)),
        on_estimate=on_estimate,
    )
    return comparison.as_demo(what, note=note)


def _estimate(
    data: str | Path,
    backbone: str,
    epochs: int,
    *,
    device: config.Device,
    cache_dir: Path,
    on_estimate: OnEstimate,
) -> None:
    """Say how long all of a first run will take, by the pace of a few images; a further run is over at once."""
    manifest, loaded = read_source(data), load_backbone(backbone)
    spec = EmbedOptions().spec(loaded)
    if find(cache_dir, data_name=manifest.name, data_root=manifest.root, spec=spec) is not None:
        return
    target = pick_device(device)
    loop = Loop(compute=training_compute(config.COMPUTE, target))
    pace = measure_pace(manifest, loaded, device=target, loop=loop)
    n_given = int((manifest.split == Split.TRAIN).sum())
    n_train = n_given or round((1 - config.VAL_FRACTION) * manifest.n_rows)
    # Extraction passes every image forward, fine-tuning's evaluation the rest once more.
    work = Work(trained=epochs * n_train, forward=2 * manifest.n_rows - n_train)
    on_estimate("the whole demo", pace.estimate(work))


def _what_can_be_had() -> tuple[str | Path, str, int, str | None]:
    """Return data, backbone, epochs of fine-tuning, and why these are not the tutorial's."""
    try:
        materialise(DATA)
        load_backbone(config.BACKBONE, weights=config.WEIGHTS)
    except WeightsError as error:  # a download too is one
        logger.warning(
            "%s; so the demo runs on %d digits a class with %s", error, FALLBACK_DIGITS_PER_CLASS, FALLBACK_BACKBONE
        )
        return digits_subset(FALLBACK_DIGITS_PER_CLASS), FALLBACK_BACKBONE, FALLBACK_EPOCHS, str(error)
    return DATA, config.BACKBONE, config.EPOCHS, None
