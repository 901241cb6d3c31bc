"""What computing the frozen part once is worth: cached heads against the tutorial's loop, on the same rows, in one run.

Run: .venv/bin/python benchmarks/bench_compare.py [DATA] [--weights DEFAULT|PATH] [--repeats 3]
Prints JSON: for each cached strategy the seconds of a first run (hashing and extraction included) and of a further
one, and their ratios to `tutorial-frozen`, which runs the frozen network in every epoch; median, minimum and maximum
over the repeats, each with an empty cache. Excluded: interpreter start, imports, downloads, reading the weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile

from turns import spread

import transfercache as tc
from transfercache.environment import describe_environment

PEER = "tutorial-frozen"
CACHED = ("knn", "logistic", "linear")


def measure(data: str, *, weights: str) -> dict[str, dict[str, float]]:
    """Return {strategy: {first, again}} in seconds, from an empty cache."""
    with tempfile.TemporaryDirectory() as folder:
        compared = tc.compare(data, strategies=",".join([*CACHED, PEER]), weights=weights, cache_dir=folder)
    return {item["name"]: item["seconds"] for item in compared.to_json()["strategies"]}


def main(data: str, *, weights: str, repeats: int) -> dict[str, object]:
    """Measure and return what is printed."""
    runs = [measure(data, weights=weights) for _ in range(repeats)]
    figures: dict[str, object] = {PEER: {"first": spread([run[PEER]["first"] for run in runs])}}
    for name in CACHED:
        figures[name] = {
            kind: {
                "seconds": spread([run[name][kind] for run in runs]),
                "times_faster": spread([run[PEER]["first"] / run[name][kind] for run in runs]),
            }
            for kind in ("first", "again")
        }
    return {"data": data, "n": repeats, "strategies": figures, "environment": describe_environment()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", nargs="?", default="hymenoptera")
    parser.add_argument("--weights", default="DEFAULT")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print(json.dumps(main(arguments.data, weights=arguments.weights, repeats=arguments.repeats), indent=1))
