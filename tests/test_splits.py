from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transfercache.splits import (
    ALWAYS_TRAIN,
    Split,
    assign_folds,
    count_straddling,
    divide_roles,
    hash_split,
    join_groups,
    majority_labels,
)


def content_of(*numbers: int) -> np.ndarray:
    """Digests, one a number: equal numbers are equal bytes, and 0 is unknown."""
    digests = np.zeros((len(numbers), 32), dtype=np.uint8)
    for row, number in enumerate(numbers):
        if number:
            digests[row] = np.frombuffer(np.random.default_rng(number).bytes(32), dtype=np.uint8)
    return digests


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_join_groups__chains_groups_and_equal_bytes() -> None:
    # Row 1 shares a group with row 3, row 3 its bytes with row 4, row 4 its group with row 5.
    group = ints(-1, 7, -1, 7, 2, 2, -1)
    joined = join_groups(group, content_of(1, 2, 3, 4, 4, 5, 1))
    np.testing.assert_array_equal(joined, [0, 1, 2, 1, 1, 1, 0])


def test_join_groups__unknown_content_equals_nothing() -> None:
    np.testing.assert_array_equal(join_groups(ints(-1, -1, -1), content_of(0, 0, 3)), [0, 1, 2])


def test_join_groups__no_rows() -> None:
    assert join_groups(ints(), content_of()).shape == (0,)


@given(st.lists(st.tuples(st.integers(-1, 6), st.integers(0, 6)), max_size=25))
@settings(deadline=None, max_examples=60)
def test_join_groups__equals_a_union_find(rows: list[tuple[int, int]]) -> None:
    expected = list(range(len(rows)))
    for _ in rows:
        for a, (group_a, bytes_a) in enumerate(rows):
            for b, (group_b, bytes_b) in enumerate(rows):
                if (group_a >= 0 and group_a == group_b) or (bytes_a and bytes_a == bytes_b):
                    expected[a] = expected[b] = min(expected[a], expected[b])
    joined = join_groups(ints(*(row[0] for row in rows)), content_of(*(row[1] for row in rows)))
    assert joined.tolist() == expected


def test_majority_labels__ties_go_to_the_smallest_and_unlabelled_rows_follow() -> None:
    labels = ints(2, 1, 1, -1, 2, 0, -1)
    component = ints(0, 0, 0, 0, 4, 4, 6)
    np.testing.assert_array_equal(majority_labels(labels, component), [1, 1, 1, 1, 0, 0, -1])


def split_of(numbers: list[int], *, groups: list[int] | None = None, labels: list[int] | None = None) -> np.ndarray:
    content = content_of(*numbers)
    component = join_groups(ints(*(groups or [-1] * len(numbers))), content)
    return hash_split(ints(*(labels or [0] * len(numbers))), component, content, val_fraction=0.2, seed=0)


def test_hash_split__takes_the_fraction_of_each_class_and_leaves_unlabelled_rows() -> None:
    split = split_of(list(range(1, 36)), labels=[0] * 20 + [1] * 10 + [-1] * 5)
    assert [int(np.sum(split[:20] == Split.VAL)), int(np.sum(split[20:30] == Split.VAL))] == [4, 2]
    assert set(split[30:].tolist()) == {Split.NONE}
    assert np.sum(split == Split.TRAIN) == 24


def test_hash_split__does_not_depend_on_order_and_changes_with_the_seed() -> None:
    numbers = list(range(1, 41))
    forward, backward = split_of(numbers), split_of(numbers[::-1])
    np.testing.assert_array_equal(forward, backward[::-1])
    content = content_of(*numbers)
    other = hash_split(ints(*[0] * 40), np.arange(40), content, val_fraction=0.2, seed=1)
    assert not np.array_equal(forward, other)


@given(
    st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(61, 10**6), st.sampled_from([0.1, 0.2, 0.5, 0.9])
)
@settings(deadline=None, max_examples=150)
def test_hash_split__adding_a_file_moves_at_most_one_other(numbers: list[int], new: int, fraction: float) -> None:
    # Equal numbers are copies of one file: they count as one.
    def val_files(files: list[int]) -> set[int]:
        content = content_of(*files)
        component = join_groups(ints(*[-1] * len(files)), content)
        labels = ints(*[0] * len(files))
        split = hash_split(labels, component, content, val_fraction=fraction, seed=0)
        assert count_straddling(split, labels, component) == 0
        return {file for file, code in zip(files, split.tolist(), strict=True) if code == Split.VAL}

    moved = val_files(numbers) ^ val_files([*numbers, new])
    most_copies = max(map(numbers.count, numbers))
    target = max(1, int(fraction * len(numbers) + 0.5))
    if most_copies <= 2 * target:  # otherwise a set of copies may come to count as small enough to move
        assert len(moved - {new}) <= 1


@given(st.lists(st.integers(0, 8), min_size=1, max_size=40), st.integers(0, 40))
@settings(deadline=None, max_examples=150)
def test_hash_split__groups_never_straddle_and_a_new_single_moves_one_group(groups: list[int], place: int) -> None:
    numbers = list(range(1, len(groups) + 1))
    before = split_of(numbers, groups=groups)
    labels = ints(*[0] * len(groups))
    assert count_straddling(before, labels, join_groups(ints(*groups), content_of(*numbers))) == 0
    place = min(place, len(groups))
    after = np.delete(
        split_of([*numbers[:place], 999, *numbers[place:]], groups=[*groups[:place], 99, *groups[place:]]), place
    )
    sizes = {group: groups.count(group) for group in groups}
    target = max(1, int(0.2 * len(groups) + 0.5))
    if max(sizes.values()) <= 2 * target:  # otherwise a group may come to count as small enough to move
        assert len({group for group, a, b in zip(groups, before, after, strict=True) if a != b}) <= 1


def test_hash_split__a_group_that_is_most_of_a_class_stays_in_train() -> None:
    split = split_of(list(range(1, 21)), groups=[5] * 16 + [-1] * 4)
    assert set(split[:16].tolist()) == {Split.TRAIN}
    assert set(split[16:].tolist()) == {Split.VAL}  # 0.2 x 20 rows


def test_hash_split__two_large_groups_still_give_a_val() -> None:
    split = split_of(list(range(1, 21)), groups=[1] * 11 + [2] * 9)
    assert [set(split[:11].tolist()), set(split[11:].tolist())] == [{Split.TRAIN}, {Split.VAL}]


def test_hash_split__a_single_component_and_a_fraction_of_zero_stay_in_train() -> None:
    assert split_of([1]).tolist() == [Split.TRAIN]
    assert split_of([1, 1, 1]).tolist() == [Split.TRAIN] * 3
    content = content_of(1, 2, 3)
    assert set(hash_split(ints(0, 0, 0), np.arange(3), content, val_fraction=0.0, seed=0).tolist()) == {Split.TRAIN}


def test_hash_split__a_mixed_group_moves_as_a_whole_with_its_majority() -> None:
    labels = [0, 0, 1, -1] + [1] * 6
    split = split_of(list(range(1, 11)), groups=[3, 3, 3, 3] + [-1] * 6, labels=labels)
    assert set(split[:3].tolist()) == {Split.TRAIN}  # the only component of class 0
    assert split[3] == Split.NONE


def test_count_straddling__counts_components_and_ignores_unassigned_rows() -> None:
    split = np.array([1, 2, 1, 1, 0, 3, 3], dtype=np.uint8)
    component = ints(0, 0, 2, 3, 3, 5, 2)
    assert count_straddling(split, np.zeros(7, dtype=np.int64), component) == 2
    assert count_straddling(split, ints(0, -1, 0, 0, 0, 0, 0), component) == 1  # an unlabelled copy flatters nobody
    assert count_straddling(np.array([], dtype=np.uint8), ints(), ints()) == 0


def test_assign_folds__stratifies_and_never_divides_a_component() -> None:
    labels = ints(*[0] * 30 + [1] * 10)
    component = ints(*[row // 2 * 2 for row in range(30)], *range(30, 40))
    folds, n_folds = assign_folds(labels, component, n_folds=5, seed=0)
    assert n_folds == 5
    np.testing.assert_array_equal(np.bincount(folds[:30]), [6] * 5)
    np.testing.assert_array_equal(np.bincount(folds[30:]), [2] * 5)
    np.testing.assert_array_equal(folds[:30:2], folds[1:30:2])
    again, _ = assign_folds(labels, component, n_folds=5, seed=0)
    other, _ = assign_folds(labels, component, n_folds=5, seed=1)
    np.testing.assert_array_equal(folds, again)
    assert not np.array_equal(folds, other)


def test_assign_folds__a_rare_class_is_held_out_as_often_as_it_can_be() -> None:
    labels = ints(*[0] * 10, 1, 1, 1, 2)
    folds, n_folds = assign_folds(labels, np.arange(14), n_folds=5, seed=0)
    assert n_folds == 5
    assert len(set(folds[10:13].tolist())) == 3
    assert ALWAYS_TRAIN not in folds[10:13]
    assert folds[13] == ALWAYS_TRAIN


def test_assign_folds__folds_shrink_to_the_largest_class() -> None:
    folds, n_folds = assign_folds(ints(0, 0, 0, 1, 1), np.arange(5), n_folds=5, seed=0)
    assert n_folds == 3
    assert set(folds.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("labels", [ints(), ints(0), ints(0, 1), ints(-1, -1)])
def test_assign_folds__nothing_can_be_held_out(labels: np.ndarray) -> None:
    folds, n_folds = assign_folds(labels, np.arange(len(labels)), n_folds=5, seed=0)
    assert n_folds == 0
    assert folds.tolist() == [ALWAYS_TRAIN] * len(labels)


def test_assign_folds__a_class_within_one_mixed_component_is_always_trained_on() -> None:
    # Class 1 is two rows inside a component whose majority is class 0.
    labels = ints(0, 0, 0, 1, 1, *[0] * 8)
    component = ints(0, 0, 0, 0, 0, *range(5, 13))
    for seed in range(10):
        folds, _ = assign_folds(labels, component, n_folds=5, seed=seed)
        assert set(folds[:5].tolist()) == {ALWAYS_TRAIN}
        assert ALWAYS_TRAIN not in folds[5:]


@pytest.mark.parametrize(
    ("labels", "train", "reported", "split"),
    [
        ((0, 0, 0, 1, 1), [0, 3], [2], Split.TEST),
        ((0, 0, -1, 1, 1), [0, 3], [1], Split.VAL),
        ((0, -1, -1, -1, 1), [0], [], None),
    ],
)
def test_divide_roles__test_is_reported_before_val_where_it_has_labels(
    labels: tuple[int, ...], train: list[int], reported: list[int], split: Split | None
) -> None:
    roles = divide_roles(np.array([1, 2, 3, 1, 0], dtype=np.uint8), ints(*labels))
    assert np.flatnonzero(roles.is_train).tolist() == train
    assert np.flatnonzero(roles.is_reported).tolist() == reported
    assert roles.reported is split
