"""Rows that are no neighbours, and rows that are not searched for, against plain references."""

import itertools

import numpy as np
import pytest
from etils import epath

from mlpmem_jax.config.data import RetrievalConfig
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.retrieval import approximate, key_major
from mlpmem_jax.retrieval import queries as module
from mlpmem_jax.retrieval.approximate import ApproximateEngine, SearchSettings
from mlpmem_jax.retrieval.engine import ArrayKeys, SomeKeys
from mlpmem_jax.retrieval.estimates import KeyShardPlan
from mlpmem_jax.retrieval.exact import ExactEngine
from mlpmem_jax.retrieval.key_major import _waves, search_by_shards
from mlpmem_jax.retrieval.key_shards import KeyShards
from mlpmem_jax.retrieval.neighbors import SplitSearch, search_split
from mlpmem_jax.retrieval.queries import Exclusion, Queries
from mlpmem_jax.retrieval.routed import CellSettings, RoutedEngine
from mlpmem_jax.retrieval.routed_index import build_cells, unfinished_cells
from mlpmem_jax.retrieval.running_lists import RunningLists
from mlpmem_jax.retrieval.shares import Share
from mlpmem_jax.store.array_specs import ArraySpec
from mlpmem_jax.store.arrays import open_array, read_rows
from mlpmem_jax.store.contents import RUNNING
from mlpmem_jax.store.shards import ShardWriter

ROWS, WIDTH, SHARD, K = 1200, 8, 256, 20
SEPARATOR = 0
# Of one row, of few, and of more than K and all spare candidates.
SIZES = [1, 40, 7, 400, 130, 2, 300, 60, 100, 90, 70]
OFFSET = np.concatenate([[0], np.cumsum(SIZES)])


def _text():
    """Keys that are near within a document, and labels with repeated passages."""
    generator = np.random.default_rng(3)
    document = np.repeat(np.arange(len(SIZES)), SIZES)
    centre = 3 * generator.normal(size=(len(SIZES), WIDTH))
    key = (centre[document] + generator.normal(size=(ROWS, WIDTH))).astype(np.float32)
    token = generator.integers(1, 6, ROWS + 1)
    for place in (430, 600, 900, 1100):  # A passage, with states that are nearly the same.
        token[place : place + 20] = token[60:80]
        key[place : place + 20] = key[60:80] + 0.01
    token[OFFSET[:-1]] = SEPARATOR
    return key, token[1:].astype(np.int32)


def _reference(key, label, *, by_document, repeats):
    """K nearest rows of each by a loop over queries: distances and rows."""
    document = np.searchsorted(OFFSET, np.arange(ROWS), side="right") - 1
    token = np.concatenate([[SEPARATOR], label])
    found = []
    for n in range(ROWS):
        distance = np.square(key.astype(np.float64) - key[n]).sum(axis=1)
        allowed = np.arange(ROWS) != n
        if by_document:
            allowed &= document != document[n]
        if repeats and n - repeats >= OFFSET[document[n]]:
            passage = token[n - repeats + 1 : n + 2]
            passages = np.lib.stride_tricks.sliding_window_view(token, repeats + 1)
            allowed[repeats - 1 :] &= (passages != passage).any(axis=1)
        order = [m for m in np.argsort(distance, kind="stable") if allowed[m]][:K]
        found.append(order + [-1] * (K - len(order)))
    return np.array(found)


def _engine(key, at_once=None):
    keys = ArrayKeys(key)
    if at_once is None:
        return ExactEngine(keys, single_device_mesh(), 1024)

    def load(shards):
        first, stop = shards.start * SHARD, min(shards.stop * SHARD, len(key))
        part = SomeKeys(keys, first, stop - first)
        return ExactEngine(part, single_device_mesh(), 1024, first_row=first)

    plan = KeyShardPlan(-(-len(key) // SHARD), at_once, 0, None, "", "")
    return KeyShards("exact", len(key), plan, load, spans_processes=False)


def _search(engine, key, path, queries, batch=150):
    specs = {
        "row": ArraySpec((K,), np.int64, SHARD, 64),
        "distance": ArraySpec((K,), np.float32, SHARD, 64),
    }
    writer = ShardWriter(epath.Path(path), specs, len(key), refuse_non_finite=False)
    search = search_by_shards if isinstance(engine, KeyShards) else search_split
    numbers = search(
        engine,
        SplitSearch(
            keys=ArrayKeys(key),
            writer=writer,
            consume=lambda row, found: {"row": found.row_QK, "distance": found.distance_QK},
            num_neighbors=K,
            query_batch=batch,
            queries=queries,
            description="test",
        ),
    )
    stores = (open_array(epath.Path(path) / name) for name in ("row", "distance"))
    return numbers, *(read_rows(store, 0, store.shape[0]) for store in stores)


def _exclusion(label, *, by_document, repeats):
    return Exclusion(OFFSET, by_document, label if repeats else None, repeats)


RULES = [(True, 0), (False, 3), (True, 3), (False, 12)]


@pytest.mark.parametrize(("by_document", "repeats"), RULES)
@pytest.mark.parametrize("at_once", [None, 2])
def test_excluded_rows_are_no_neighbours(tmp_path, by_document, repeats, at_once):
    """With all keys in memory, and some key shards at a time."""
    key, label = _text()
    rules = {"by_document": by_document, "repeats": repeats}
    expected = _reference(key, label, **rules)
    queries = Queries(True, _exclusion(label, **rules))
    numbers, row, distance = _search(_engine(key, at_once), key, tmp_path, queries)
    np.testing.assert_array_equal(row, expected)
    np.testing.assert_array_equal(np.isinf(distance), expected < 0)
    assert numbers["queries"] == ROWS
    # The rules do something: without them, these neighbours are others.
    others = _reference(key, label, by_document=False, repeats=0)
    assert (others != expected).any(axis=1).sum() > (ROWS // 2 if by_document else 40)


def test_fewer_allowed_rows_than_neighbours(tmp_path):
    """One document holds all rows but ten: its rows have ten neighbours."""
    key, _ = _text()
    offset = np.array([0, ROWS - 10, ROWS])
    queries = Queries(True, Exclusion(offset, by_document=True))
    _, row, distance = _search(_engine(key), key, tmp_path, queries)
    np.testing.assert_array_equal(np.sort(row[0, :10]), np.arange(ROWS - 10, ROWS))
    assert (row[: ROWS - 10, 10:] == -1).all() and np.isinf(distance[: ROWS - 10, 10:]).all()
    assert (row[ROWS - 10 :] < ROWS - 10).all() and (row[ROWS - 10 :] >= 0).all()


class _Counting:
    """An engine that counts what it is asked for, and leaves out no rows itself."""

    skips_rows = False

    def __init__(self, engine):
        self._engine, self.asked = engine, []
        self.num_rows, self.spans_processes = engine.num_rows, engine.spans_processes
        self.rows, self.visiting = engine.rows, engine.visiting

    def search_later(self, query_QD, num_neighbors, skipped_Q2=None):
        assert self.skips_rows or skipped_Q2 is None
        self.asked.append((len(query_QD), num_neighbors))
        return self._engine.search_later(query_QD, num_neighbors, skipped_Q2)

    def visiting_order(self, rows):
        return self._engine.visiting_order(rows)


def test_only_queries_that_come_short_are_searched_again(monkeypatch):
    monkeypatch.setattr(module, "_LEAST_HELD", 0)
    key, _ = _text()
    engine = _Counting(_engine(key))
    rows = np.arange(48, 448)  # The document of 400 rows.
    found = Exclusion(OFFSET, by_document=True).search(engine, key[rows], rows, K)
    assert (found.row_QK >= 0).all()
    wanted = [count for _, count in engine.asked]
    assert engine.asked[0] == (400, K + 1 + K // 4) and wanted == sorted(wanted)
    # As many neighbours are held at a time as at first.
    assert all(queries * count <= 400 * wanted[0] for queries, count in engine.asked)
    # A document's rows are near to each other here: at most all of them precede the K-th.
    assert wanted[-1] < 2 * (400 + K)
    engine.asked.clear()
    Exclusion(np.arange(ROWS + 1), by_document=True).search(engine, key[rows], rows, K)
    assert engine.asked == [(400, K + 1 + K // 4)]
    # An engine that leaves the document out is asked once, for as many as are wanted.
    engine.asked.clear()
    engine.skips_rows = True
    masked = Exclusion(OFFSET, by_document=True).search(engine, key[rows], rows, K)
    assert engine.asked == [(400, K)]
    np.testing.assert_array_equal(masked.row_QK, found.row_QK)
    np.testing.assert_array_equal(masked.distance_QK, found.distance_QK)


def test_keys_of_the_own_document_alone_are_not_searched():
    """A document that fills a key shard costs nothing there."""
    key, _ = _text()
    rule = Exclusion(np.array([0, SHARD, ROWS]), by_document=True)
    part = ExactEngine(SomeKeys(ArrayKeys(key), 0, SHARD), single_device_mesh(), 1024)
    engine = _Counting(part)
    found = rule.search_in(engine, key[: SHARD + 9], np.arange(SHARD + 9), K)
    assert engine.asked[0][0] == 9 and (found.row_QK[:SHARD] == -1).all()
    assert (found.row_QK[SHARD:] >= 0).all()


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    path = epath.Path(tmp_path_factory.mktemp("cells"))
    config = RetrievalConfig(engine="routed", cells=30, num_neighbors=K)
    build_cells(path, ArrayKeys(_text()[0]), 32, config, 0, single_device_mesh())
    return unfinished_cells(path)


def _in_parts(cells, settings):
    plan = KeyShardPlan(4, 1, 0, None, "", "")

    def load(shards):
        # Room for all rows: one compiled program for all shards.
        return RoutedEngine(cells, settings, cells.shard(shards, plan.num_shards), ROWS)

    return KeyShards("routed", ROWS, plan, load, spans_processes=False)


@pytest.mark.parametrize(("by_document", "repeats"), RULES)
def test_routed_lists_are_full_and_the_same_in_parts(
    tmp_path, monkeypatch, cells, by_document, repeats
):
    """A document fills all cells that its rows visit at first: they visit more."""
    monkeypatch.setattr(key_major, "_WIDENED_BYTES", 700 * 12 * K)  # Two groups of blocks.
    key, label = _text()
    rules = {"by_document": by_document, "repeats": repeats}
    queries = Queries(True, _exclusion(label, **rules))
    engines = {
        "all cells": RoutedEngine(cells, CellSettings(30)),
        "whole": RoutedEngine(cells, CellSettings(1)),
        "parts": _in_parts(cells, CellSettings(1)),
    }
    every, whole, parts = (
        _search(engine, key, tmp_path / name, queries)[1:] for name, engine in engines.items()
    )
    np.testing.assert_array_equal(every[0], _reference(key, label, **rules))
    np.testing.assert_array_equal(parts[0], whole[0])
    np.testing.assert_array_equal(parts[1], whole[1])
    assert (whole[0] >= 0).all() and not (tmp_path / "parts" / RUNNING).exists()


def test_routed_lists_stay_short_where_nothing_is_left(cells):
    key, _ = _text()
    rule = Exclusion(np.array([0, ROWS - 10, ROWS]), by_document=True)
    rows = np.concatenate([np.arange(0, ROWS - 10, 60), np.arange(ROWS - 10, ROWS)])
    for engine in (RoutedEngine(cells, CellSettings(1)), _in_parts(cells, CellSettings(1))):
        row = rule.search(engine, key[rows], rows, K).row_QK
        np.testing.assert_array_equal(np.sort(row[0, :10]), np.arange(ROWS - 10, ROWS))
        assert (row[:-10, 10:] == -1).all() and (row[-10:] >= 0).all()


def test_scann_finds_no_excluded_row(tmp_path):
    pytest.importorskip("scann")
    key, label = _text()
    config = RetrievalConfig(num_neighbors=K, shard_rows=700)
    list(approximate.build_shards(ArrayKeys(key), epath.Path(tmp_path / "index"), config))
    engine = ApproximateEngine(epath.Path(tmp_path / "index"), SearchSettings(20, 700))
    rules = {"by_document": True, "repeats": 3}
    queries = Queries(True, _exclusion(label, **rules))
    _, row, _ = _search(engine, key, tmp_path / "found", queries)
    expected = _reference(key, label, **rules)
    # Shards of fewer than 1,024 rows are scored exactly.
    np.testing.assert_array_equal(row, expected)


def _share(share=0.4, *, by_document=True, seed=5):
    return Share(share, seed, OFFSET if by_document else None)


@pytest.mark.parametrize("by_document", [True, False])
@pytest.mark.parametrize("at_once", [None, 2])
def test_rows_without_targets_are_never_searched(tmp_path, monkeypatch, by_document, at_once):
    key, _ = _text()
    share = _share(by_document=by_document)
    held = share.holds(np.arange(ROWS))
    assert 0 < held.sum() < ROWS
    asked = []
    search = ExactEngine.search_later

    def counted(self, query_QD, num_neighbors, skipped_Q2=None):
        asked.append(query_QD)
        return search(self, query_QD, num_neighbors, skipped_Q2)

    monkeypatch.setattr(ExactEngine, "search_later", counted)
    queries = Queries(True, share=share)
    numbers, row, distance = _search(_engine(key, at_once), key, tmp_path / "share", queries)
    times = 1 if at_once is None else 3
    np.testing.assert_array_equal(
        np.concatenate(asked)[: held.sum()], key[held], err_msg="other queries"
    )
    assert sum(map(len, asked)) == times * held.sum()
    assert numbers["queries"] == held.sum()
    _, whole, _ = _search(_engine(key), key, tmp_path / "all", Queries(True))
    np.testing.assert_array_equal(row[held], whole[held])
    assert (row[~held] == -1).all() and np.isinf(distance[~held]).all()


def test_a_share_with_an_order_of_visits(tmp_path, monkeypatch):
    """As ScaNN has one: rows are searched in the engine's order, and come back in their own."""
    key, _ = _text()
    share = _share(by_document=False)
    held = share.holds(np.arange(ROWS))
    monkeypatch.setattr(
        ExactEngine,
        "visiting_order",
        lambda self, rows: np.random.default_rng(0).permutation(rows.stop - rows.start),
    )
    shards = _engine(key, 2)
    shards._order = lambda rows: np.random.default_rng(0).permutation(rows.stop - rows.start)
    for number, engine in enumerate((_engine(key), shards)):
        _, row, _ = _search(engine, key, tmp_path / str(number), Queries(True, share=share))
        _, whole, _ = _search(_engine(key), key, tmp_path / f"all-{number}", Queries(True))
        np.testing.assert_array_equal(row[held], whole[held])
        assert (row[~held] == -1).all()


class _Killed(BaseException):
    pass


def test_a_killed_search_of_a_share_continues_to_the_same_bits(tmp_path, monkeypatch):
    key, label = _text()
    queries = Queries(True, _exclusion(label, by_document=True, repeats=3), _share())
    _, *expected = _search(_engine(key, 2), key, tmp_path / "whole", queries)
    write, count = RunningLists.write, 0

    def killed(self, *arguments):
        nonlocal count
        count += 1
        if count in (2, 14):
            raise _Killed
        write(self, *arguments)

    monkeypatch.setattr(RunningLists, "write", killed)
    kills = 0
    while True:
        try:
            _, *found = _search(_engine(key, 2), key, tmp_path / "killed", queries)
            break
        except _Killed:
            kills += 1
            assert (tmp_path / "killed" / RUNNING).exists()
    assert kills == 2
    for ours, others in zip(found, expected, strict=True):
        np.testing.assert_array_equal(ours, others)


def test_waves_hold_so_many_queries():
    assert _waves({3: 10, 4: 10, 6: 5, 7: 30, 8: 1}, 25) == [[3, 4, 6], [7], [8]]
    assert _waves({0: 0, 1: 0}, 25) == [[0, 1]] and _waves({}, 25) == []


def test_shares_are_drawn_by_seed_and_number_alone():
    by_row = _share(0.3, by_document=False)
    row = np.arange(200_000)
    held = by_row.holds(row)
    assert abs(held.mean() - 0.3) < 0.005
    np.testing.assert_array_equal(by_row.holds(row[5000:6000]), held[5000:6000])
    np.testing.assert_array_equal(by_row.holds(row[::-7]), held[::-7])
    other = Share(0.3, 6).holds(row)
    assert abs((held & other).mean() - 0.09) < 0.005  # Other seeds are independent.
    more = Share(0.5, 5).holds(row)
    assert more[held].all()
    documents = _share(0.5).holds(np.arange(ROWS))
    for start, stop in itertools.pairwise(OFFSET):
        assert documents[start:stop].all() or not documents[start:stop].any()
    marked = np.arange(ROWS) % 3 == 0
    assert _share(0.5).held(marked) == (marked & documents).sum()
    assert Share(1.0, 5).holds(row).all()


def test_a_share_of_nothing_is_refused():
    scored = np.ones(ROWS, bool)
    with pytest.raises(
        ConfigError, match=r"targets.share=1e-06 draws none of 11 documents .*share_by=row"
    ):
        _share(1e-6).check(scored)
    with pytest.raises(
        ConfigError, match="draws none of 1,200 rows of the training split: raise it$"
    ):
        _share(1e-6, by_document=False).check(scored)
    _share(1e-6).check(~scored)  # There is nothing to draw from: another check says so.
