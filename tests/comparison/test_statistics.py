from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from scipy.stats import binomtest

from transfercache.comparison.statistics import (
    PairedCounts,
    break_even,
    count_pairs,
    difference_interval,
    mcnemar_p,
)

# Both right, only a, only b, neither.
NEWCOMBE_1998 = PairedCounts(36, 12, 2, 0)  # Newcombe 1998, Stat. Med. 17, 2635-2650, table II
BENTUR_2009 = PairedCounts(1, 1, 7, 12)  # Fagerland, Lydersen and Laake 2014, Stat. Med. 33, 2850-2875
CAVO_2012 = PairedCounts(
    59, 6, 16, 80
)  # Fagerland, Lydersen and Laake 2017, Statistical Analysis of Contingency Tables


@pytest.mark.parametrize(
    ("counts", "interval", "digits"),
    [
        (NEWCOMBE_1998, (0.0569, 0.3404), 4),
        (BENTUR_2009, (-0.507, -0.026), 3),
        (CAVO_2012, (-0.1186, -0.0046), 4),
    ],
)
def test_difference_interval__published_examples(
    counts: PairedCounts, interval: tuple[float, float], digits: int
) -> None:
    assert tuple(round(limit, digits) for limit in difference_interval(counts)) == interval


def test_difference_interval__turns_with_the_pair() -> None:
    low, high = difference_interval(PairedCounts(30, 9, 4, 7))
    turned = difference_interval(PairedCounts(30, 4, 9, 7))
    np.testing.assert_allclose(turned, (-high, -low), rtol=1e-12)


@pytest.mark.parametrize(
    "counts", [PairedCounts(8, 0, 0, 0), PairedCounts(0, 0, 0, 8), PairedCounts(5, 0, 0, 3), PairedCounts(0, 8, 0, 0)]
)
def test_difference_interval__holds_the_difference_where_a_margin_is_empty(counts: PairedCounts) -> None:
    low, high = difference_interval(counts)
    assert -1 <= low <= counts.difference <= high <= 1
    assert low < high


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (6, 16), (10, 10), (3, 40), (700, 790), (0, 2000)])
def test_mcnemar_p__equals_scipys_binomial_test(only_a: int, only_b: int) -> None:
    expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar_p(PairedCounts(5, only_a, only_b, 5)) == pytest.approx(expected, rel=1e-9, abs=1e-300)


def test_count_pairs__crosses_the_rows() -> None:
    a = np.array([True, True, True, False, False, False])
    b = np.array([True, False, False, True, False, False])
    counts = count_pairs(a, b)
    assert counts == (1, 2, 1, 2)
    assert counts.n == 6
    assert counts.difference == pytest.approx(1 / 6)


def test_count_pairs__refuses_other_rows() -> None:
    with pytest.raises(ValueError, match="cannot be paired"):
        count_pairs(np.array([True]), np.array([True, False]))
    with pytest.raises(ValueError, match="cannot be paired"):
        count_pairs(np.array([], dtype=np.bool_), np.array([], dtype=np.bool_))


@pytest.mark.parametrize(
    ("once", "each", "against", "experiments"),
    [
        (17.0, 0.25, 88.0, 1),  # cheaper at once
        (100.0, 1.0, 11.0, 10),  # 100 + 10 = 110 = 10 x 11
        (100.1, 1.0, 11.0, 11),
        (0.0, 1.0, 2.0, 1),
        (17.0, 3.0, 3.0, None),
        (17.0, 4.0, 3.0, None),
    ],
)
def test_break_even__first_number_that_is_no_dearer(
    once: float, each: float, against: float, experiments: int | None
) -> None:
    assert break_even(once=once, each=each, against=against) == experiments


def test_results_and_tables__import_no_torch() -> None:
    code = (
        "import sys, transfercache.comparison.results, transfercache.comparison.statistics;"
        "import transfercache.report.comparison;"
        "print(sorted({'torch', 'sklearn', 'scipy', 'h5py'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
