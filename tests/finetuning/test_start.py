from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from transfercache.backbones.engines import EagerEngine, normalise
from transfercache.backbones.registry import Backbone, network_with_head
from transfercache.comparison.rows import load_pixels
from transfercache.errors import UsageError
from transfercache.finetuning.loop import Task, finetune
from transfercache.finetuning.options import FinetuneOptions
from transfercache.finetuning.start import match_head, put_head
from transfercache.heads.linear_head import UNTRAINED_BIAS, LinearHead
from transfercache.images.transforms import eval_pixels
from transfercache.metrics import softmax
from transfercache.spec import ExtractSpec

from .conftest import MakePhotos, read, spec_of

NAMES = ("green", "red")


def _head(spec: ExtractSpec, **changes: Any) -> LinearHead:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(2, 16)).astype(np.float32)
    head = LinearHead(weight, np.array([0.5, -0.25], np.float32), NAMES, spec, "logistic", 8)
    return replace(head, **changes)


def test_match_head__orders_the_classes_and_folds_the_temperature(two_stages: Backbone) -> None:
    spec = spec_of(two_stages)
    head = _head(spec, temperature=2.0)
    matched = match_head(head, spec=spec, class_names=("red", "green"))
    assert (matched.class_names, matched.temperature) == (("red", "green"), 1.0)
    x = np.random.default_rng(1).normal(size=(5, 16)).astype(np.float32)
    np.testing.assert_allclose(matched.logits(x), head.logits(x)[:, ::-1] / 2, rtol=1e-5)
    np.testing.assert_allclose(matched.probabilities(x), head.probabilities(x)[:, ::-1], rtol=1e-5)


def test_match_head__a_class_that_it_has_not_seen_starts_as_the_least_likely(two_stages: Backbone) -> None:
    spec, names = spec_of(two_stages), ("green", "red", "sky")
    head = LinearHead(
        np.eye(3, 16, dtype=np.float32), np.array([1, UNTRAINED_BIAS, 2], np.float32), names, spec, "x", 8
    )
    assert match_head(head, spec=spec, class_names=names).bias.tolist() == [1, 1, 2]


def test_match_head__decoder_and_precision_of_the_cache_may_differ(two_stages: Backbone) -> None:
    spec = spec_of(two_stages)
    fast = replace(spec, compute="bf16", preprocessing=replace(spec.preprocessing, decoder="fast"))
    head = _head(fast)
    np.testing.assert_array_equal(match_head(head, spec=spec, class_names=NAMES).weight, head.weight)


@pytest.mark.parametrize(
    ("spec_changes", "names", "message"),
    [
        (
            {},
            ("green", "blue"),
            "its classes are green, red, and those of the data are green, blue; train a head on th",
        ),
        ({"weights_digest": "1" * 64}, NAMES, "features of two_stages with weights or preprocessing other than"),
        ({"preprocessing": {"crop": 24}}, NAMES, "features of two_stages with weights or preprocessing other than"),
        ({"boundary": "layer3"}, NAMES, "features of two_stages with weights or preprocessing other than"),
    ],
)
def test_match_head__does_not_fit(
    two_stages: Backbone, spec_changes: dict[str, Any], names: tuple[str, ...], message: str
) -> None:
    spec = spec_of(two_stages)
    changes = dict(spec_changes)
    if "preprocessing" in changes:
        changes["preprocessing"] = replace(spec.preprocessing, **changes["preprocessing"])
    with pytest.raises(UsageError, match=f"^--init-head: .*{message}"):
        match_head(_head(replace(spec, **changes)), spec=spec, class_names=names)


def test_put_head__the_network_starts_as_the_linear_probe(make_photos: MakePhotos, resnet18: Backbone) -> None:
    """Logits, and so the loss, of the network before its first step are the head's on the embeddings."""
    manifest = read(make_photos(train=4))
    pixels = load_pixels(manifest, partial(eval_pixels, preprocessing=resnet18.preprocessing), workers=1)
    embeddings = EagerEngine(resnet18, torch.device("cpu")).embed(pixels)
    spec = spec_of(resnet18)
    weight = np.random.default_rng(0).normal(size=(2, 512)).astype(np.float32)
    head = LinearHead(weight, np.array([0.5, -0.25], np.float32), NAMES, spec, "logistic", 8, temperature=1.5)
    network = network_with_head(resnet18, 2, seed=0)
    put_head(network, resnet18, match_head(head, spec=spec, class_names=manifest.class_names))
    with torch.inference_mode():
        logits = network(normalise(torch.from_numpy(pixels), resnet18.preprocessing)).numpy()
    np.testing.assert_allclose(logits, head.logits(embeddings) / 1.5, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(softmax(logits), head.probabilities(embeddings), rtol=1e-4, atol=1e-6)


def test_finetune__starts_from_the_given_head(make_photos: MakePhotos, two_stages: Backbone) -> None:
    """At a rate that moves nothing the result is the head that was given."""
    manifest = read(make_photos(train=4, val=3))
    spec = spec_of(two_stages)
    head = _head(spec)
    options = FinetuneOptions(epochs=1, unfreeze="none", lr_head=1e-30, compute="fp32")
    result = finetune(manifest, Task(two_stages, spec, torch.device("cpu"), head), options=options)
    np.testing.assert_array_equal(result.head.weight, head.weight)
    np.testing.assert_array_equal(result.head.bias, head.bias)
    assert result.head.chosen["start"] == "logistic"
