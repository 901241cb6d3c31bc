"""The loop that people write: torchvision's resnet18 as it is, over an ImageFolder, with processes that load.

Run: .venv/bin/python benchmarks/plain_loop.py FOLDER WEIGHTS.pth OUT.npz [--workers 2] [--device cpu|cuda]
Writes the features float32 [N, 512] and the files' paths within FOLDER, in their order; prints the seconds of the loop
alone, from the start of its processes. On a GPU its batches come from pinned memory, and convolutions are PyTorch's
default, which is TF32.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

BATCH_SIZE = 32


def main(data: str, weights: str, out: str, *, n_workers: int, device: str) -> float:
    """Embed every image, write the features, and return the seconds of the loop."""
    network = resnet18()
    network.load_state_dict(torch.load(weights, weights_only=True))
    network.fc = torch.nn.Identity()
    network.eval().to(device)
    normalise = Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    dataset = ImageFolder(data, Compose([Resize(256), CenterCrop(224), ToTensor(), normalise]))
    is_gpu = device != "cpu"
    start = time.perf_counter()
    with torch.inference_mode():
        batches = DataLoader(dataset, batch_size=BATCH_SIZE, num_workers=n_workers, pin_memory=is_gpu)
        features = torch.cat([network(pixels.to(device, non_blocking=True)) for pixels, _ in batches]).cpu()
    seconds = time.perf_counter() - start
    paths = [Path(path).relative_to(data).as_posix() for path, _ in dataset.samples]
    np.savez(out, features=features.numpy(), paths=paths)
    return seconds


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder")
    parser.add_argument("weights")
    parser.add_argument("out")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    loop = main(given.folder, given.weights, given.out, n_workers=given.workers, device=given.device)
    print(json.dumps({"loop_seconds": loop}))
