"""Sets known by name, made or downloaded once into the user's cache folder (`XDG_CACHE_HOME`)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from transfercache.environment import tlc_folder
from transfercache.fetch import download, unpack_zip, whole_folder

_HYMENOPTERA_URL = "https://download.pytorch.org/tutorial/hymenoptera_data.zip"
_HYMENOPTERA_SHA256 = "fbc41b31d544714d18dd1230b1e2b455e1557766e13e67f9f5a7a23af7c02209"
# The archive has 47,286,322 bytes and 398 files of about the same size in all; room for nothing else.
_HYMENOPTERA_MAX_BYTES = 64 << 20
_HYMENOPTERA_MAX_FILES = 500


def _hymenoptera() -> Path:
    folder = tlc_folder() / "hymenoptera"
    if not folder.is_dir():
        archive = download(
            _HYMENOPTERA_URL,
            tlc_folder() / "hymenoptera_data.zip",
            sha256=_HYMENOPTERA_SHA256,
            max_bytes=_HYMENOPTERA_MAX_BYTES,
        )
        unpack_zip(archive, folder, max_bytes=_HYMENOPTERA_MAX_BYTES, max_files=_HYMENOPTERA_MAX_FILES)
        archive.unlink(missing_ok=True)
    return folder / "hymenoptera_data"


def _digits() -> Path:
    folder = tlc_folder() / "digits"
    if not folder.is_dir():
        from sklearn.datasets import load_digits  # 1.6 s to import, and only this set needs it

        digits = load_digits()
        # Grey values 0..16 in the original; 16 x 16 = 256 is one too many.
        pixels = np.minimum(digits.images * 16, 255).astype(np.uint8)  # uint8 [1797, 8, 8]
        with whole_folder(folder) as temporary:
            for index, (image, label) in enumerate(zip(pixels, digits.target, strict=True)):
                (temporary / str(label)).mkdir(exist_ok=True)
                Image.fromarray(image).save(temporary / str(label) / f"{index:04d}.png")
    return folder


#: Each name's maker: returns the folder, a download and a short while later if it is not there yet.
NAMED: Mapping[str, Callable[[], Path]] = {"digits": _digits, "hymenoptera": _hymenoptera}


def materialise(name: str) -> Path:
    """Return the folder of the set `name` of `NAMED`, made where it is missing; it is whole or not there.

    Raises DownloadError where it has to be downloaded and cannot be, ResourceError where it cannot be written.
    """
    return NAMED[name]()


def digits_subset(n_per_class: int) -> Path:
    """Return a folder with the first `n_per_class` digits of each class, for a run that must be short."""
    folder = tlc_folder() / f"digits-{n_per_class}"
    if not folder.is_dir():
        with whole_folder(folder) as temporary:
            for class_folder in materialise("digits").iterdir():
                (temporary / class_folder.name).mkdir()
                for name in sorted(os.listdir(class_folder))[:n_per_class]:
                    shutil.copyfile(class_folder / name, temporary / class_folder.name / name)
    return folder
