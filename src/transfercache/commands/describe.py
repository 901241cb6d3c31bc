"""`tlc finetune --describe`: a backbone's stages, and what options would train of them at which rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transfercache import config
from transfercache.backbones.available import RANDOM
from transfercache.backbones.registry import load_backbone
from transfercache.finetuning.groups import ParameterGroup, count_parameters, describe_groups
from transfercache.finetuning.options import FinetuneOptions
from transfercache.plain import fields_of

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class StageDescription:
    """A stage, how many parameters it has, and the module that it ends at."""

    name: str
    parameters: int
    ends_at: str


@dataclass(frozen=True)
class BackboneDescription:
    """The stages in order, and the groups that would train; the head is counted for one class."""

    backbone: str
    dim: int
    stages: tuple[StageDescription, ...]
    groups: tuple[ParameterGroup, ...]
    bad: tuple[()] = ()

    @property
    def next_command(self) -> tuple[str, ...]:
        """The words of the command a person would run next."""
        return ("tlc", "finetune", "my_photos/", "--backbone", self.backbone, "--unfreeze", self.stages[-1].name)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON document of `tlc finetune --describe`."""
        return fields_of(self, without=("bad",))

    def render(self) -> RenderableType:
        """Return the same for a terminal."""
        from rich.table import Table

        groups = {group.name: group for group in self.groups}
        table = Table(
            "stage", "parameters", "ends at", "lr", "weight decay", title=f"{self.backbone}, {self.dim} features"
        )
        parts = [(stage.name, f"{stage.parameters:,}", stage.ends_at) for stage in self.stages]
        for name, parameters, ends_at in (*parts, ("head", f"{self.dim + 1:,} a class", "")):
            group = groups.get(name)
            rates = ("frozen", "") if group is None else (f"{group.lr:.3g}", f"{group.weight_decay:g}")
            table.add_row(name, parameters, ends_at, *rates)
        return table


def describe_backbone(
    backbone: str,
    *,
    has_head: bool = False,
    unfreeze: str = config.UNFREEZE,
    optimizer: config.FinetuneOptimizer = config.FINETUNE_OPTIMIZER,
    lr_backbone: float | None = None,
    lr_head: float | None = None,
    lr_decay: float = config.LR_DECAY,
    weight_decay: float | None = None,
    batch_size: int = config.FINETUNE_BATCH_SIZE,
) -> BackboneDescription:
    """Return the stages of a backbone, and the groups that `finetune` would train with these options.

    `has_head` stands for `init_head`. No weights are read. Raises UsageError for an unknown backbone or stage, or an
    option that is off.
    """
    options = FinetuneOptions(
        has_head=has_head,
        unfreeze=unfreeze,
        optimizer=optimizer,
        lr_backbone=lr_backbone,
        lr_head=lr_head,
        lr_decay=lr_decay,
        weight_decay=weight_decay,
        batch_size=batch_size,
    )
    loaded = load_backbone(backbone, weights=RANDOM)
    sizes = count_parameters(loaded)
    return BackboneDescription(
        backbone=backbone,
        dim=loaded.dim,
        stages=tuple(StageDescription(stage.name, sizes[stage.name], stage.ends_at) for stage in loaded.stages),
        groups=describe_groups(loaded, options, n_classes=1),
    )
