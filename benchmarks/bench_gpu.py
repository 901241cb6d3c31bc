"""A GPU: what its network and engines make, end to end beside the plain loop, how near its features are to a CPU's.

Run: .venv/bin/python benchmarks/bench_gpu.py [PHOTOGRAPHS] [--weights random|PATH] [--device cuda] [--images 8000]
     [--batches 64,256,1024] [--repeats 5] [--only PART,...]
Prints JSON. ResNet-18. The images are crops of the PHOTOGRAPHS, each encoded anew, or made. The parts:

rates       the bare network on normalised tensors that lie on the device, and its share of the device's own rate of
            matrix products in that precision, fp32 without TF32; beside what an engine does, at the middle batch size,
            what it does not
engines     `Engine.embed` from uint8 in host memory to features there, at the middle batch size
end_to_end  `tlc extract-features` as a process into an empty cache; `stage`: from its first image to its last row on
            the disk, and which of decoding (by its workers), forward passes and writing the others wait for;
            decoding alone; and the plain loop, with a loading process a core, whose convolutions are TF32 on a GPU
parity      features of the PHOTOGRAPHS on the device against eager fp32 on the CPU: the least cosine of a row, the
            largest difference as a share of the largest feature, and how many get the label that a head trained on the
            CPU's features gives them there
memory      a batch of 1,024 images on a card that is full but for 1 GiB, against the same on an empty one

With `--device cpu` all that is tiny and in fp32: compiling is refused there, a CPU's memory is not filled, and half
precision on a CPU is bench_extract.py's.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_extract import Figures, decode_side, weights_file
from device_rates import engine_rates, network_rates
from made_photos import make_photos
from turns import TLC, in_turns, ratios, run_process, spread

import transfercache as tc
from transfercache.backbones.choice import available_computes
from transfercache.backbones.devices import device_name
from transfercache.backbones.engines import EagerEngine
from transfercache.backbones.registry import Backbone, load_backbone
from transfercache.environment import describe_environment, n_cores
from transfercache.images.decode import load_image
from transfercache.images.processes import decoding_workers
from transfercache.images.transforms import eval_pixels
from transfercache.stopwatch import busiest

PARTS = ("rates", "engines", "end_to_end", "parity", "memory")
ONE_THREAD_IMAGES = 500
LARGE_BATCH = 1024
LEFT_FREE_BYTES = 1 << 30


def read_pixels(photos: Path, backbone: Backbone, n_images: int) -> np.ndarray:
    """Return uint8 [n_images, crop, crop, 3], the photographs over and over."""
    paths = sorted(photos.rglob("*.jpg"))[:n_images]
    images = np.stack([eval_pixels(load_image(path, str(path)), backbone.preprocessing) for path in paths])
    return images[np.arange(n_images) % len(images)]


def tlc_side(photos: Path, weights: str, folder: Path, *words: str) -> Callable[[], Figures]:
    """Return what runs `tlc extract-features` by the eager engine into an empty cache."""

    def run() -> Figures:
        with tempfile.TemporaryDirectory(dir=folder) as empty:
            flags = (f"--weights={weights}", f"--cache-dir={empty}", "--engine=eager", "--json")
            finished = run_process([*TLC, "extract-features", str(photos), *flags, *words])
        document = json.loads(finished.stdout)
        stages = {stage: document["seconds"][stage] for stage in ("loop", "decode", "forward", "write")}
        return {"seconds": finished.seconds, "images_per_s": document["computed"] / stages["loop"], **stages}

    return run


def plain_side(photos: Path, weights: str, folder: Path, device: torch.device, n_images: int) -> Callable[[], Figures]:
    """Return what runs the plain loop on the device, with a loading process a core."""
    script = str(Path(__file__).with_name("plain_loop.py"))
    words = [sys.executable, script, str(photos), weights, str(folder / "plain.npz")]

    def run() -> Figures:
        finished = run_process([*words, f"--workers={n_cores()}", f"--device={device.type}"])
        return {
            "seconds": finished.seconds,
            "images_per_s": n_images / json.loads(finished.stdout)["loop_seconds"],
        }

    return run


def end_to_end(
    photos: Path, weights: str, folder: Path, backbone: Backbone, device: torch.device, *, batch: int, repeats: int
) -> dict[str, Any]:
    """Run whole processes in turns, and decoding alone."""
    paths = sorted(photos.rglob("*.jpg"))
    words = (f"--device={device.type}", f"--batch-size={batch}")
    sides: dict[str, Callable[[], Figures]] = {
        "plain loop": plain_side(photos, weights, folder, device, len(paths)),
        "decode": decode_side(paths, backbone),
        "decode, one thread": decode_side(paths[:ONE_THREAD_IMAGES], backbone, workers=1),
        "tlc, fp32": tlc_side(photos, weights, folder, *words),
    }
    if device.type == "cuda":
        sides["tlc, bf16"] = tlc_side(photos, weights, folder, *words, "--compute=bf16")
    rounds = in_turns(sides, repeats=repeats)
    columns = {name: {key: [one[key] for one in side] for key in side[0]} for name, side in rounds.items()}
    plain = columns["plain loop"]
    decode, by_one = (columns.pop(name)["images_per_s"] for name in ("decode", "decode, one thread"))
    return {
        "images": len(paths),
        "decode_alone": {"images_per_s": spread(decode), "times_one_thread": ratios(decode, by_one)},
        **{
            name: {
                "seconds": spread(side["seconds"]),
                "times_faster": ratios(plain["seconds"], side["seconds"]),
                "stage_images_per_s": spread(side["images_per_s"]),
                **(_stages(side, len(paths)) if "loop" in side else {}),
            }
            for name, side in columns.items()
        },
    }


def _stages(side: dict[str, list[float]], n_images: int) -> dict[str, Any]:
    """Return the seconds of each stage, those of decoding by its workers, and the one that the others wait for."""
    threads = {"decode": decoding_workers(None, n_images), "forward": 1, "write": 1}
    seconds = {stage: spread([one / threads.get(stage, 1) for one in side[stage]]) for stage in ("loop", *threads)}
    totals = {stage: sum(side[stage]) for stage in threads}
    return {"stage_seconds": seconds, "bottleneck": busiest(totals, threads=threads)}


def parity(
    data: Path, weights: str, folder: Path, device: torch.device, *, computes: Sequence[str], batch: int
) -> dict[str, Any]:
    """Compare features and predictions of the device with those of eager fp32 on the CPU."""
    extract = partial(tc.extract_features, data, weights=weights, batch_size=batch, on_bad="skip")
    reference = extract(cache_dir=folder / "reference", device="cpu", engine="eager")
    head = tc.train_head(reference, out=folder / "head.safetensors")
    expected = reference.table().features  # float32 [N, D]
    labels = head.predict(expected)
    ways = [(compute, "eager") for compute in computes]
    if device.type == "cuda":
        ways += [("fp32", "compile"), ("bf16", "compile")]
    found: dict[str, Any] = {"images": len(expected), "accuracy_of_the_head": round(head.reported.accuracy, 4)}
    for compute, engine in ways:
        cache_dir = folder / f"{compute}-{engine}"
        made = extract(cache_dir=cache_dir, device=device.type, compute=compute, engine=engine)
        features = made.table().features
        found[compute if engine == "eager" else f"{compute} {engine}"] = {
            **_differences(features, expected),
            "equal_labels": int(np.sum(head.predict(features) == labels)),
        }
    return found


def _differences(found: np.ndarray, expected: np.ndarray) -> dict[str, float]:
    a, b = found.astype(np.float64), expected.astype(np.float64)
    cosines = (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
    return {
        "least_cosine": round(float(cosines.min()), 9),
        "largest_error": float(f"{np.abs(a - b).max() / np.abs(b).max():.3g}"),
    }


def memory(backbone: Backbone, device: torch.device, pixels: np.ndarray) -> dict[str, Any]:
    """Embed a batch that does not fit into what is left of the card, and compare it with an empty card's features."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("transfercache").addHandler(handler)
    expected = EagerEngine(backbone, device).embed(pixels)
    said_on_an_empty_card = len(said)
    engine = EagerEngine(backbone, device)
    engine.embed(pixels[:2])  # its libraries take what they need
    torch.cuda.empty_cache()
    free, whole = torch.cuda.mem_get_info(device)
    taken = torch.empty(free - LEFT_FREE_BYTES, dtype=torch.uint8, device=device)
    features = engine.embed(pixels)
    again = engine.embed(pixels)
    del taken
    return {
        "images": len(pixels),
        "card_gib": round(whole / 2**30, 1),
        "said_on_an_empty_card": said_on_an_empty_card,
        "said": "; ".join(said),
        **_differences(features, expected),
        "equal_rows_when_repeated": int((features == again).all(axis=1).sum()),
    }


def main(
    source: Path | None,
    *,
    weights: str,
    device: torch.device,
    n_images: int,
    batches: list[int],
    repeats: int,
    parts: list[str],
) -> dict[str, Any]:
    """Measure the parts and return what is printed."""
    computes = available_computes("cuda") if device.type == "cuda" else ("fp32",)
    batch = batches[len(batches) // 2]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = weights_file(weights, folder)
        photos = make_photos(folder / "photos", n_images, source=source)
        backbone = load_backbone("resnet18", weights=file)
        work: dict[str, Callable[[], dict[str, Any]]] = {
            "rates": lambda: network_rates(backbone, device, computes=computes, batches=batches, repeats=repeats),
            "engines": lambda: engine_rates(
                backbone, device, read_pixels(photos, backbone, batch), computes=computes, repeats=repeats
            ),
            "end_to_end": lambda: end_to_end(photos, file, folder, backbone, device, batch=batch, repeats=repeats),
            "parity": lambda: parity(source or photos, file, folder, device, computes=computes, batch=batch),
        }
        if device.type == "cuda":
            work["memory"] = lambda: memory(backbone, device, read_pixels(photos, backbone, LARGE_BATCH))
        figures = {part: work[part]() for part in parts if part in work}
    return {
        "device": device_name(device),
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "cudnn": torch.backends.cudnn.version() if device.type == "cuda" else None,
        "made_from": "noise" if source is None else source.name,
        "n": repeats,
        **figures,
        "environment": describe_environment(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photographs", nargs="?", type=Path)
    parser.add_argument("--weights", default="random")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--batches", default="64,256,1024")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, joined by commas")
    given = parser.parse_args()
    printed = main(
        given.photographs,
        weights=given.weights,
        device=torch.device(given.device),
        n_images=given.images,
        batches=[int(batch) for batch in given.batches.split(",")],
        repeats=given.repeats,
        parts=given.only.split(","),
    )
    print(json.dumps(printed, indent=1))
