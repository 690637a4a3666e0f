"""Rows of several shards are searched in one order of the engine, and written shard by shard."""

import numpy as np
import pytest
from etils import epath

from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.retrieval import neighbors
from mlpmem_jax.retrieval.engine import ArrayKeys
from mlpmem_jax.retrieval.exact import ExactEngine
from mlpmem_jax.retrieval.neighbors import SplitSearch, search_split
from mlpmem_jax.retrieval.queries import Queries
from mlpmem_jax.retrieval.shares import Share
from mlpmem_jax.store.array_specs import ArraySpec
from mlpmem_jax.store.arrays import open_array, read_rows
from mlpmem_jax.store.shards import ShardWriter

ROWS, WIDTH, SHARD, K = 850, 6, 100, 5
SPECS = {"row": ArraySpec((K,), np.int64, SHARD, 50)}


class _InOrder(ExactEngine):
    """Asks for its rows backwards, and notes which it was asked about."""

    def __init__(self, key):
        super().__init__(ArrayKeys(key), single_device_mesh(), 256)
        self.asked = []

    def visiting_order(self, rows):
        if rows.stop > rows.start:
            self.asked.append((rows.start, rows.stop))
        return np.arange(rows.stop - rows.start)[::-1]


class _Killed(BaseException):
    pass


def _search(engine, key, path, queries, *, kill_at=None):
    writer = ShardWriter(epath.Path(path), SPECS, ROWS)
    calls = 0

    def consume(row_Q, found):
        nonlocal calls
        calls += 1
        if calls == kill_at:
            raise _Killed
        return {"row": found.row_QK}

    split = SplitSearch(
        keys=ArrayKeys(key),
        writer=writer,
        consume=consume,
        num_neighbors=K,
        query_batch=70,
        queries=queries,
        description="test",
    )
    search_split(engine, split)
    return read_rows(open_array(epath.Path(path) / "row"), 0, ROWS)


@pytest.mark.parametrize("share", [None, Share(0.5, 3)])
def test_runs_of_missing_shards_are_searched_in_one_order(tmp_path, monkeypatch, share):
    key = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
    queries = Queries(are_keys=True, share=share)
    plain = ExactEngine(ArrayKeys(key), single_device_mesh(), 256)
    expected = _search(plain, key, tmp_path / "plain", queries)
    assert share is None or 0.3 < (expected[:, 0] < 0).mean() < 0.7
    monkeypatch.setattr(neighbors, "_FOUND_BYTES", 12 * K * 350)  # Three shards and a half.
    engine = _InOrder(key)
    found = _search(engine, key, tmp_path / "whole", queries)
    np.testing.assert_array_equal(found, expected)
    assert engine.asked == [(0, 300), (300, 600), (600, 850)]
    # Shards that are there already are not searched, and end a run.
    path = epath.Path(tmp_path) / "gaps"
    writer = ShardWriter(path, SPECS, ROWS)
    for shard in (2, 6):
        rows = writer.rows_of(shard)
        writer.put(rows.start, {"row": expected[rows]})
    writer.close()
    engine = _InOrder(key)
    np.testing.assert_array_equal(_search(engine, key, path, queries), expected)
    assert engine.asked == [(0, 200), (300, 600), (700, 850)]


def test_a_killed_search_goes_on_to_the_same_lists(tmp_path, monkeypatch):
    key = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
    monkeypatch.setattr(neighbors, "_FOUND_BYTES", 12 * K * 350)
    queries = Queries(are_keys=True)
    expected = _search(_InOrder(key), key, tmp_path / "whole", queries)
    with pytest.raises(_Killed):
        _search(_InOrder(key), key, tmp_path / "killed", queries, kill_at=8)  # In the second run.
    engine = _InOrder(key)
    found = _search(engine, key, tmp_path / "killed", queries)
    np.testing.assert_array_equal(found, expected)
    # What the first run has written stays; a writer may still hold the last shards.
    assert 100 <= engine.asked[0][0] <= 300 and engine.asked[-1][1] == ROWS


@pytest.mark.parametrize("bytes_of_rows", [30, 90])
def test_a_shard_that_is_read_in_pieces_is_cut_evenly(tmp_path, monkeypatch, bytes_of_rows):
    key = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
    monkeypatch.setattr(neighbors, "_FOUND_BYTES", 12 * K * bytes_of_rows)
    engine = _InOrder(key)
    _search(engine, key, tmp_path / "pieces", Queries(are_keys=True))
    sizes = {stop - start for start, stop in engine.asked}
    assert sizes == {50}  # The batch has 70 queries at most: two pieces of a shard.
