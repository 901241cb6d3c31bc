"""The loop that people write: torchvision's resnet18 as it is, over an ImageFolder, with two loading processes.

Run: .venv/bin/python benchmarks/plain_loop.py FOLDER WEIGHTS.pth OUT.npz
Writes the features float32 [N, 512] and the files' paths within FOLDER, in their order.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import CenterCrop, Compose, Normalize, Resize, ToTensor

BATCH_SIZE = 32
N_WORKERS = 2


def main(data: str, weights: str, out: str) -> None:
    """Embed every image and write the features."""
    network = resnet18()
    network.load_state_dict(torch.load(weights, weights_only=True))
    network.fc = torch.nn.Identity()
    network.eval()
    normalise = Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    dataset = ImageFolder(data, Compose([Resize(256), CenterCrop(224), ToTensor(), normalise]))
    with torch.inference_mode():
        batches = DataLoader(dataset, batch_size=BATCH_SIZE, num_workers=N_WORKERS)
        features = torch.cat([network(pixels) for pixels, _ in batches])
    paths = [Path(path).relative_to(data).as_posix() for path, _ in dataset.samples]
    np.savez(out, features=features.numpy(), paths=paths)


if __name__ == "__main__":
    main(*sys.argv[1:])
