"""Extraction, process to process, against two tools that people install for it, each in an environment of its own.

Run: .venv/bin/python benchmarks/bench_peers.py [PHOTOGRAPHS] [--weights random|PATH] [--images 200] [--repeats 3]
     [--peers embetter,thingsvision] [--environments FOLDER]
Prints JSON. ResNet-18 with the same weights from a file on all sides, images as in bench_extract.py, in turns: `cold`
with nothing kept from before but tlc's converted network, `warm` the same command again, for the sides that keep
embeddings. `times_tlc` is a peer's time over that of tlc in the same round; `difference` is that of its features from
tlc's, relative to the largest. The environments are made by pip in FOLDER (kept there, else temporary; some 7 GB, as
thingsvision pins a torch of its own); a peer that cannot be installed is named with the reason.

embetter      `cached(make_pipeline(ImageLoader(), TimmEncoder()))`, on this environment's torch, and in eval mode,
              which it does not see to itself; with scikit-learn below 1.8, whose later pipelines take it for unfitted
thingsvision  `get_extractor`, `ImageDataset` and its DataLoader; it keeps no embeddings between runs
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from bench_extract import weights_file
from made_photos import make_photos
from safetensors.torch import save_file
from turns import TLC, in_turns, ratios, run_process, spread

from transfercache.backbones.weights import read_state
from transfercache.cache.reader import open_cache
from transfercache.environment import describe_environment

#: What timm has to be told about a state dict in a folder, as torchvision's recipe for it.
_TIMM_CONFIG = {
    "architecture": "resnet18",
    "num_classes": 1000,
    "pretrained_cfg": {
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "crop_pct": 0.875,
        "interpolation": "bilinear",
        "input_size": [3, 224, 224],
        "num_classes": 1000,
        "first_conv": "conv1",
        "classifier": "fc",
    },
}
#: Written once an environment is complete.
_MARK = "complete"


@dataclass(frozen=True)
class Peer:
    """A tool, and how it is installed."""

    name: str
    requirements: tuple[str, ...]
    shares_torch: bool  # where its pins allow it, the packages of this environment are seen by its own
    keeps: bool  # embeddings, between runs
    takes_timm_folder: bool  # else a state dict


PEERS = (
    Peer("embetter", ("embetter[vision]", "scikit-learn<1.8"), shares_torch=True, keeps=True, takes_timm_folder=True),
    Peer("thingsvision", ("thingsvision",), shares_torch=False, keeps=False, takes_timm_folder=False),
)


def install(peer: Peer, environments: Path) -> str | None:
    """Make the environment of a peer where there is none yet; return why it cannot be made, or None."""
    folder = environments / peer.name
    if (folder / _MARK).exists():
        return None
    shutil.rmtree(folder, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    if peer.shares_torch:
        # pip sees what is there, and leaves it alone: it removes nothing outside its own environment.
        (site_packages,) = folder.glob("lib/python*/site-packages")
        (site_packages / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check"]
    done = subprocess.run([*pip, *peer.requirements], capture_output=True, text=True, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        return f"cannot be installed: {(errors or ['pip failed'])[0]}"
    (folder / _MARK).touch()
    return None


def timm_folder(weights: str, folder: Path) -> Path:
    """Write the state dict as a folder that timm loads."""
    folder.mkdir()
    save_file(read_state(Path(weights)), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(_TIMM_CONFIG))
    return folder


def run_tlc(photos: Path, weights: str, folder: Path, *, fresh: bool) -> float:
    """Return the seconds of one extraction; `fresh` from an empty cache."""
    if fresh:
        shutil.rmtree(folder / "cache", ignore_errors=True)
    words = [*TLC, "extract-features", str(photos), "--weights", weights, "--cache-dir", str(folder / "cache")]
    return run_process(words, env={"XDG_CACHE_HOME": str(folder / "networks")}).seconds


def run_peer(peer: Peer, python: Path, photos: Path, weights: str, folder: Path, *, fresh: bool) -> float:
    """Return the seconds of one extraction by a peer; `fresh` with nothing kept."""
    if fresh:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    script = Path(__file__).with_name(f"peer_{peer.name}.py")
    return run_process([str(python), str(script), str(photos), weights, str(folder)]).seconds


def difference(peer_file: Path, cache_dir: Path) -> float:
    """Return by how much a peer's features differ from the cache's, relative to the largest."""
    (catalogue,) = cache_dir.glob("*/catalogue.json")
    table = open_cache(catalogue.parent).table()
    with np.load(peer_file) as arrays:
        row_of = {path: row for row, path in enumerate(arrays["paths"].tolist())}
        theirs = arrays["features"][[row_of[path] for path in table.paths]]
    return float(f"{np.abs(theirs - table.features).max() / np.abs(table.features).max():.2g}")


def measure(photos: Path, weights: str, folder: Path, environments: Path, *, peers: list[Peer], repeats: int) -> Any:
    """Run all sides in turns and return their figures."""
    networks = timm_folder(weights, folder / "timm")
    sides: dict[str, Callable[[], float]] = {
        "tlc, cold": partial(run_tlc, photos, weights, folder, fresh=True),
        "tlc, warm": partial(run_tlc, photos, weights, folder, fresh=False),
    }
    for peer in peers:
        python, given = environments / peer.name / "bin" / "python", weights
        if peer.takes_timm_folder:
            given = str(networks)
        run = partial(run_peer, peer, python, photos, given, folder / peer.name)
        sides[f"{peer.name}, cold"] = partial(run, fresh=True)
        if peer.keeps:
            sides[f"{peer.name}, warm"] = partial(run, fresh=False)
    seconds = in_turns(sides, repeats=repeats)
    figures: dict[str, Any] = {name: {"seconds": spread(values)} for name, values in seconds.items()}
    for peer in peers:
        for state in ("cold", "warm") if peer.keeps else ("cold",):
            name = f"{peer.name}, {state}"
            figures[name]["times_tlc"] = ratios(seconds[name], seconds[f"tlc, {state}"])
        found = difference(folder / peer.name / "features.npz", folder / "cache")
        figures[f"{peer.name}, cold"]["difference"] = found
    return figures


def peer_versions(peer: Peer, environments: Path) -> str:
    """Return the versions that matter of a peer's environment."""
    names = (peer.name, "torch", "torchvision", "timm")
    code = f"from importlib.metadata import version; print(', '.join(f'{{n}} {{version(n)}}' for n in {names}))"
    return run_process([str(environments / peer.name / "bin" / "python"), "-c", code]).stdout.strip()


def main(
    source: Path | None, *, weights: str, n_images: int, repeats: int, names: list[str], environments: Path | None
) -> dict[str, Any]:
    """Measure and return what is printed."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        where = (environments or folder / "environments").absolute()
        asked = [peer for peer in PEERS if peer.name in names]
        why_not = {peer.name: install(peer, where) for peer in asked}
        peers = [peer for peer in asked if why_not[peer.name] is None]
        photos = make_photos(folder / "photos", n_images, source=source)
        file = weights_file(weights, folder)
        figures = measure(photos, file, folder, where, peers=peers, repeats=repeats)
        versions = {peer.name: peer_versions(peer, where) for peer in peers}
    return {
        "images": n_images,
        "made_from": "noise" if source is None else source.name,
        "n": repeats,
        "processes": figures,
        "peers": versions | {name: reason for name, reason in why_not.items() if reason},
        "environment": describe_environment(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photographs", nargs="?", type=Path)
    parser.add_argument("--weights", default="random")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", default=",".join(peer.name for peer in PEERS))
    parser.add_argument("--environments", type=Path)
    given = parser.parse_args()
    printed = main(
        given.photographs,
        weights=given.weights,
        n_images=given.images,
        repeats=given.repeats,
        names=given.peers.split(","),
        environments=given.environments,
    )
    print(json.dumps(printed, indent=1))
