"""A network in two parts, cut where a stage ends: the frozen one, whose activations a cache keeps, and the rest."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace

from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from transfercache.backbones.architecture import meta_output
from transfercache.backbones.registry import Backbone
from transfercache.errors import UsageError, did_you_mean
from transfercache.spec import POOLED, stage_boundary

# What running a forward on placeholders raises where it needs their numbers.
_NOT_TRACED = (TypeError, ValueError, RuntimeError, AttributeError, LookupError)


def frozen_part(backbone: Backbone, stage: str) -> Backbone:
    """Return the network up to the end of `stage` as a backbone whose embedding is the flattened activation.

    Its boundary names the stage and the activation's shape; its tensors, and the digest of the weights, are those of
    the whole. Raises UsageError for an unknown stage, for the last one, behind which nothing is left to train but the
    head, and where the network cannot be cut.
    """
    before, _ = cut_after(backbone.network, stage_end(backbone, stage), name=backbone.name)
    shape = tuple(meta_output(before, backbone.preprocessing.crop).shape[1:])
    return replace(
        backbone,
        network=nn.Sequential(before, nn.Flatten()).eval(),
        dim=math.prod(shape),
        classifier=None,
        boundary=stage_boundary(stage, shape),
    )


def share_behind(backbone: Backbone, stage: str) -> float:
    """Return which share of the network's multiplications for an image comes after the end of `stage`."""
    before, _ = cut_after(backbone.network, stage_end(backbone, stage), name=backbone.name)
    return 1 - _multiplications(before, backbone) / _multiplications(backbone.network, backbone)


def _multiplications(network: nn.Module, backbone: Backbone) -> int:
    with FlopCounterMode(display=False) as counter:
        meta_output(network, backbone.preprocessing.crop)
    return int(counter.get_total_flops())


def stage_end(backbone: Backbone, stage: str) -> str:
    """Return the dotted path of the module that a stage before the last ends at; raises UsageError for another name."""
    ends = {one.name: one.ends_at for one in backbone.stages[:-1]}
    if stage not in ends:
        known = (POOLED, *ends)
        raise UsageError(
            f"{backbone.name} has no boundary {stage!r}{did_you_mean(stage, known)}; give one of {', '.join(known)}"
        )
    return ends[stage]


def cut_after(network: nn.Module, path: str, *, name: str) -> tuple[nn.Module, nn.Module]:
    """Return `network` up to and including its module at the dotted `path`, and what follows, fed with that output.

    Both share the modules and tensors of `network`, so that training a part trains it. What its own forward decides in
    Python is decided as in its present mode. Raises UsageError, naming `name`, where the forward cannot be traced, does
    not run that module just once, or uses later on what was computed before it.
    """
    try:
        # The image is given; whatever else a forward takes (timm's: a mask) stays as it is by default.
        _, *others = inspect.signature(network.forward).parameters.values()
        graph = _Tracer(path).trace(network, concrete_args={other.name: other.default for other in others})
    except _NOT_TRACED as error:
        raise _no_cut(name, path, f"its forward cannot be traced: {error}") from error
    ends = [node for node in graph.nodes if node.op == "call_module" and node.target == path]
    if len(ends) != 1:
        raise _no_cut(name, path, f"it runs that module {len(ends)} times")
    end, output = ends[0], next(node for node in graph.nodes if node.op == "output")
    behind = _needed_by(output, stop=end)
    if end not in behind or any(node.op == "placeholder" for node in behind):
        raise _no_cut(name, path, "what follows also takes what was computed before it")
    before = _part(network, graph, _needed_by(end), last=end)
    return before, _part(network, graph, behind - {output}, last=output.args[0], start=end)


class _Tracer(fx.Tracer):
    """Looks into the modules around the one at `path` alone; all others run as they are, whatever is in them."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not self._path.startswith(f"{module_qualified_name}.")


def _needed_by(node: fx.Node, *, stop: fx.Node | None = None) -> set[fx.Node]:
    """Return the nodes that `node` is computed from, itself included, not looking behind `stop`."""
    found, left = {node}, [node]
    while left:
        one = left.pop()
        new = set() if one is stop else set(one.all_input_nodes) - found
        found |= new
        left += new
    return found


def _part(
    network: nn.Module, graph: fx.Graph, nodes: set[fx.Node], *, last: fx.node.Argument, start: fx.Node | None = None
) -> nn.Module:
    """Return a module that computes `last` by these nodes, in their order; `start` becomes its input."""
    part = fx.Graph()
    copies = {} if start is None else {start: part.placeholder("activations")}
    for node in graph.nodes:
        if node in nodes and node not in copies:
            copies[node] = part.node_copy(node, copies.__getitem__)
    part.output(fx.node.map_arg(last, copies.__getitem__))
    return fx.GraphModule(network, part)


def _no_cut(name: str, path: str, reason: str) -> UsageError:
    return UsageError(
        f"{name}: it cannot be cut after {path or 'its last layer'} ({reason}), so that nothing of it can be cached "
        "there; train it on the images, without --cached"
    )
