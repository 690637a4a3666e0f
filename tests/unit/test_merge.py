"""Order, ties, merging and the own row of neighbour lists."""

import numpy as np
import pytest

from mlpmem_jax.retrieval.merge import (
    Neighbors,
    drop_own_row,
    fit,
    merge,
    sort_neighbors,
    sortable,
    unpack,
)

BASE = 1 << 33  # Past what 32 bits hold.


def _neighbors(distance, row):
    return Neighbors(np.array(distance, np.float32), np.array(row, np.int64))


def test_packed_words_are_ordered_as_distance_then_place():
    generator = np.random.default_rng(0)
    distance = generator.choice(np.float32([0, 1e-40, 1e-3, 1, 7.5, 3e38, np.inf]), 500)
    place = generator.permutation(500) + 2**31
    packed = sortable(distance, place)
    np.testing.assert_array_equal(np.argsort(packed), np.lexsort((place, distance)))
    back = unpack(packed)
    np.testing.assert_array_equal(back[0], distance)
    np.testing.assert_array_equal(back[1], place)


def test_ties_go_to_the_smaller_row_and_nan_is_missing():
    found = sort_neighbors(
        np.float32([[1, np.nan, 0, 1, -0.0]]), np.array([[BASE + 9, 0, BASE + 5, BASE, 7]])
    )
    np.testing.assert_array_equal(found.row_QK, [[7, BASE + 5, BASE, BASE + 9, -1]])
    np.testing.assert_array_equal(found.distance_QK, np.float32([[0, 0, 1, 1, np.inf]]))


@pytest.mark.parametrize("num_shards", [1, 2, 5])
def test_shards_merge_to_what_one_shard_finds(num_shards):
    generator = np.random.default_rng(1)
    distance = generator.integers(0, 40, (20, 100)).astype(np.float32)
    row = np.arange(100) + BASE
    whole = fit(sort_neighbors(distance, np.broadcast_to(row, distance.shape)), 12)
    parts = [
        fit(sort_neighbors(distance[:, part], np.broadcast_to(row[part], (20, len(part)))), 12)
        for part in np.array_split(np.arange(100), num_shards)
    ]
    merged = merge(parts, 12)
    np.testing.assert_array_equal(merged.row_QK, whole.row_QK)
    np.testing.assert_array_equal(merged.distance_QK, whole.distance_QK)


def test_the_nearest_are_taken_before_sorting_where_rows_are_small():
    """Many ties at the cut, and missing neighbours: the same as sorting all."""
    generator = np.random.default_rng(0)
    distance = generator.integers(0, 6, (4, 50, 30)).astype(np.float32)
    distance[generator.random(distance.shape) < 0.1] = np.inf
    row = np.stack([generator.permutation(6000)[: 4 * 30] for _ in range(50)])
    row = row.reshape(50, 4, 30).transpose(1, 0, 2)
    parts = [Neighbors(d, np.where(np.isinf(d), -1, r)) for d, r in zip(distance, row, strict=True)]
    every = sort_neighbors(
        np.concatenate([p.distance_QK for p in parts], axis=1),
        np.concatenate([p.row_QK for p in parts], axis=1),
    )
    for count in (1, 30, 119, 120, 130):
        found, expected = merge(parts, count), fit(every, count)
        np.testing.assert_array_equal(found.row_QK, expected.row_QK)
        np.testing.assert_array_equal(found.distance_QK, expected.distance_QK)


def test_short_lists_are_filled_up():
    found = merge([_neighbors([[1.0]], [[4]]), _neighbors([[0.5]], [[8]])], 4)
    np.testing.assert_array_equal(found.row_QK, [[8, 4, -1, -1]])
    np.testing.assert_array_equal(found.distance_QK, np.float32([[0.5, 1, np.inf, np.inf]]))


def test_the_own_row_is_dropped_by_number_wherever_it_stands():
    found = _neighbors([[0, 0, 0, 2]] * 4, [[BASE, BASE + 1, BASE + 2, 5]] * 4)
    # First, in the middle behind equal keys, absent because equal keys crowd it out, last.
    own = np.array([BASE, BASE + 2, BASE + 3, 5])
    np.testing.assert_array_equal(
        drop_own_row(found, own).row_QK,
        [
            [BASE + 1, BASE + 2, 5],
            [BASE, BASE + 1, 5],
            [BASE, BASE + 1, BASE + 2],
            [BASE, BASE + 1, BASE + 2],
        ],
    )
