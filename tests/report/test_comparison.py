from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from transfercache.comparison.results import Seconds
from transfercache.comparison.summary import LeftOut, Summary
from transfercache.report.comparison import caption, html_table, result_line, show_seconds, terminal_table, title

from .conftest import HERE, RECORD, RUN, make_entry, make_summary


@pytest.fixture
def summary() -> Summary:
    tutorial = make_entry(
        "tutorial-finetune",
        [5],
        seconds=Seconds(204.0, 204.0, {}),
        extraction=None,
        chosen={"worker_processes": 2},
        best_on_reported={"accuracy": 1.0, "epoch": 3},
    )
    return make_summary(
        make_entry("logistic", [6], is_kept=True),
        tutorial,
        left_out=(LeftOut("scratch", 250.0, "more than --max-minutes leaves"),),
        unfinished=("finetune",),
        straddling=2,
    )


def shown(summary: Summary, *, width: int = 80) -> str:
    output = io.StringIO()
    Console(file=output, width=width, soft_wrap=True).print(terminal_table(summary))
    return output.getvalue()


def test_terminal_table__nothing_is_cut_off_in_80_columns(summary: Summary) -> None:
    lines = shown(summary).splitlines()
    assert lines[0] == "photos: 1,234 images to train on, 6 reported (val) with resnet18"
    logistic = next(line for line in lines if line.strip().startswith("logistic"))
    assert logistic.split() == ["logistic", "1.000", "0.610-1.000", "17.2", "s", "0.25", "s", "1,240", "1,234"]
    tutorial = next(line for line in lines if line.strip().startswith("tutorial-finetune "))
    assert tutorial.split() == [
        "tutorial-finetune",
        "0.833",
        "0.436-0.970",
        "3.4",
        "min",
        "3.4",
        "min",
        "1,240",
        "1,234",
    ]
    assert "…" not in shown(summary)


def test_terminal_table__range_over_the_seeds() -> None:
    text = shown(make_summary(make_entry("tutorial-finetune", [5, 6, 4]), make_entry("knn", [6])))
    assert re.search(r"tutorial-finetune +0\.833 .* 1,240 +0\.667-1\.000", text)
    assert re.search(r"knn +1\.000 .* 1,240 *$", text, flags=re.MULTILINE)
    assert "3 seeds" in text
    assert "…" not in text
    assert "seeds" not in shown(make_summary(make_entry("knn", [6])))


def test_terminal_table__names_are_no_markup() -> None:
    assert "[bold]x" in shown(make_summary(make_entry("knn ([bold]x)", [6])), width=120)


def test_terminal_table__no_color(summary: Summary, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    output = io.StringIO()
    Console(file=output, force_terminal=True, color_system="standard").print(terminal_table(summary))
    assert not re.search(r"\x1b\[[0-9;]*3[0-7]m", output.getvalue())


def test_caption__says_what_the_figures_are(summary: Summary) -> None:
    lines = list(caption(summary))
    assert lines == [
        "first run: from images; further run: with what is cached. Excluded: interpreter start, imports, downloads, "
        "reading the weights.",
        "resnet18: embeddings extracted earlier, 2026-11-01T10:00:00+00:00 on an older processor: 17.0 s for 14 "
        "images.",
        "a processor, 2 cores (AVX2); python 3.11.7, torch 2.15.0.",
        "tutorial-*: images loaded by 2 worker processes (the tutorial has 4).",
        "These 6 images alone do not tell any two of them apart (paired test, p >= 0.05, not adjusted for the number "
        "of pairs).",
        "tutorial-finetune prints 1.000 as its best (epoch 3): chosen on val itself, so not comparable.",
        "Extraction has paid for itself from experiment 1 on against tutorial-finetune.",
        "left out: scratch, about 4.2 min (more than --max-minutes leaves).",
        "not finished: finetune.",
        "2 groups or sets of equal images lie on both sides of the given split.",
        "kept from an earlier run (--fresh repeats it): logistic 2026-11-25 09:00.",
    ]


def test_caption__pairs_that_differ() -> None:
    lines = list(caption(make_summary(make_entry("a", [6]), make_entry("b", [0]), make_entry("c", [5]))))
    assert "a - b: +1.000 [+0.448, +1.000], paired p 0.031." in lines
    assert any(line.startswith("These 6 images alone do not tell 2 of 3 pairs apart") for line in lines)


def test_caption__one_strategy_is_not_paired() -> None:
    assert not any("apart" in line for line in caption(make_summary(make_entry("a", [6]))))


def test_caption__kept_on_another_machine() -> None:
    far = {"device": "a graphics card", "machine": {"cores": 16, "vector_units": "AVX-512"}}
    again = make_entry("logistic", [6], is_kept=True)
    seed_of_another = make_entry("linear", [6], environment=far)
    lines = list(caption(make_summary(again, make_entry("finetune", [6], is_kept=True, environment=far))))
    there = "2026-11-25 09:00 on another machine (a graphics card, 16 cores (AVX-512))"
    assert lines[-1] == (
        f"kept from an earlier run (--fresh repeats it): logistic 2026-11-25 09:00, finetune {there}; "
        "seconds of another machine are in no break-even."
    )
    assert f"linear {there}" in list(caption(make_summary(seed_of_another)))[-1]


def extraction_lines(**changes: Any) -> list[str]:
    entry = make_entry("knn", [6], extraction={**RECORD, **changes})
    return [line for line in caption(make_summary(entry)) if "extracted" in line or line.startswith("extraction:")]


def test_caption__extraction_on_several_machines() -> None:
    assert extraction_lines(is_from_this_run=True) == []
    same = {**RUN, "date": "2026-11-02T10:00:00+00:00"}
    assert extraction_lines(runs=[RUN, same]) == [
        "resnet18: embeddings extracted earlier, 2026-11-01T10:00:00+00:00 on an older processor: 17.0 s for 14 images."
    ]
    assert extraction_lines(runs=[RUN, {**same, **HERE, "seconds": 2.0, "images": 5}]) == [
        "resnet18: embeddings extracted in parts, 2026-11-01T10:00:00+00:00 on an older processor, 2 cores (none "
        "known): 17.0 s for 14 images; 2026-11-02T10:00:00+00:00 on a processor, 2 cores (AVX2): 2.00 s for 5 images."
    ]


def test_caption__says_of_each_extraction_what_it_is_of() -> None:
    heads = [make_entry(name, [6]) for name in ("knn", "logistic")]
    partial = make_entry("partial", [6], chosen={"cached": "layer3 256x14x14, float16, 1 views"})
    other = make_entry("knn (vit_b_16)", [6], backbone="vit_b_16")
    lines = [line for line in caption(make_summary(*heads, partial, other)) if "extracted" in line]
    assert [line.split(" extracted earlier, ")[0] for line in lines] == [
        "resnet18: activations (layer3 256x14x14, float16, 1 views)",
        "resnet18: embeddings",
        "vit_b_16: embeddings",
    ]


def test_caption__seconds_of_an_interrupted_extraction_are_not_known() -> None:
    assert extraction_lines(is_from_this_run=True, is_complete=False) == [
        "extraction: an interrupted run's seconds are not in it."
    ]


def test_html_table__everything_is_escaped() -> None:
    summary = make_summary(make_entry("<script>alert(1)</script>", [6]), data="<b>&", unfinished=("<i>",))
    html = html_table(summary)
    assert "<script>" not in html
    assert "<b>" not in html
    assert "<i>" not in html
    assert "&lt;b&gt;&amp;: 1,234 images to train on" in html
    assert "<th>95 % interval</th>" in html
    assert html.count("<tr>") == html.count("</tr>") == 2


def test_result_line__one_finished_strategy() -> None:
    assert result_line(make_entry("logistic", [5], is_kept=True)) == (
        "logistic: accuracy 0.833 [0.436, 0.970], first run 17.2 s, further run 0.25 s (kept from 2026-11-25 09:00)"
    )
    assert result_line(make_entry("logistic", [5])).endswith("further run 0.25 s")


def test_title__without_a_network() -> None:
    assert title(make_summary(backbones=())) == "photos: 1,234 images to train on, 6 reported (val)"
    assert title(make_summary(backbones=("resnet18", "vit_b_16"))).endswith("with resnet18, vit_b_16")
    assert title(make_summary(note="in place of others")).endswith("with resnet18 (in place of others)")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 ms"),
        (0.0234, "23 ms"),
        (0.31, "0.31 s"),
        (9.994, "9.99 s"),
        (9.996, "10.0 s"),
        (88.0, "88.0 s"),
        (204.0, "3.4 min"),
        (7200.0, "2.0 h"),
    ],
)
def test_show_seconds__unit_of_a_person(seconds: float, text: str) -> None:
    assert show_seconds(seconds) == text


def test_caption__network_that_has_not_learned_its_own_images() -> None:
    head = make_entry("logistic", [6])
    curve = [{"train_accuracy": 0.1}, {"train_accuracy": 0.25}]
    poor = make_entry("finetune", [2], chosen={"by_epoch": curve})
    fine = make_entry("scratch", [2], chosen={"by_epoch": [{"train_accuracy": 0.95}]})
    lines = [line for line in caption(make_summary(head, poor, fine)) if "undertrained" in line]
    assert lines == [
        "finetune is undertrained: after 2 epochs it was right on 0.250 of its own (augmented) training images; "
        "give it more --epochs before believing its accuracy."
    ]
