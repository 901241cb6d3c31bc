"""From a name and its weights to a `Backbone`: a network that turns images into embeddings."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from transfercache.backbones.architecture import Architecture, LoadedWeights, find_head
from transfercache.backbones.available import DEFAULT, RANDOM
from transfercache.backbones.known import FrozenBackbone
from transfercache.backbones.stages import Stage
from transfercache.backbones.timm_adapter import LITE0, TIMM_PREFIX, lite0_architecture, timm_architecture
from transfercache.backbones.torchvision_adapter import torchvision_architecture, torchvision_names
from transfercache.backbones.weights import load_state, read_state, seeded, weights_digest
from transfercache.errors import UsageError, WeightsError, did_you_mean
from transfercache.randomness import derive_seed

_RANDOM_SEED = 0
_RANDOM_SOURCE = {"kind": "random", "where": f"seed {_RANDOM_SEED}", "licence": "none needed"}

# Ends in a convolution, and so has no input of a last nn.Linear.
_NO_EMBEDDING = ("squeezenet1_0", "squeezenet1_1")


@dataclass(frozen=True, eq=False, kw_only=True)
class Backbone(FrozenBackbone):
    """A loaded network whose head has been taken out; `network` maps float32 [B, 3, crop, crop] to float32 [B, D]."""

    network: nn.Module  # in eval mode, float32, on the CPU; nn.Identity at head_path
    classifier: nn.Linear | None  # what stood at head_path; None where the network or its weights bring none
    head_path: str  # dotted, such as "fc"
    stages: tuple[Stage, ...]
    weights_file: Path | None = None  # what was read; None for random ones, and for those of a hub

    def load(self) -> Backbone:
        """Return itself: it is loaded."""
        return self


def known_backbones() -> list[str]:
    """Return the names that `load_backbone` takes, sorted; `timm:NAME` is one more form."""
    return sorted({*torchvision_names(), LITE0} - set(_NO_EMBEDDING))


def load_backbone(name: str, *, weights: str = DEFAULT, expected_digest: str | None = None) -> Backbone:
    """Load a backbone with DEFAULT (published), `random` (seed 0) or a file's weights.

    Raises UsageError for an unknown name or a network without an embedding, WeightsError where the weights cannot
    be had, are of another architecture, or do not have `expected_digest`, ResourceError for a missing extra.
    """
    architecture = _architecture(name)
    with seeded(_RANDOM_SEED):
        network = architecture.build().eval()
    head = find_head(network, name=name, crop=architecture.preprocessing.crop)
    loaded = _resolve(architecture, weights, network)
    own_names = {architecture.own_name(given): tensor for given, tensor in loaded.state.items()}
    state = {own: tensor for own, tensor in own_names.items() if own is not None}
    has_head = load_state(network, state, head_path=head.path, what=f"{loaded.source['where']} as {name}")
    taken_out = network.get_submodule(head.path)
    network.set_submodule(head.path, nn.Identity().eval())
    backbone = Backbone(
        name=architecture.name,
        network=network,
        dim=head.dim,
        classifier=taken_out if has_head and isinstance(taken_out, nn.Linear) else None,
        head_path=head.path,
        preprocessing=architecture.preprocessing,
        weights_digest=weights_digest(network.state_dict()),
        weights_source=dict(loaded.source),
        stages=architecture.stages(network),
        weights_file=loaded.file,
    )
    if expected_digest is not None and backbone.weights_digest != expected_digest:
        raise WeightsError(
            f"{loaded.source['where']}: these weights of {name} have the digest {backbone.weights_digest}, not the "
            f"expected {expected_digest}; pass --weights PATH with those that were used then"
        )
    return backbone


def network_with_head(backbone: Backbone, n_classes: int, *, seed: int) -> nn.Module:
    """Return a copy of the network with a new nn.Linear(D, n_classes) as its head, in torch's own initialisation.

    The copy is in eval mode and maps [B, 3, crop, crop] to logits [B, n_classes]. Only `seed` decides on the head.
    """
    network = copy.deepcopy(backbone.network)
    with seeded(derive_seed(seed, "head")):
        head = nn.Linear(backbone.dim, n_classes)
    network.set_submodule(backbone.head_path, head)
    return network.eval()


def plain_network(name: str, n_classes: int) -> nn.Module:
    """Return the library's own network with `n_classes` outputs and random weights, in eval mode.

    Raises as `load_backbone` does for a name.
    """
    with seeded(_RANDOM_SEED):
        return _architecture(name).build(num_classes=n_classes).eval()


def plain_call(name: str, n_classes: int) -> str:
    """Return the Python that makes `plain_network`'s network without tlc."""
    return _architecture(name).call.format(n_classes)


def _architecture(name: str) -> Architecture:
    if name.startswith(TIMM_PREFIX):
        return timm_architecture(name)
    if name == LITE0:
        return lite0_architecture()
    if name in torchvision_names():
        return torchvision_architecture(name)
    raise UsageError(
        f"unknown backbone {name!r}{did_you_mean(name, known_backbones())}; "
        f"known are torchvision's classification models, {LITE0} and {TIMM_PREFIX}NAME"
    )


def _resolve(architecture: Architecture, weights: str, network: nn.Module) -> LoadedWeights:
    """Return the weights of these words; `network` has those that are random."""
    if weights == RANDOM:
        return LoadedWeights(network.state_dict(), _RANDOM_SOURCE)
    if weights == DEFAULT:
        return architecture.default_weights()
    path = Path(weights).expanduser().absolute()
    return LoadedWeights(read_state(path), {"kind": "file", "where": str(path), "licence": "not known to tlc"}, path)
