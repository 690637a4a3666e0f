"""Data order: a function of seed and step alone."""

import jax
import numpy as np
import pytest

from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.input.feed import Feed, local_positions, to_devices
from mlpmem_jax.input.rows import compare_labels, window_starts
from mlpmem_jax.input.windows import window_order
from mlpmem_jax.parallel.mesh import single_device_mesh


class Numbers:
    """A source whose windows are their own numbers."""

    def __init__(self, num_windows):
        self.num_windows = num_windows

    def read(self, windows):
        return {"window": np.stack([windows, -windows], axis=1).astype(np.int32)}


def _batches(steps, seed=3, num_windows=10, batch_size=4, **options):
    feed = Feed(
        Numbers(num_windows),
        single_device_mesh(),
        batch_size=batch_size,
        seed=seed,
        steps=steps,
        **options,
    )
    return [np.asarray(batch["window"])[:, 0].tolist() for batch in feed]


def test_each_epoch_is_a_permutation_of_its_own():
    records = [n for batch in _batches(range(10)) for n in batch]
    epochs = [records[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_resumed_feed_continues_with_the_same_batches():
    whole = _batches(range(12))
    for start in (1, 5, 11):
        assert _batches(range(start, 12)) == whole[start:]


def test_the_seed_decides_the_order():
    assert _batches(range(5)) == _batches(range(5))
    assert _batches(range(5)) != _batches(range(5), seed=4)


def test_unshuffled_batches_come_in_order():
    assert _batches(range(3), shuffled=False) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]


def test_order_reaches_beyond_int32():
    order = window_order(2**33, seed=0)
    windows = order(np.array([0, 2**32, 2**33 - 1], np.int64))
    assert windows.dtype == np.int64 and len(set(windows.tolist())) == 3
    assert windows.min() >= 0 and windows.max() < 2**33


def test_one_process_holds_the_whole_batch():
    mesh = single_device_mesh()
    positions = local_positions(mesh, 8)
    np.testing.assert_array_equal(positions, np.arange(8))
    batch = to_devices({"x": np.arange(16.0).reshape(8, 2)}, mesh, positions, 8)
    assert isinstance(batch["x"], jax.Array)
    np.testing.assert_array_equal(batch["x"], np.arange(16.0).reshape(8, 2))


def test_an_error_of_the_source_reaches_the_caller():
    class Broken(Numbers):
        def read(self, windows):
            raise ArtifactError("datastore/base/train/label: damaged")

    feed = Feed(Broken(4), single_device_mesh(), batch_size=2, seed=0, steps=range(2))
    with pytest.raises(ArtifactError, match="damaged"):
        next(feed)


def test_the_last_window_shifts_left_and_a_short_split_starts_at_zero():
    windows = np.arange(4, dtype=np.int64)
    np.testing.assert_array_equal(window_starts(windows, 8, 27), [0, 8, 16, 19])
    np.testing.assert_array_equal(window_starts(windows[:1], 8, 5), [0])


def test_row_arithmetic_past_int32():
    base = 2**33
    starts = window_starts(np.array([base // 8, base // 8 + 1], np.int64), 8, base + 12)
    np.testing.assert_array_equal(starts, [base, base + 4])


def test_labels_of_both_sides_are_compared():
    stored = np.array([[1, 2, 3], [4, 5, 6]])
    compare_labels(stored, stored.copy(), np.array([100, 200]), "a and b")
    other = stored.copy()
    other[1, 2] = 7
    with pytest.raises(ArtifactError, match=r"a and b: labels differ at row 202 \(6 and 7\)"):
        compare_labels(stored, other, np.array([100, 200]), "a and b")
