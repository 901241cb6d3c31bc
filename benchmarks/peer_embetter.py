"""One extraction by embetter, run by bench_peers.py in an environment that has it.

Its documented way: a pipeline that takes paths, wrapped by `cached`, which keeps each path's embedding in a folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from embetter.utils import cached
from embetter.vision import ImageLoader, TimmEncoder
from sklearn.pipeline import make_pipeline


def main(photos: str, model: str, folder: str) -> None:
    """Embed every image; `model` is a folder of timm's with config and weights, `folder` holds what is kept."""
    paths = sorted(str(path) for path in Path(photos).rglob("*.jpg"))
    encoder = TimmEncoder(f"local-dir:{model}")
    # It leaves the network in training mode, where the embedding of an image depends on those before it.
    encoder.model.eval()
    pipeline = cached(f"{folder}/kept", make_pipeline(ImageLoader(), encoder))
    pipeline.fit(paths[:1])
    features = pipeline.transform(paths)  # float32 [N, 512]
    np.savez(f"{folder}/features.npz", features=features, paths=[Path(p).relative_to(photos).as_posix() for p in paths])


if __name__ == "__main__":
    main(*sys.argv[1:])
