"""`tlc cache ...`: text -> one call of commands/cache.py -> printed result; asks before anything is removed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from transfercache.cli import options
from transfercache.cli.output import call, finish_as_asked, print_document, run
from transfercache.errors import DamageError, UsageError
from transfercache.text import one_line

_HELP = "Folders, or names under --cache-dir."
Caches = Annotated[list[Path], typer.Argument(readable=False, metavar="CACHE", help=_HELP)]
AnyCaches = Annotated[
    list[Path] | None, typer.Argument(readable=False, metavar="CACHE", help=_HELP, show_default="all of them")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only say what would be freed.")]
Yes = Annotated[bool, typer.Option("--yes", help="Do not ask.")]


def list_caches(cache_dir: options.CacheDir = None, json: options.Json = False) -> int:
    """List the caches under --cache-dir: what each holds, takes, and could do without."""
    return run("list_caches", locals())


def cache_info(
    cache: Annotated[
        Path, typer.Argument(readable=False, metavar="CACHE", help="A folder, or a name under --cache-dir.")
    ],
    cache_dir: options.CacheDir = None,
    json: options.Json = False,
) -> int:
    """Describe a cache: its spec, classes, shards and bytes, and the runs that made it."""
    return run("cache_info", locals())


def verify_cache(caches: AnyCaches = None, cache_dir: options.CacheDir = None, json: options.Json = False) -> int:
    """Prove every byte of every file; each problem is a line on stderr, and the exit code is then 4."""
    words = locals()
    try:
        return run("verify_cache", words)
    except DamageError as error:
        if words["json"]:
            print_document(error.document)
        raise


def prune_caches(
    caches: AnyCaches = None,
    cache_dir: options.CacheDir = None,
    older_than: Annotated[
        float | None,
        typer.Option(
            metavar="DAYS",
            min=0.0,
            help="Remove whole caches that nothing has changed for so long.",
            show_default=False,
        ),
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    json: options.Json = False,
) -> int:
    """Free what no image needs: leftovers of crashes, features of images and views that the data no longer has.

    What an interrupted extract-features has computed is kept until the same command has ended. A cache that is being
    written is passed over. The used rows of a shard are copied before the old shard goes, which takes their space
    for that while.
    """
    return _free("prune_caches", locals())


def remove_caches(
    caches: Caches,
    cache_dir: options.CacheDir = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    json: options.Json = False,
) -> int:
    """Remove caches, torn ones too. Files that are not tlc's stay, and their folder with them."""
    return _free("remove_caches", locals())


def _free(name: str, words: dict[str, Any]) -> int:
    is_agreed = words.pop("yes")
    result = call(name, {**words, "dry_run": True})
    if not words["dry_run"]:
        if result.question and not is_agreed and not _is_agreed(result.question):
            print("tlc: nothing was removed", file=sys.stderr)
            if words["json"]:
                print_document([])
            return 0
        result = call(name, words)
    return finish_as_asked(result, words)


def _is_agreed(question: str) -> bool:
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError(f"{question} Nobody is there to answer: look with --dry-run, then pass --yes")
    # typer's own prompt ends on stdout, which is for the result alone.
    print(f"{one_line(question)} [y/N] ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def register(app: typer.Typer) -> None:
    """Add the group `cache` to `app`."""
    group = typer.Typer(help="List, describe, verify, prune and remove caches.")
    commands: dict[str, Callable[..., int]] = {
        "list": list_caches,
        "info": cache_info,
        "verify": verify_cache,
        "prune": prune_caches,
        "remove": remove_caches,
    }
    for name, handler in commands.items():
        group.command(name)(handler)
    app.add_typer(group, name="cache")
