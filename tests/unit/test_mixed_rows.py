"""Rows dealt out of many windows: which ones is a function of seed and step alone."""

import collections
import gc
import random
import threading
import time

import numpy as np
import pytest

from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.input.feed import Feed
from mlpmem_jax.input.mixing import MixedRows
from mlpmem_jax.input.windows import window_order
from mlpmem_jax.parallel.mesh import single_device_mesh

LENGTH, BATCH, MIX = 8, 4, 6


class Rows:
    """A source whose rows are their own numbers, in two arrays of different shape."""

    def __init__(self, num_windows):
        self.num_windows = num_windows
        self.reads = collections.Counter()
        self._lock = threading.Lock()

    def read(self, windows):
        with self._lock:
            self.reads.update(int(window) for window in windows)
        row = windows[:, None] * LENGTH + np.arange(LENGTH)
        return {"row": row.astype(np.int32), "pair": np.stack([row, -row], axis=-1)}


def _feed(source, steps, seed=3, mix=MIX):
    return Feed(
        source, single_device_mesh(), batch_size=BATCH, seed=seed, steps=steps, mix_windows=mix
    )


def _rows(steps, num_windows=BATCH * MIX, **options):
    return [np.asarray(batch["row"]) for batch in _feed(Rows(num_windows), steps, **options)]


def test_arrays_of_a_row_stay_together():
    for batch in _feed(Rows(24), range(9)):
        row, pair = np.asarray(batch["row"]), np.asarray(batch["pair"])
        assert row.shape == (BATCH, LENGTH) and pair.shape == (BATCH, LENGTH, 2)
        np.testing.assert_array_equal(pair, np.stack([row, -row], axis=-1))


def test_the_rows_are_those_of_the_windows_that_a_position_would_read():
    """A position's steps of one group hold the rows of its windows of those steps, each once."""
    mixed, plain = _rows(range(12)), _rows(range(12), mix=1)
    for position in range(BATCH):
        offset = position * MIX // BATCH
        for stop in range(MIX - offset, 13, MIX):
            steps = range(max(0, stop - MIX), stop)
            found = sorted(int(n) for step in steps for n in mixed[step][position])
            wanted = sorted(int(n) for step in steps for n in plain[step][position])
            assert found == wanted


def test_a_batch_holds_rows_of_many_windows():
    plain = [len(set((rows // LENGTH).ravel().tolist())) for rows in _rows(range(12), 96, mix=1)]
    mixed = [len(set((rows // LENGTH).ravel().tolist())) for rows in _rows(range(12), 96)]
    assert set(plain) == {BATCH}
    assert np.mean(mixed) > 3 * BATCH


def test_an_order_of_its_own_for_each_seed_and_epoch():
    num_windows = BATCH * MIX
    first = _rows(range(MIX), num_windows)
    assert all(
        np.array_equal(a, b) for a, b in zip(first, _rows(range(MIX), num_windows), strict=True)
    )
    other = _rows(range(MIX), num_windows, seed=4)
    again = _rows(range(MIX, 2 * MIX), num_windows)
    for changed in (other, again):
        assert not any(np.array_equal(a, b) for a, b in zip(first, changed, strict=True))


@pytest.mark.parametrize("start", [1, 5, 6, 7, 17])
def test_a_resumed_feed_continues_with_the_same_batches(start):
    whole = _rows(range(20))
    resumed = _rows(range(start, 20))
    assert len(resumed) == 20 - start
    assert all(np.array_equal(a, b) for a, b in zip(resumed, whole[start:], strict=True))


def _mixed(source, positions, stop):
    order = window_order(source.num_windows, 3)
    return MixedRows(
        source, order, np.asarray(positions), BATCH, mix_windows=MIX, seed=3, steps=range(stop)
    )


def test_steps_may_be_asked_for_in_any_order():
    whole = _rows(range(20), 50)
    mixed = _mixed(Rows(50), range(BATCH), 20)
    steps = list(range(20))
    random.Random(0).shuffle(steps)
    for step in steps:
        np.testing.assert_array_equal(mixed.read_step(step)["row"], whole[step])


@pytest.mark.parametrize("positions", [[0, 1], [2, 3], [1, 3], [2]])
def test_a_process_reads_its_own_positions_alone(positions):
    """Whatever positions a process holds, it gets the rows that one process would have there."""
    whole, source = _rows(range(15), 60), Rows(60)
    mixed = _mixed(source, positions, 15)
    for step in range(15):
        np.testing.assert_array_equal(mixed.read_step(step)["row"], whole[step][positions])
    assert sum(source.reads.values()) <= len(positions) * (15 + MIX)


def test_each_window_is_read_once_and_nothing_behind_the_last_group():
    source = Rows(1000)
    list(_feed(source, range(30)))
    assert set(source.reads.values()) == {1}
    assert 30 * BATCH <= len(source.reads) <= (30 + MIX) * BATCH


def test_two_groups_of_a_position_are_held_at_most():
    mixed = _mixed(Rows(1000), range(BATCH), 60)
    for step in range(60):
        mixed.read_step(step)
        assert len(mixed._reads) <= 2 * BATCH
    assert not mixed._reads and not mixed._left


def test_threads_end_with_the_feed():
    def readers():
        return [one for one in threading.enumerate() if one.name.startswith("mixed-rows")]

    feed = _feed(Rows(100), range(50))
    next(feed)
    assert readers()
    del feed
    deadline = time.monotonic() + 30
    while readers() and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.05)
    assert not readers()


def test_damage_reaches_the_caller():
    class Broken(Rows):
        def read(self, windows):
            raise ArtifactError("datastore/base/train/label: damaged")

    with pytest.raises(ArtifactError, match="damaged"):
        next(_feed(Broken(8), range(3)))
