"""Each benchmark runs once, tiny; what it prints about time is not looked at."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from transfercache.backbones.choice import available_computes
from transfercache.environment import describe_environment, n_cores, processor_name

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def run(name: str, *words: str, folder: Path) -> Any:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / name), *words], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_benchmark__is_run_here() -> None:
    assert sorted(path.name for path in BENCHMARKS.glob("bench_*.py")) == [
        "bench_cache.py",
        "bench_compare.py",
        "bench_extract.py",
        "bench_finetune.py",
        "bench_gpu.py",
        "bench_heads.py",
        "bench_label_errors.py",
        "bench_lp_ft.py",
        "bench_out_of_core.py",
        "bench_partial.py",
        "bench_peers.py",
        "bench_startup.py",
        "bench_storage_dtype.py",
        "bench_views.py",
    ]


def test_bench_startup(tmp_path: Path) -> None:
    printed = run("bench_startup.py", "--repeats=1", folder=tmp_path)
    assert printed["n"] == 1
    assert set(printed["seconds"]) == {
        "python -c 'import numpy, h5py'",
        "tlc --help",
        "tlc train-head CACHE --solver logistic",
    }


def test_bench_cache(tmp_path: Path) -> None:
    printed = run("bench_cache.py", "--rows=3000", "--dim=16", "--repeats=1", "--folder=.", folder=tmp_path)
    assert (printed["rows"], printed["dim"], printed["n"]) == (3000, 16, 1)
    assert printed["write"]["share_of_raw"]["median"] > 0
    assert printed["write"]["closing_proof"]["median_s"] > 0
    assert printed["read"]["share_of_raw"]["median"] > 0
    assert printed["shuffled"]["times_in_order"]["median"] > 0


def test_bench_views(tmp_path: Path) -> None:
    _write_photos(tmp_path)
    printed = run("bench_views.py", "photos", "--weights=random", "--views=1,2", "--seeds=1", folder=tmp_path)
    assert list(printed["views"]) == ["1", "2"]
    assert "accuracy_of_the_mean_of_views" in printed["views"]["2"]["logistic"]


def test_bench_storage_dtype(tmp_path: Path) -> None:
    _write_photos(tmp_path)
    printed = run("bench_storage_dtype.py", "photos", "--weights=random", "--seeds=1", "--repeats=1", folder=tmp_path)
    assert printed["rows"] == 16
    assert 0 < printed["largest_relative_difference"] < 1e-3
    assert printed["float16"]["shard_bytes"] < printed["float32"]["shard_bytes"]


def _write_photos(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for label, level in (("dark", 60), ("light", 190)):
            folder = tmp_path / "photos" / split / label
            folder.mkdir(parents=True)
            for index in range(4):
                pixels = rng.normal(level, 20, (40, 40, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")


def test_bench_compare(tmp_path: Path) -> None:
    _write_photos(tmp_path)
    printed = run("bench_compare.py", "photos", "--weights=random", "--repeats=1", folder=tmp_path)
    assert list(printed["strategies"]) == ["tutorial-frozen", "knn", "logistic", "linear"]
    assert set(printed["strategies"]["logistic"]["again"]) == {"seconds", "times_faster"}


def test_bench_label_errors(tmp_path: Path) -> None:
    _write_photos(tmp_path)
    printed = run("bench_label_errors.py", "photos", "--weights=random", "--seeds=1", folder=tmp_path)
    assert (printed["turned"], printed["training_images"], len(printed["runs"])) == (1, 8, 1)
    assert printed["mean"] == printed["runs"][0]
    assert printed["mean"]["recall_in_as_many"] <= printed["mean"]["recall_in_twice_as_many"]


def test_bench_heads(tmp_path: Path) -> None:
    _write_photos(tmp_path)
    words = ("photos", "--cases=60x2", "--dim=8", "--repeats=1", "--real-rows=160", "--choice-rows=100")
    printed = run("bench_heads.py", *words, folder=tmp_path)
    case, real = printed["cases"]["made 60x2"], printed["cases"]["real"]
    assert [fit["l2"] for fit in case["fit"]] == [1e-4, 1e-6]
    assert set(case) == {"rows", "dim", "classes", "fit", "path", "choice", "knn"}
    assert set(case) - set(real) == {"choice"}
    assert (real["rows"], real["dim"], real["classes"]) == (160, 512, 16)


def test_bench_extract(tmp_path: Path) -> None:
    _write_photos(tmp_path)
    printed = run("bench_extract.py", "photos", "--images=3", "--repeats=0", "--seeds=1", folder=tmp_path)
    assert printed["same_work_to"] < 1e-4
    assert list(printed["processes"])[:3] == ["plain loop", "tlc", "tlc, cold"]
    assert printed["processes"]["tlc, cold"]["times_faster"]["median"] > 0
    assert printed["roofline"]["fp32"]["stage_share"]["median"] > 0
    assert printed["accuracy"]["fp32"]["reported_images"] == 8
    assert printed["accuracy"]["fp32"]["largest_error"] == 0


def test_bench_gpu__on_a_cpu(tmp_path: Path) -> None:
    _write_photos(tmp_path)
    printed = run("bench_gpu.py", "photos", "--device=cpu", "--images=3", "--batches=2", "--repeats=0", folder=tmp_path)
    assert (printed["device"], printed["cuda"]) == (processor_name(), None)
    assert not any("compile" in name for name in printed["rates"]["networks"])
    assert printed["rates"]["networks"]["fp32 eager"]["batch 2"]["share_of_product"]["median"] > 0
    assert (printed["engines"]["batch"], printed["end_to_end"]["images"]) == (2, 3)
    assert printed["end_to_end"]["tlc, fp32"]["bottleneck"] == "forward"
    assert printed["parity"]["fp32"] == {"least_cosine": 1.0, "largest_error": 0.0, "equal_labels": 16}
    assert "memory" not in printed


def test_bench_peers__none_of_them(tmp_path: Path) -> None:
    printed = run("bench_peers.py", "--images=2", "--repeats=0", "--peers=", folder=tmp_path)
    assert list(printed["processes"]) == ["tlc, cold", "tlc, warm"]
    assert printed["peers"] == {}


def test_bench_out_of_core(tmp_path: Path) -> None:
    words = ("--rows=600", "--dim=8", "--classes=3", "--folder=kept")
    printed = run("bench_out_of_core.py", *words, folder=tmp_path)
    assert (printed["rows"], printed["dim"], printed["classes"]) == (600, 8, 3)
    assert printed["ridge"]["passes"] == 1
    assert printed["logistic"]["relative_gap"] < 1e-3
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["made-resnet18-pooled-738d61b9"]
    # A cache that is there is used as it is, whatever is asked for.
    again = run("bench_out_of_core.py", "--rows=9", "--folder=kept", folder=tmp_path)
    assert (again["rows"], again["ridge"]["accuracy"]) == (600, printed["ridge"]["accuracy"])


def test_run_all__keeps_what_is_there_and_writes_the_page_with_a_column_a_machine(tmp_path: Path) -> None:
    for machine, median in (("avx2-2-cores", 0.5), ("old", 0.75)):
        kept = tmp_path / "results" / machine / "startup.json"
        kept.parent.mkdir(parents=True)
        seconds = {"tlc train-head CACHE --solver logistic": {"median": median, "min": 0.25, "max": 1.5, "ratio": 2.0}}
        kept.write_text(json.dumps({"n": 3, "seconds": seconds, "environment": describe_environment()}))
    words = ("--quick", "--results=results", "--machine=avx2-2-cores", "--only=startup,views", "--page=page.md")
    command = [sys.executable, str(BENCHMARKS / "run_all.py"), *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    page = (tmp_path / "page.md").read_text()
    shown = "0.5 (0.25 to 1.5); ratio 2 | 0.75 (0.25 to 1.5); ratio 2"
    assert f"| whole process of `train-head`, seconds | <= 1.0 | {shown} |" in page
    assert f"| seconds: tlc train-head CACHE --solver logistic | {shown} |" in page
    assert "| label errors, recall in the top 5 % | >= 0.75 | not measured | not measured |" in page
    assert f"- B (old): {processor_name()}, {n_cores()} cores" in page
    assert [line[3:] for line in page.splitlines() if line.startswith("## ")][2:] == _names()
    assert page.count("Machine A and B.") == 1
    assert page.count("Not run.") == len(_names()) - 1


def _names() -> list[str]:
    """The order of the page, which leaves no benchmark out."""
    names = [
        "extract", "gpu", "peers", "heads", "out_of_core", "startup", "label_errors", "lp_ft", "finetune", "partial",
        "compare", "cache", "storage_dtype", "views",
    ]  # fmt: skip
    assert sorted(names) == sorted(path.stem.removeprefix("bench_") for path in BENCHMARKS.glob("bench_*.py"))
    return names


def test_made_photos__crops_have_distinct_bytes_and_their_class(tmp_path: Path) -> None:
    _write_photos(tmp_path)
    code = "import sys; from pathlib import Path; from made_photos import make_photos; "
    code += "make_photos(Path('made'), 20, source=Path('photos'))"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={"PYTHONPATH": str(BENCHMARKS)})
    files = sorted((tmp_path / "made").rglob("*.jpg"))
    assert {path.parent.name for path in files} == {"dark", "light"}
    assert len({path.read_bytes() for path in files}) == 20  # of 16 photographs
    for path in files:
        with Image.open(path) as crop:
            assert all(32 <= side <= 40 for side in crop.size)


def test_bench_lp_ft(tmp_path: Path) -> None:
    words = ("--images=40", "--pixels=32", "--seeds=1")
    printed = run("bench_lp_ft.py", *words, folder=tmp_path)
    (seed,) = printed["seeds"]
    assert list(seed) == ["seed", "finetune", "lp-ft"]  # the page tells rows apart by the first
    assert seed["finetune"]["held_out_loss"] > 0
    assert seed["lp-ft"]["held_out_loss"] > 0
    assert printed["lp_ft_is_lower"] == (seed["lp-ft"]["held_out_loss"] < seed["finetune"]["held_out_loss"])


def test_bench_partial(tmp_path: Path) -> None:
    words = ("--images=4", "--repeats=0", "--compute=fp32")
    printed = run("bench_partial.py", *words, folder=tmp_path)
    assert printed["cached"] == "layer3 256x14x14, float16, 1 views"
    figures = printed["epoch"]["fp32"]
    arithmetic = {name: figures[f"partial against {name}"]["arithmetic"] for name in ("on images", "full")}
    # Of ResNet-18: forward F, and twice that back for what trains, but for the gradients of a first layer's inputs.
    assert arithmetic == pytest.approx({"on images": 2.2, "full": 4.4}, rel=0.05)
    assert figures["partial against full"]["times_faster"]["median"] > 0
    assert figures["partial"]["of_sgemm"]["median"] > 0


def test_bench_finetune(tmp_path: Path) -> None:
    _write_photos(tmp_path)
    words = ("photos", "--images=8", "--repeats=0", "--seeds=1", "--pixels=32")
    printed = run("bench_finetune.py", *words, folder=tmp_path)
    computes = [name for name in ("fp32", "bf16") if name in available_computes("cpu")]
    for part in (printed["resident"], printed["end_to_end"]):
        assert list(part) == ["tutorial", *computes]
        assert all(side["of_sgemm"]["median"] > 0 for side in part.values())
        # Forward F and twice that back, but for the gradients of the first layer's inputs.
        assert all(side["gflop_per_image"] == pytest.approx(3 * 0.074, rel=0.05) for side in part.values())
        quotient = part["tutorial"]["seconds"]["median"] / part["fp32"]["seconds"]["median"]
        assert part["fp32"]["times_faster"]["median"] == pytest.approx(quotient, rel=1e-2)
    assert printed["accuracy"]["reported_images"] == 8
    by_seed = [printed["accuracy"][compute]["by_seed"] for compute in computes]
    assert all(len(seeds) == 1 and seeds[0] * 8 == int(seeds[0] * 8) for seeds in by_seed)
