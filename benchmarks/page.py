"""The page of all figures, from what the benchmarks printed."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent

_INTRODUCTION = """\
# Benchmarks

Written by `benchmarks/run_all.py`; each section is what one script beside it printed. Sides that are compared take
turns within one run, and a figure is a median with its minimum and maximum in brackets over the n of its section; one
without brackets was taken once. Quote the ratios: absolute seconds of such machines move by a factor of two within
minutes.
"""

_NO_GPU = """
Figures on GPUs are open, as none was at hand: images a second on device tensors and end to end, the bottleneck, fp32
against the CPU's, bf16 and fp16, and batch sizes.
"""

_PARTIAL = "partial/epoch/fp32/partial against "

#: What is measured, what it should be, and where it stands: the benchmark and its keys.
_TARGETS = (
    ("extraction, times faster than the plain loop", ">= 1.8 (AVX2), 1.6", "extract/processes/tlc/times_faster"),
    ("the same, no converted network kept", "beside it", "extract/processes/tlc, cold/times_faster"),
    ("the same in bf16, with AMX", ">= 4", "extract/processes/tlc, bf16/times_faster"),
    ("extraction stage, share of the roofline", ">= 0.85", "extract/roofline/fp32/stage_share"),
    ("fp32 on a GPU, least cosine to the CPU's features", ">= 0.99999", "gpu/parity/fp32/least_cosine"),
    ("bf16 on a GPU, least cosine to the CPU's features", ">= 0.999", "gpu/parity/bf16/least_cosine"),
    ("logistic at l2 1e-4, times scikit-learn's speed", ">= 5", "heads/cases/made 50000x100/fit/0/times_faster"),
    ("logistic at l2 1e-6, times scikit-learn's speed", ">= 1", "heads/cases/made 50000x100/fit/1/times_faster"),
    ("on real embeddings, l2 1e-4", ">= 5", "heads/cases/real/fit/0/times_faster"),
    ("on real embeddings, l2 1e-6", ">= 1", "heads/cases/real/fit/1/times_faster"),
    ("path of 9 values, times one cold fit", "<= 2.5", "heads/cases/made 50000x100/path/times_one_fit"),
    ("the same on real embeddings", "<= 2.5", "heads/cases/real/path/times_one_fit"),
    ("9 values in 5 folds, of sklearn's time", "<= 0.25", "heads/cases/made 4000x30/choice/share_of_sklearn"),
    ("out of core, ridge, peak GiB", "< 2", "out_of_core/ridge/peak_gib"),
    ("out of core, logistic, peak GiB", "< 2", "out_of_core/logistic/peak_gib"),
    ("out of core, logistic, relative gap", "<= 1e-3", "out_of_core/logistic/relative_gap"),
    ("whole process of `train-head`, seconds", "<= 1.0", "startup/seconds/tlc train-head CACHE --solver logistic"),
    ("the same, times numpy and h5py", "<= 6", "startup/seconds/tlc train-head CACHE --solver logistic/ratio"),
    (
        "fine-tuning, bf16, resident, times faster than the tutorial's loop",
        ">= 3 (AMX)",
        "finetune/resident/bf16/times_faster",
    ),
    ("the same in fp32", ">= 1.25", "finetune/resident/fp32/times_faster"),
    ("fine-tuning, bf16, end to end, times faster", ">= 3 (AMX)", "finetune/end_to_end/bf16/times_faster"),
    ("the same in fp32", ">= 1.25", "finetune/end_to_end/fp32/times_faster"),
    ("its accuracy in bf16 less that in fp32, mean of 5 seeds", ">= -0.01", "finetune/accuracy/bf16_less_fp32"),
    ("layer4 from cached layer3, times faster an epoch than on images", ">= 1.8", _PARTIAL + "on images/times_faster"),
    ("the same, over the ratio of its arithmetic", "beside it", _PARTIAL + "on images/of_arithmetic"),
    ("against training all stages, times faster", "beside it", _PARTIAL + "full/times_faster"),
    ("the same, over the ratio of its arithmetic", "beside it", _PARTIAL + "full/of_arithmetic"),
    ("label errors, recall in the top 5 %", ">= 0.75", "label_errors/mean/recall_in_as_many"),
    ("label errors, recall in the top 10 %", ">= 0.9", "label_errors/mean/recall_in_twice_as_many"),
)

#: Of a benchmark's JSON, what is no figure, or said once for all.
_LEFT_OUT = ("environment", "runs")
_SPREAD = ("median", "min", "max")
_NOT_MEASURED = "not measured"


def render_page(names: Sequence[str], figures: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Return the page in Markdown of `figures`, by machine and benchmark: targets, machines, and a section a benchmark.

    A machine is a letter, and a column in each table where it has figures.
    """
    lettered = {chr(ord("A") + number): kept for number, kept in enumerate(figures.values())}
    introduction = _INTRODUCTION if any("gpu" in kept for kept in lettered.values()) else _INTRODUCTION + _NO_GPU
    parts = [introduction, _targets(lettered), "## Machines\n"]
    for (letter, kept), name in zip(lettered.items(), figures, strict=True):
        parts += [
            f"- {letter} ({name}): {machine}"
            for machine in dict.fromkeys(_describe(one["environment"]) for one in kept.values())
        ]
    for name in names:
        ran = {letter: dict(_rows(kept[name], ())) for letter, kept in lettered.items() if name in kept}
        where = f"Machine {' and '.join(ran)}." if ran else "Not run."
        parts.append(f"\n## {name}\n\n{_docstring(name, where)}")
        if ran:
            # A figure that one machine alone has follows those before it there.
            labels = dict.fromkeys(label for rows in ran.values() for label in rows)
            parts.append("")
            parts.append(
                _table(("figure", *ran), ([label, *(rows.get(label, "") for rows in ran.values())] for label in labels))
            )
    return "\n".join(parts) + "\n"


def _targets(lettered: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the table of all targets, with a column for each machine that measured one of them."""
    measured = {letter: [_measured(kept, keys) for _, _, keys in _TARGETS] for letter, kept in lettered.items()}
    measured = {letter: column for letter, column in measured.items() if set(column) != {_NOT_MEASURED}}
    rows = (
        [what, target, *(column[n] for column in measured.values())] for n, (what, target, _) in enumerate(_TARGETS)
    )
    return "\n".join(["## Targets", "", _table(("what", "target", *measured), rows), ""])


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def _measured(figures: Any, keys: str) -> str:
    for key in keys.split("/"):
        if isinstance(figures, Mapping) and key not in figures:
            return _NOT_MEASURED
        figures = figures[int(key) if isinstance(figures, list) else key]
    return _shown(figures)


def _docstring(name: str, where: str) -> str:
    text = ast.get_docstring(ast.parse((HERE / f"bench_{name}.py").read_text(encoding="utf-8"))) or ""
    first, _, rest = text.partition("\n")
    return f"{first} {where}\n\n```text\n{rest.strip()}\n```"


def _describe(environment: Mapping[str, Any]) -> str:
    machine, versions = environment["machine"], environment["versions"]
    listed = ", ".join(f"{package} {version}" for package, version in versions.items())
    return f"{machine['processor']}, {machine['cores']} cores, {machine['vector_units']}, {machine['system']}; {listed}"


def _rows(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Yield (its keys, the figure), in the order they were printed; series of plain numbers are left in the JSON."""
    if isinstance(value, Mapping) and not _is_spread(value):
        for key, one in value.items():
            if key not in _LEFT_OUT:
                yield from _rows(one, (*path, str(key).replace("_", " ")))
    elif isinstance(value, list):
        for one in value:
            if isinstance(one, Mapping):  # told apart by its first key
                key, label = next(iter(one.items()))
                yield from _rows({k: v for k, v in one.items() if k != key}, (*path, f"{key} {label}"))
    else:
        yield ": ".join(path), _shown(value)


def _is_spread(value: Mapping[str, Any]) -> bool:
    return all(key in value for key in _SPREAD)


def _shown(value: Any) -> str:
    if isinstance(value, Mapping):
        median, least, most = (value[key] for key in _SPREAD)
        others = "".join(f"; {key} {one:.4g}" for key, one in value.items() if key not in _SPREAD)
        return f"{median:.4g}" + (f" ({least:.4g} to {most:.4g})" if least < most else "") + others
    if isinstance(value, str):
        return value
    return "none" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
