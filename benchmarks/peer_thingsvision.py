"""One extraction by thingsvision, run by bench_peers.py in an environment that has it; as its documentation does it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from thingsvision import get_extractor
from thingsvision.utils.data import DataLoader, ImageDataset

BATCH_SIZE = 32


def main(photos: str, weights: str, folder: str) -> None:
    """Embed every image with the state dict of a torchvision resnet18, and write the features to `folder`."""
    extractor = get_extractor("resnet18", source="torchvision", device="cpu", pretrained=False, model_path=weights)
    dataset = ImageDataset(
        root=photos, out_path=folder, backend=extractor.get_backend(), transforms=extractor.get_transformations()
    )
    batches = DataLoader(dataset=dataset, batch_size=BATCH_SIZE, backend=extractor.get_backend())
    features = extractor.extract_features(batches=batches, module_name="avgpool", flatten_acts=True)  # [N, 512]
    paths = [Path(path).relative_to(photos).as_posix() for path in dataset.samples]
    np.savez(f"{folder}/features.npz", features=features, paths=paths)


if __name__ == "__main__":
    main(*sys.argv[1:])
