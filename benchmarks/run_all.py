"""Run every benchmark, keep what each prints, and write the page of all figures.

Run: .venv/bin/python benchmarks/run_all.py [PHOTOGRAPHS] [--weights random|PATH] [--quick] [--only NAME,...] [--again]
     [--machine NAME] [--results benchmarks/results] [--page docs/benchmarks.md]
     [--cache FOLDER] [--environments FOLDER]
Each benchmark's JSON is kept as MACHINE/NAME.json in the folder of results, the page's source, where MACHINE tells
sorts of machines apart (by default by vector units and cores: "avx2-2-cores"); one that is there is not run again
without --again. Without PHOTOGRAPHS those that measure accuracy are left out, without a GPU the one that needs it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from page import render_page

from transfercache.environment import describe_environment

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Benchmark:
    """A script, its words in full and when it has to be quick, and whether it works on photographs."""

    name: str  # bench_NAME.py
    full: tuple[str, ...]
    quick: tuple[str, ...]
    photographs: Literal["none", "taken", "needed"] = "none"
    is_for_gpu: bool = False  # left out where none is


BENCHMARKS = (
    Benchmark("extract", ("--images=1000", "--repeats=5"), ("--images=64", "--repeats=1", "--seeds=1"), "taken"),
    Benchmark("gpu", (), ("--images=500", "--repeats=1"), "taken", is_for_gpu=True),
    Benchmark("peers", ("--images=200", "--repeats=3"), ("--images=32", "--repeats=1"), "taken"),
    # Both N and C grow by steps that the others hold still.
    Benchmark(
        "heads",
        ("--cases=244x2,4000x30,12500x100,50000x10,50000x100",),
        ("--cases=244x2,1000x10", "--repeats=1", "--real-rows=300"),
        "taken",
    ),
    Benchmark("out_of_core", (), ("--rows=20000", "--classes=100")),
    Benchmark("startup", ("--repeats=7",), ("--repeats=2",)),
    Benchmark("label_errors", ("--seeds=20",), ("--seeds=2",), "needed"),
    Benchmark("lp_ft", ("--images=2000",), ("--images=100", "--pixels=32", "--seeds=1"), "taken"),
    Benchmark("finetune", ("--images=244",), ("--images=16", "--repeats=1", "--seeds=1", "--pixels=64"), "taken"),
    Benchmark("partial", ("--images=244",), ("--images=16", "--repeats=1", "--compute=fp32"), "taken"),
    Benchmark("compare", ("--repeats=3",), ("--repeats=1",), "needed"),
    Benchmark("cache", ("--repeats=7",), ("--rows=10000", "--repeats=2")),
    Benchmark("storage_dtype", (), ("--seeds=1", "--repeats=2"), "needed"),
    Benchmark("views", (), ("--views=1,2", "--seeds=1"), "needed"),
)


def words_of(benchmark: Benchmark, given: argparse.Namespace) -> list[str]:
    """Return the command of a benchmark."""
    extra = {
        "out_of_core": {"--folder": given.cache},
        "peers": {"--environments": given.environments},
    }
    words = [sys.executable, str(HERE / f"bench_{benchmark.name}.py")]
    words += benchmark.quick if given.quick else benchmark.full
    if benchmark.photographs != "none":
        words += [f"--weights={given.weights}", *([str(given.photographs)] if given.photographs else [])]
    return words + [f"{flag}={value}" for flag, value in extra.get(benchmark.name, {}).items() if value]


def can_run(benchmark: Benchmark, given: argparse.Namespace) -> bool:
    """Whether there is what it works on; the driver's own program tells of a GPU without loading torch."""
    lacks_photographs = benchmark.photographs == "needed" and given.photographs is None
    return not lacks_photographs and (not benchmark.is_for_gpu or shutil.which("nvidia-smi") is not None)


def run(benchmark: Benchmark, given: argparse.Namespace) -> None:
    """Run one and keep what it prints; ends everything where it fails, the results before it being kept."""
    words = words_of(benchmark, given)
    print(" ".join(words[1:]), file=sys.stderr)
    done = subprocess.run(words, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{benchmark.name}: exit code {done.returncode}")
    figures = without_places(json.loads(done.stdout))
    (given.results / given.machine / f"{benchmark.name}.json").write_text(json.dumps(figures, indent=1) + "\n")


def without_places(figures: Any) -> Any:
    """Return the same JSON, of each absolute path its last part: where data lies is nobody's business."""
    if isinstance(figures, dict):
        return {key: without_places(value) for key, value in figures.items()}
    if isinstance(figures, list):
        return [without_places(value) for value in figures]
    return Path(figures).name if isinstance(figures, str) and figures.startswith("/") else figures


def main(given: argparse.Namespace) -> None:
    """Run what is asked for and not there, and write the page of all that is there."""
    kept = HERE if not given.quick else HERE.parent / "build" / "benchmarks"
    given.results = given.results or kept / "results"
    given.page = given.page or (kept / "page.md" if given.quick else HERE.parent / "docs" / "benchmarks.md")
    for folder in (given.results / given.machine, given.page.parent):
        folder.mkdir(parents=True, exist_ok=True)
    names = [benchmark.name for benchmark in BENCHMARKS]
    only = names if given.only is None else [name for name in given.only.split(",") if name]
    if unknown := set(only) - set(names):
        raise SystemExit(f"--only: unknown {', '.join(sorted(unknown))}; known are {', '.join(names)}")
    for benchmark in BENCHMARKS:
        is_kept = (given.results / given.machine / f"{benchmark.name}.json").exists()
        if benchmark.name in only and can_run(benchmark, given) and (given.again or not is_kept):
            run(benchmark, given)
    figures: dict[str, dict[str, Any]] = {}
    for path in sorted(given.results.glob("*/*.json")):
        figures.setdefault(path.parent.name, {})[path.stem] = without_places(json.loads(path.read_text()))
    given.page.write_text(render_page(names, figures), encoding="utf-8")


def this_machine() -> str:
    """Return what tells its sort from others, as the name of a folder."""
    machine = describe_environment()["machine"]
    return f"{machine['vector_units']} {machine['cores']} cores".lower().replace(" ", "-")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photographs", nargs="?", type=Path)
    parser.add_argument("--weights", default="random")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--results", type=Path, help="by default benchmarks/results, with --quick build/benchmarks/results"
    )
    parser.add_argument("--machine", default=this_machine(), help="the folder of its results")
    parser.add_argument("--only", help="names, or nothing to write the page alone")
    parser.add_argument("--again", action="store_true", help="also what is in the folder of results")
    parser.add_argument("--cache", type=Path, help="a folder that keeps the cache of bench_out_of_core.py")
    parser.add_argument("--environments", type=Path, help="a folder that keeps those of bench_peers.py")
    parser.add_argument(
        "--page", type=Path, help="by default docs/benchmarks.md, with --quick build/benchmarks/page.md"
    )
    main(parser.parse_args())
