"""Extraction, process to process, against the plain loop, and as a share of what decoding and forward passes allow.

Run: .venv/bin/python benchmarks/bench_extract.py [PHOTOGRAPHS] [--weights random|PATH] [--images 1000] [--repeats 5]
Prints JSON. The images are crops of the PHOTOGRAPHS, each encoded anew, or made. ResNet-18. The sides take turns:

plain loop      benchmarks/plain_loop.py: eager torchvision, DataLoader with two processes, batches of 32
tlc             `tlc extract-features` into an empty cache, with the engine of `auto`, its converted network kept
tlc, cold       the same with no converted network to be found
tlc, bf16       `--compute bf16`, where the processor has units for it, with its network kept

`roofline`: decoding alone (on all cores) and forward passes alone (resident pixels, all cores) share the cores, so
that no loop makes more than 1 / (1 / decode + 1 / forward) images a second; `stage_share` is what that of tlc makes of
it, from its first image to its last row on the disk. `forward_share_of_sgemm` is in multiplications of the network and
of a large float32 product. `accuracy`, where PHOTOGRAPHS are given, is that of logistic heads on these themselves,
extracted in each precision. Excluded from nothing: interpreter start, imports and reading the weights are in the times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from made_photos import make_photos
from torchvision.models import ResNet18_Weights, resnet18
from turns import TLC, in_turns, ratios, run_process, sgemm_gflops, spread, timed

import transfercache as tc
from transfercache.backbones.available import auto_engine, bf16_units
from transfercache.backbones.choice import choose_engine
from transfercache.backbones.registry import Backbone, load_backbone
from transfercache.environment import describe_environment
from transfercache.finetuning.augment import Augmentation
from transfercache.images.decode import load_image
from transfercache.images.files import HashedFile
from transfercache.images.processes import decode_ahead
from transfercache.images.transforms import eval_pixels
from transfercache.stopwatch import Stopwatch

BATCH_SIZE = 32
_WINDOW = 768  # three of a GPU's batches, as an extraction has under way
#: Of the forward passes alone; as many batches as are timed at once.
RESIDENT_BATCHES = 8
#: Features of the two sides, relative to the largest: what differs by more is not the same work.
SAME_WORK = 1e-4
#: Multiply-adds of one image.
GIGA_MACS = ResNet18_Weights.IMAGENET1K_V1.meta["_ops"]

Figures = dict[str, float]


def weights_file(given: str, folder: Path) -> str:
    """Return a state dict that all sides can load."""
    if given != "random":
        return str(Path(given).absolute())
    torch.manual_seed(0)
    path = folder / "random.pth"
    torch.save(resnet18().state_dict(), path)
    return str(path)


def plain_side(photos: Path, weights: str, out: Path) -> Callable[[], Figures]:
    """Return what runs the plain loop as a process."""
    script = str(Path(__file__).with_name("plain_loop.py"))
    return lambda: {"seconds": run_process([sys.executable, script, str(photos), weights, str(out)]).seconds}


def tlc_side(photos: Path, weights: str, folder: Path, *words: str, keep: bool) -> Callable[[], Figures]:
    """Return what runs `tlc extract-features` into an empty cache; `keep` keeps the converted network in `folder`."""

    def run() -> Figures:
        with tempfile.TemporaryDirectory(dir=folder) as empty:
            command = [*TLC, "extract-features", str(photos), "--weights", weights, "--cache-dir", empty, "--json"]
            env = {"XDG_CACHE_HOME": str(folder / "kept" if keep else Path(empty) / "nothing")}
            finished = run_process([*command, *words], env=env)
            document = json.loads(finished.stdout)
        return {
            "seconds": finished.seconds,
            "stage_images_per_s": document["computed"] / document["seconds"]["loop"],
        }

    return run


def decode_side(paths: list[Path], backbone: Backbone, *, workers: int | None = None) -> Callable[[], Figures]:
    """Return what decodes all images as an extraction does, in images a second."""
    decode = Augmentation(backbone.preprocessing, epoch=None, augment="none", crop_area=1.0, seed=0)
    files = [(0, HashedFile(path, str(path), None)) for path in paths]

    def run() -> Figures:
        images = decode_ahead(files, decode, n_images=len(files), workers=workers, window=_WINDOW, watch=Stopwatch())
        return {"images_per_s": len(paths) / timed(lambda: [done.result().shape for _, done in images])}

    return run


def forward_side(pixels: np.ndarray, backbone: Backbone, *, engine: str, compute: str) -> Callable[[], Figures]:
    """Return what runs an engine over batches that lie in memory, uint8 [B, 224, 224, 3], in images a second."""
    chosen = choose_engine(engine, device="cpu", compute=compute).build(backbone)
    chosen.embed(pixels)  # compiles

    def run() -> Figures:
        seconds = timed(lambda: [chosen.embed(pixels) for _ in range(RESIDENT_BATCHES)])
        return {"images_per_s": RESIDENT_BATCHES * len(pixels) / seconds}

    return run


def check_same_work(photos: Path, weights: str, plain: Path, folder: Path) -> float:
    """Return the largest difference of the two sides' features, relative to the largest feature."""
    with np.load(plain) as arrays:
        row_of = {path: row for row, path in enumerate(arrays["paths"].tolist())}
        theirs = arrays["features"]
    table = tc.extract_features(photos, weights=weights, cache_dir=folder / "compared").table()
    expected = theirs[[row_of[path] for path in table.paths]]
    difference = float(np.abs(table.features - expected).max() / np.abs(expected).max())
    if not (len(table.paths) == len(theirs) and difference < SAME_WORK):
        raise SystemExit(f"the two sides' features differ by {difference:.2g} of the largest: not the same work")
    return float(f"{difference:.2g}")


def accuracies(data: Path, weights: str, computes: list[str], *, folder: Path, seeds: int) -> dict[str, Any]:
    """Return the accuracy of logistic heads on the reported split of DATA, its embeddings made in each precision."""
    made = {
        compute: tc.extract_features(data, weights=weights, compute=compute, cache_dir=folder, on_bad="skip")
        for compute in computes
    }
    out = folder / "head.safetensors"
    heads = {compute: [tc.train_head(made[compute], seed=seed, out=out) for seed in range(seeds)] for compute in made}
    features = {compute: made[compute].table().features for compute in made}
    full = features["fp32"]
    labels = {compute: heads[compute][0].predict(features[compute]) for compute in made}
    return {
        compute: {
            "mean_accuracy": round(statistics.mean(head.reported.accuracy for head in heads[compute]), 4),
            "reported_images": heads[compute][0].reported.n,
            "largest_error": float(f"{np.abs(features[compute] - full).max() / np.abs(full).max():.2g}"),
            "labelled_otherwise": int(np.sum(labels[compute] != labels["fp32"])),
        }
        for compute in made
    }


def measure(photos: Path, weights: str, folder: Path, *, repeats: int, computes: list[str]) -> dict[str, Any]:
    """Run all sides in turns and return their figures."""
    paths = sorted(photos.rglob("*.jpg"))
    backbone = load_backbone("resnet18", weights=weights)
    images = [load_image(path, str(path)) for path in paths[:BATCH_SIZE]]
    pixels = np.stack([eval_pixels(image, backbone.preprocessing) for image in images])
    sides = {
        "plain loop": plain_side(photos, weights, folder / "plain.npz"),
        "decode": decode_side(paths, backbone),
    }
    for compute in computes:  # what is divided by each other runs one after the other
        forward = forward_side(pixels, backbone, engine="auto", compute=compute)
        ours = tlc_side(photos, weights, folder, "--compute", compute, keep=True)
        sides |= {f"forward, {compute}": forward, "tlc" if compute == "fp32" else f"tlc, {compute}": ours}
    sides |= {
        "tlc, cold": tlc_side(photos, weights, folder, keep=False),
        "forward, eager fp32": forward_side(pixels, backbone, engine="eager", compute="fp32"),
        "sgemm": lambda: {"gflops": sgemm_gflops(torch.matmul, torch.from_numpy)},
    }
    rounds = in_turns(sides, repeats=repeats)
    columns = {name: {key: [one[key] for one in side] for key in side[0]} for name, side in rounds.items()}
    return {
        "same_work_to": check_same_work(photos, weights, folder / "plain.npz", folder),
        "processes": processes(columns, computes),
        "roofline": {
            "decode_images_per_s": spread(columns["decode"]["images_per_s"]),
            "eager_forward_images_per_s": spread(columns["forward, eager fp32"]["images_per_s"]),
            "sgemm_gflops": spread(columns["sgemm"]["gflops"]),
            **{compute: roofline(columns, compute) for compute in computes},
        },
    }


def processes(columns: dict[str, dict[str, list[float]]], computes: list[str]) -> dict[str, Any]:
    """Return the seconds of each process, and how many times faster than the plain loop it was."""
    plain = columns["plain loop"]["seconds"]
    ours = ["tlc", "tlc, cold", *(f"tlc, {compute}" for compute in computes[1:])]
    return {
        "plain loop": {"seconds": spread(plain)},
        **{
            name: {
                "seconds": spread(columns[name]["seconds"]),
                "times_faster": ratios(plain, columns[name]["seconds"]),
            }
            for name in ours
        },
    }


def roofline(columns: dict[str, dict[str, list[float]]], compute: str) -> dict[str, Any]:
    """Return the forward rate, that of the extraction stage, and its share of what the two rates allow together."""
    decode, forward = columns["decode"]["images_per_s"], columns[f"forward, {compute}"]["images_per_s"]
    stage = columns["tlc" if compute == "fp32" else f"tlc, {compute}"]["stage_images_per_s"]
    together = [1 / (1 / a + 1 / b) for a, b in zip(decode, forward, strict=True)]
    sgemm = [gflops / (2 * GIGA_MACS) for gflops in columns["sgemm"]["gflops"]]  # images a second
    return {
        "forward_images_per_s": spread(forward),
        "forward_share_of_sgemm": ratios(forward, sgemm),
        "stage_images_per_s": spread(stage),
        "stage_share": ratios(stage, together),
    }


def main(source: Path | None, *, weights: str, n_images: int, repeats: int, seeds: int) -> dict[str, Any]:
    """Measure and return what is printed."""
    computes = ["fp32", "bf16"] if bf16_units() else ["fp32"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = weights_file(weights, folder)
        photos = make_photos(folder / "photos", n_images, source=source)
        figures = measure(photos, file, folder, repeats=repeats, computes=computes)
        if source is not None:
            figures["accuracy"] = accuracies(source, file, computes, folder=folder, seeds=seeds)
    return {
        "images": n_images,
        "made_from": "noise" if source is None else source.name,
        "n": repeats,
        "engine": auto_engine("cpu"),
        "bf16_units": ", ".join(bf16_units()) or "none: bf16 is not measured",
        **figures,
        "environment": describe_environment(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photographs", nargs="?", type=Path)
    parser.add_argument("--weights", default="random")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=5, help="of the heads whose accuracy is given")
    given = parser.parse_args()
    printed = main(
        given.photographs, weights=given.weights, n_images=given.images, repeats=given.repeats, seeds=given.seeds
    )
    print(json.dumps(printed, indent=1))
