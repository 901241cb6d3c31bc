"""Transfer learning with the frozen part computed once: embeddings cached, heads in seconds, fine-tuning beside.

The functions here are the commands of `tlc`, with the same names and defaults.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transfercache.version import __version__

if TYPE_CHECKING:
    from transfercache.cache.reader import open_cache
    from transfercache.commands.cache import cache_info, list_caches, prune_caches, remove_caches, verify_cache
    from transfercache.commands.compare import compare
    from transfercache.commands.demo import demo
    from transfercache.commands.describe import describe_backbone
    from transfercache.commands.doctor import doctor
    from transfercache.commands.export import export
    from transfercache.commands.extract import extract_features
    from transfercache.commands.finetune import finetune
    from transfercache.commands.predict import load, predict
    from transfercache.commands.train import train_head
    from transfercache.errors import TlcError

__all__ = [
    "TlcError",
    "__version__",
    "cache_info",
    "compare",
    "demo",
    "describe_backbone",
    "doctor",
    "export",
    "extract_features",
    "finetune",
    "list_caches",
    "load",
    "open_cache",
    "predict",
    "prune_caches",
    "remove_caches",
    "train_head",
    "verify_cache",
]

# Loaded when first used: `import transfercache` takes milliseconds, and a cached head never loads torch.
_HOMES = {
    "TlcError": "errors",
    "cache_info": "commands.cache",
    "compare": "commands.compare",
    "demo": "commands.demo",
    "describe_backbone": "commands.describe",
    "doctor": "commands.doctor",
    "export": "commands.export",
    "extract_features": "commands.extract",
    "finetune": "commands.finetune",
    "list_caches": "commands.cache",
    "load": "commands.predict",
    "open_cache": "cache.reader",
    "predict": "commands.predict",
    "prune_caches": "commands.cache",
    "remove_caches": "commands.cache",
    "train_head": "commands.train",
    "verify_cache": "commands.cache",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'transfercache' has no attribute {name!r}")
    return getattr(import_module(f"transfercache.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
