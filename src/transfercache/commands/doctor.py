"""`tlc doctor`: what this machine can compute with, and where tlc keeps what it needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from transfercache import config
from transfercache.backbones.available import auto_engine, bf16_units, kept_networks
from transfercache.backbones.choice import ENGINES, available_computes, bf16_advice, choose_engine
from transfercache.backbones.devices import DEVICES, device_name, pick_device
from transfercache.commands.inputs import BadImage, cache_root
from transfercache.environment import describe_environment
from transfercache.errors import ResourceError, UsageError
from transfercache.images.decode import load_fast
from transfercache.plain import fields_of
from transfercache.spec import DECODERS

if TYPE_CHECKING:
    from rich.console import RenderableType

_DATA = "my_photos/"  # what the suggested commands are about


@dataclass(frozen=True)
class Diagnosis:
    """What tlc found; each part is plain JSON."""

    environment: dict[str, Any]  # machine, versions
    bf16_units: tuple[str, ...]  # of the processor
    devices: list[dict[str, Any]]  # those seen: device, name, engine (of `auto`), computes
    engines: list[dict[str, Any]]  # all: engine, devices it runs on, and where that is none, the reason
    decoders: list[dict[str, Any]]  # all: decode (as `--decode` names it), and where it cannot be loaded, the reason
    device: str  # what `--device auto` takes
    advice: str | None  # what would be faster here
    folders: list[dict[str, Any]]  # what, path, is_writable
    bad: tuple[BadImage, ...] = ()  # no image is read

    @property
    def next_command(self) -> tuple[str, ...]:
        """The words of the command that would pay here."""
        faster = ("--compute", "bf16") if self.advice else ()
        return ("tlc", "extract-features", _DATA, *faster)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON document of `tlc doctor`."""
        return {**self.environment, **fields_of(self, without=("environment", "bad"))}

    def render(self) -> RenderableType:
        """Return the same for a terminal, a line a fact."""
        from rich.text import Text

        return Text("\n".join(self._lines()))

    def _lines(self) -> Iterator[str]:
        machine, versions = self.environment["machine"], self.environment["versions"]
        yield ", ".join(f"{name} {version}" for name, version in versions.items())
        yield f"{machine['processor']}, {machine['cores']} cores, {machine['vector_units']}, {machine['system']}"
        for seen in self.devices:
            taken = " (auto)" if seen["device"] == self.device else ""
            yield (
                f"device {seen['device']}{taken}: {seen['name']}; engine {seen['engine']} (auto); "
                f"precisions {', '.join(seen['computes'])}"
            )
        for engine in self.engines:
            yield f"engine {engine['engine']}: " + (engine["reason"] or f"runs on {', '.join(engine['devices'])}")
        for decoder in self.decoders:
            yield f"decode {decoder['decode']}: {decoder['reason'] or 'can be loaded'}"
        if self.advice:
            yield self.advice
        for folder in self.folders:
            yield f"{folder['what']}: {folder['path']}" + ("" if folder["is_writable"] else " (cannot be written)")


def doctor() -> Diagnosis:
    """Look at the machine, the installed packages and the folders; nothing is changed, downloaded or sent."""
    seen = [name for name in DEVICES if name != "auto" and _is_seen(name)]
    device = pick_device("auto").type
    return Diagnosis(
        environment=describe_environment(),
        bf16_units=bf16_units(),
        devices=[_describe_device(name) for name in seen],
        engines=[_describe_engine(name, seen) for name in ENGINES],
        decoders=[_describe_decoder(name) for name in DECODERS],
        device=device,
        advice=bf16_advice() if device == "cpu" else None,
        folders=[_describe_folder(what, path) for what, path in _folders().items()],
    )


def _is_seen(device: str) -> bool:
    try:
        pick_device(device)
    except ResourceError:
        return False
    return True


def _describe_device(name: str) -> dict[str, Any]:
    return {
        "device": name,
        "name": device_name(pick_device(name)),
        "engine": auto_engine(name),
        "computes": list(available_computes(name)),
    }


def _describe_engine(engine: str, devices: list[str]) -> dict[str, Any]:
    runs_on, reason = [], None
    for device in devices:
        try:
            choose_engine(engine, device=device)
            runs_on.append(device)
        except (UsageError, ResourceError) as error:
            reason = str(error)
    return {"engine": engine, "devices": runs_on, "reason": None if runs_on else reason}


def _describe_decoder(decode: str) -> dict[str, Any]:
    reason = None
    if decode == "fast":
        try:
            load_fast()
        except ResourceError as error:
            reason = str(error)
    return {"decode": decode, "reason": reason}


def _folders() -> dict[str, Path]:
    return {
        "caches": cache_root(None),
        "models": Path(config.MODELS_DIR),
        "weights": Path(torch.hub.get_dir()) / "checkpoints",
        "data and converted networks": kept_networks().parent,
    }


def _describe_folder(what: str, path: Path) -> dict[str, Any]:
    absolute = path.expanduser().absolute()
    # What does not exist yet is made, where the nearest folder above it can be written. Path.exists would raise below a
    # folder that may not be searched; to this, that folder is the nearest.
    nearest = next(folder for folder in (absolute, *absolute.parents) if os.path.exists(folder))
    is_writable = nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)
    return {"what": what, "path": str(absolute), "is_writable": is_writable}
