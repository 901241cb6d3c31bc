"""The decoding policies that a spec may name; `docs/images.md` says what each does to the pixels."""

from __future__ import annotations

import functools
from collections.abc import Callable

from transfercache.errors import ResourceError
from transfercache.images.decode import decode_image
from transfercache.images.transforms import Picture
from transfercache.spec import Preprocessing

#: Takes a file's bytes and the path that errors name; raises DecodeError. Threads may call it.
Decoder = Callable[[bytes, str], Picture]


def pick_decoder(preprocessing: Preprocessing) -> Decoder:
    """Return what decodes under `preprocessing.decoder`; raises ResourceError where it cannot be loaded."""
    if preprocessing.decoder == "pillow":
        return decode_image
    if preprocessing.decoder == "draft":
        return functools.partial(decode_image, least_side=preprocessing.resize)
    return load_fast()


def load_fast() -> Decoder:
    """Return TorchCodec's decoding; raises ResourceError where that cannot be loaded."""
    try:
        from transfercache.images.fast import decode_fast
    except (ImportError, OSError, RuntimeError) as error:  # the last two: its libraries are of another torch
        reason = str(error).partition("\n")[0]
        raise ResourceError(
            f"images are to be decoded by TorchCodec (--decode fast), which cannot be loaded ({reason}); "
            "install it: pip install 'transfercache[fast]'"
        ) from error
    return decode_fast
