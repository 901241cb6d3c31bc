"""The import table of docs/architecture.md, what stays out of the fast paths, and what the package shows."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import transfercache
from transfercache.backbones.available import is_openvino_installed
from transfercache.cli import cache_handlers, finetune_handler, handlers

PACKAGE = "transfercache"
SOURCE = Path(transfercache.__file__).parent
TOP = "__init__"

# What each room may import beside leaf files: the table of docs/architecture.md.
MAY_IMPORT = {
    "images": set(),
    "backbones": set(),
    "cache": set(),
    "extract": {"images", "backbones", "cache"},
    "heads": {"cache"},
    "finetuning": {"images", "backbones", "cache", "heads"},
    "models": {"images", "backbones", "heads"},
    "comparison": {"images", "backbones", "cache", "heads", "finetuning", "models"},
    "report": {"comparison", "heads", "cache"},
    "commands": {"images", "backbones", "cache", "extract", "heads", "finetuning", "models", "comparison", "report"},
    "cli": set(),
}
# Only inside a function: `tlc --help` loads no command, and no command loads torch before it is needed.
MAY_IMPORT_LAZILY = {"cli": {"commands"}}
# The top __init__ finds its names lazily, and imports them for type checkers alone.
MAY_IMPORT_FOR_TYPES = {TOP: {"commands", "cache"}, "cli": {"commands", "finetuning"}}

TORCH_FREE_ROOMS = ("images", "cache", "heads", "report")
TORCH_FREE_FILES = (
    "backbones/available.py",
    "backbones/canaries.py",
    "backbones/known.py",
    "backbones/openvino_engine.py",
    "commands/extract.py",
    "models/card.py",
    "models/head_file.py",
    "comparison/results.py",
    "comparison/statistics.py",
    "extract/loop.py",
)
NEEDS_TORCH = ("heads/linear.py", "images/fast.py")
TORCH = {"torch", "torchvision", "timm"}

MAX_LINES = 400

Import = tuple[str, str]  # (dotted name, "top" | "lazy" | "types")


def imports_of(code: str, *, module: str) -> list[Import]:
    """Every import of a file, relative ones made absolute; `module` is its dotted name."""
    found: list[Import] = []

    def visit(node: ast.AST, place: str) -> None:
        if isinstance(node, ast.Import):
            found.extend((alias.name, place) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parent = module.split(".")[: -node.level]
                base = ".".join([*parent, *([base] if base else [])])
            # `from package import room` names a module too.
            found.extend((f"{base}.{alias.name}", place) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child, _place_of(node, child, place))

    visit(ast.parse(code), "top")
    return found


def _place_of(parent: ast.AST, child: ast.AST, place: str) -> str:
    if isinstance(parent, ast.If) and ast.unparse(parent.test).endswith("TYPE_CHECKING") and child in parent.body:
        return "types"
    is_function = isinstance(parent, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    return "lazy" if is_function and place == "top" else place


def room_of(relative: Path) -> str | None:
    """The room of a file, None for a leaf file."""
    if relative.as_posix() == "__init__.py":
        return TOP
    return relative.parts[0] if len(relative.parts) > 1 else None


def offences(files: Mapping[Path, str]) -> list[str]:
    """What `files` (path within the package -> code) import against the table."""
    found = []
    for relative, code in files.items():
        room = room_of(relative)
        module = ".".join([PACKAGE, *relative.with_suffix("").parts])
        for name, place in imports_of(code, module=module):
            parts = name.split(".")
            other = parts[1] if parts[0] == PACKAGE and len(parts) > 1 and parts[1] in MAY_IMPORT else None
            if other is not None and other != room and other not in _allowed(room, place):
                found.append(f"{relative.as_posix()} imports {name} ({place})")
    return found


def _allowed(room: str | None, place: str) -> set[str]:
    if room is None:
        return set()
    allowed = set(MAY_IMPORT.get(room, set()))
    if place == "lazy":
        allowed |= MAY_IMPORT_LAZILY.get(room, set())
    if place == "types":
        allowed |= MAY_IMPORT_FOR_TYPES.get(room, set())
    return allowed


def importers_of(package: str, files: Mapping[Path, str], *, without_types: bool = True) -> set[str]:
    """Files that import `package` anywhere, by their path within the package."""
    return {
        relative.as_posix()
        for relative, code in files.items()
        for name, place in imports_of(code, module=f"{PACKAGE}.x")
        if name.split(".")[0] == package and not (without_types and place == "types")
    }


@pytest.fixture(scope="module")
def files() -> dict[Path, str]:
    """Path within the package -> code, of every file."""
    return {path.relative_to(SOURCE): path.read_text() for path in sorted(SOURCE.rglob("*.py"))}


def test_imports__follow_the_table(files: dict[Path, str]) -> None:
    assert offences(files) == []


def test_rooms__are_those_of_the_table(files: dict[Path, str]) -> None:
    assert {relative.parts[0] for relative in files if len(relative.parts) > 1} == set(MAY_IMPORT)


@pytest.mark.parametrize(
    ("file", "code", "offence"),
    [
        ("images/a.py", "from transfercache.cache.rows import Rows", "imports transfercache.cache.rows.Rows (top)"),
        ("heads/a.py", "from ..backbones import registry", "imports transfercache.backbones.registry (top)"),
        ("heads/a.py", "from .. import backbones", "imports transfercache.backbones (top)"),
        ("spec.py", "import transfercache.images.scan", "imports transfercache.images.scan (top)"),
        ("cache/a.py", "def f():\n  from transfercache import images", "imports transfercache.images (lazy)"),
        ("cli/a.py", "import transfercache.commands.train", "imports transfercache.commands.train (top)"),
        ("cli/a.py", "def f():\n  import transfercache.heads.fit", "imports transfercache.heads.fit (lazy)"),
        (
            "cache/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n  import transfercache.heads.fit",
            "imports transfercache.heads.fit (types)",
        ),
    ],
)
def test_imports__the_check_can_fail(file: str, code: str, offence: str) -> None:
    assert offences({Path(file): code}) == [f"{file} {offence}"]


def test_imports__the_check_allows_what_the_table_does() -> None:
    allowed = {
        "extract/a.py": "from ..cache import store\nimport transfercache.images.scan, transfercache.files",
        "cli/a.py": "def f():\n  from transfercache.commands.train import train_head",
        "images/a.py": "from transfercache.images import scan\nfrom .. import errors\nimport h5py",
    }
    assert offences({Path(name): code for name, code in allowed.items()}) == []


def test_h5py__is_imported_by_the_cache_alone(files: dict[Path, str]) -> None:
    importers = importers_of("h5py", files, without_types=False)
    assert importers
    assert {Path(name).parts[0] for name in importers} == {"cache"}


def test_torch__is_imported_by_no_torch_free_file(files: dict[Path, str]) -> None:
    importers = set.union(*(importers_of(package, files) for package in TORCH))
    torch_free = {
        relative.as_posix()
        for relative in files
        if len(relative.parts) == 1 or relative.parts[0] in TORCH_FREE_ROOMS or relative.as_posix() in TORCH_FREE_FILES
    }
    assert set(NEEDS_TORCH) | {"backbones/engines.py"} <= importers
    assert set(TORCH_FREE_FILES) <= torch_free
    assert importers & (torch_free - set(NEEDS_TORCH)) == set()


def test_packages__have_empty_init_files(files: dict[Path, str]) -> None:
    not_empty = [path.as_posix() for path, code in files.items() if path.name == "__init__.py" and code.strip()]
    assert not_empty == ["__init__.py"]


def test_files__are_of_a_readable_length(files: dict[Path, str]) -> None:
    assert [path.as_posix() for path, code in files.items() if code.count("\n") > MAX_LINES] == []


def test_public_names__resolve_and_are_sorted() -> None:
    assert transfercache.__all__ == sorted(transfercache.__all__)
    for name in transfercache.__all__:
        assert getattr(transfercache, name) is not None
    # A room of the same name would be bound over the function as soon as it is imported.
    assert set(transfercache.__all__) & {path.stem for path in SOURCE.iterdir()} == set()
    assert dir(transfercache) == transfercache.__all__
    with pytest.raises(AttributeError, match="module 'transfercache' has no attribute 'nothing'"):
        _ = transfercache.nothing


def test_public_names__are_all_that_a_fresh_import_shows() -> None:
    code = "import transfercache; print([n for n in vars(transfercache) if n[0] != '_'])"
    # Beside the lazily found names, a fresh import binds its own imports; none may look public.
    assert set(ast.literal_eval(_python(code))) <= {"annotations", "import_module", "Any", "TYPE_CHECKING", "version"}


HANDLERS = {
    name: value
    for module in (handlers, finetune_handler, cache_handlers)
    for name, value in vars(module).items()
    if inspect.isfunction(value) and value.__module__ == module.__name__ and name[0] != "_" and name != "register"
}
# What the command line alone has: how it prints, whether it asks, and what is another function in Python.
CLI_ONLY = ("json", "yes", "describe")
# Without them the command line describes what it would do.
MAY_BE_MISSING = {"finetune": "data"}
# Words that may be left out.
OPTIONAL_WORDS = ("caches",)


@pytest.mark.parametrize("name", HANDLERS)
def test_signature__is_that_of_the_command(name: str) -> None:
    api = inspect.signature(getattr(transfercache, name)).parameters
    cli = {p: v for p, v in inspect.signature(HANDLERS[name]).parameters.items() if p not in CLI_ONLY}
    callbacks = {parameter for parameter in api if parameter.startswith("on_") and parameter != "on_bad"}
    assert [parameter for parameter in api if parameter not in callbacks] == list(cli)
    # A repeatable option has a list of the one default.
    single = {p: v.default[0] if isinstance(v.default, list) else v.default for p, v in cli.items()}
    if name in MAY_BE_MISSING:
        assert single[MAY_BE_MISSING[name]] is None
        single[MAY_BE_MISSING[name]] = inspect.Parameter.empty
    assert {p: v.default for p, v in api.items() if p not in callbacks} == single
    words = [p for p, v in api.items() if v.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    assert words == [p for p, v in api.items() if v.default is inspect.Parameter.empty or p in OPTIONAL_WORDS]


def _python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout


def _modules_after(arguments: list[str]) -> set[str]:
    """The top-level modules that a `tlc` process has imported when it ends."""
    code = (
        "import sys\n"
        f"sys.argv = ['tlc', *{arguments!r}]\n"
        "from transfercache.cli.main import run\n"
        "try:\n  run()\n"
        "finally:\n  print('MODULES', *sorted({name.split('.')[0] for name in sys.modules}))"
    )
    return set(_python(code).rsplit("MODULES", 1)[1].split())


def test_help__imports_nothing_heavy() -> None:
    modules = _modules_after(["--help"])
    assert "typer" in modules
    assert modules & {*TORCH, "sklearn", "scipy", "numpy", "h5py", "PIL"} == set()


def test_imported_modules__of_a_command_that_needs_more(tmp_path: Path) -> None:
    modules = _modules_after(["train-head", str(tmp_path)])
    assert {"numpy", "h5py"} <= modules
    assert modules & {*TORCH, "sklearn", "scipy"} == set()


def test_extraction__of_a_network_that_was_seen_before__loads_no_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))  # other tests' networks are not known here
    rng = np.random.default_rng(0)
    for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3)).astype(np.uint8)).save(tmp_path / "photos" / name)
    words = ["extract-features", str(tmp_path / "photos"), "--weights", "random", "--device", "cpu"]
    first = [*words, "--cache-dir", str(tmp_path / "first")]
    assert "torch" in _modules_after(first)
    assert _modules_after(first) & {*TORCH, "sklearn", "scipy"} == set()
    assert _modules_after(["train-head", *words[1:4], "--cache-dir", str(tmp_path / "first")]) & TORCH == set()
    if is_openvino_installed():  # all rows are computed, by the network that was kept
        modules = _modules_after([*words, "--cache-dir", str(tmp_path / "second")])
        assert "openvino" in modules
        assert modules & TORCH == set()
