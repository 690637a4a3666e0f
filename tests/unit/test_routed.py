"""Search in cells: equal to the exact one where all are visited, and the same in parts."""

import numpy as np
import pytest
from etils import epath

from mlpmem_jax.config.data import RetrievalConfig
from mlpmem_jax.errors import ArtifactError, UserError
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.retrieval import estimates, recall, routed_index
from mlpmem_jax.retrieval.cells import balanced, largest_cell, num_cells, train_centroids
from mlpmem_jax.retrieval.engine import ArrayKeys
from mlpmem_jax.retrieval.estimates import first_cells_to_search, routed_plan
from mlpmem_jax.retrieval.exact import ExactEngine
from mlpmem_jax.retrieval.groups import one_group
from mlpmem_jax.retrieval.key_major import search_by_shards
from mlpmem_jax.retrieval.key_shards import KeyShards
from mlpmem_jax.retrieval.merge import drop_own_row
from mlpmem_jax.retrieval.neighbors import SplitSearch, search_split
from mlpmem_jax.retrieval.queries import Queries
from mlpmem_jax.retrieval.routed import Cells, CellSettings, RoutedEngine
from mlpmem_jax.retrieval.routed_index import build_cells, described, stored_cells, unfinished_cells
from mlpmem_jax.store.array_specs import ArraySpec
from mlpmem_jax.store.arrays import open_array, read_rows
from mlpmem_jax.store.contents import foreign_file
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.shards import ShardWriter

ROWS, WIDTH, CELLS = 3000, 16, 40
CONFIG = RetrievalConfig(engine="routed", cells=CELLS, num_neighbors=30)
ALL = CellSettings(10**6)


def _clustered(num_rows=ROWS, seed=0):
    centre = np.random.default_rng(7).normal(size=(60, WIDTH))
    generator = np.random.default_rng(seed)
    noise = generator.normal(size=(num_rows, WIDTH))
    key = (centre[generator.integers(0, 60, num_rows)] + 0.8 * noise).astype(np.float32)
    key[50 : 50 + num_rows // 20] = key[50]  # More equal rows than neighbours.
    return key


def _half_in_one_cell():
    key = _clustered()
    key[ROWS // 2 :] = key[7]
    return key


KEYS = {
    "clustered": _clustered,
    "half in one cell": _half_in_one_cell,
    "all equal": lambda: np.ones((ROWS, WIDTH), np.float32),
    "fewer values than cells": lambda: _clustered()[np.arange(ROWS) % 9],
}


def _built(path, key, config=CONFIG, monkeypatch=None):
    path = epath.Path(path)
    build_cells(path, ArrayKeys(key, "train/key"), 32, config, 0, single_device_mesh())
    return unfinished_cells(path)


def _small_runs(monkeypatch, rows=500):
    monkeypatch.setattr(estimates, "_RUN_BYTES", rows * (4 * WIDTH + 12))


def _exact(key):
    return ExactEngine(ArrayKeys(key), single_device_mesh(), 1024)


def _assert_same(found, expected):
    np.testing.assert_array_equal(found.row_QK, expected.row_QK)
    np.testing.assert_array_equal(found.distance_QK, expected.distance_QK)


@pytest.mark.parametrize("name", KEYS)
def test_all_cells_find_what_the_exact_engine_finds(tmp_path, monkeypatch, name):
    """Neighbours, distances and the order of ties; also for queries that are no keys."""
    _small_runs(monkeypatch)
    key = KEYS[name]()
    engine = RoutedEngine(_built(tmp_path, key), ALL)
    for query in (key[::7], _clustered(90, seed=3)):
        for count in (1, 31, 700):  # More than a cell has rows.
            _assert_same(engine.search(query, count), _exact(key).search(query, count))


@pytest.mark.parametrize("name", KEYS)
def test_an_index_holds_every_key_once_in_the_order_of_cells(tmp_path, monkeypatch, name):
    _small_runs(monkeypatch)
    key = KEYS[name]()
    cells = _built(tmp_path, key)
    row = cells.read_rows(0, ROWS)
    np.testing.assert_array_equal(np.sort(row), np.arange(ROWS))
    np.testing.assert_array_equal(cells.read_keys(0, ROWS), key[row])
    sizes = np.diff(cells.start_C)
    assert sizes.min() > 0 and sizes.max() <= largest_cell(ROWS, CELLS) and sizes.sum() == ROWS
    for start, stop in zip(cells.start_C[:-1], cells.start_C[1:], strict=True):
        assert (np.diff(row[start:stop]) > 0).all()
    # Every key lies in a cell whose centroid is the nearest, or as near as that.
    distance = np.square(key[:, None] - cells.centroid_CD).sum(axis=2)
    own = np.empty(ROWS, np.int64)
    own[row] = np.repeat(np.arange(len(sizes)), sizes)
    assert (distance[np.arange(ROWS), own] <= distance.min(axis=1) * (1 + 1e-4) + 1e-5).all()
    assert sorted(one.name for one in tmp_path.iterdir()) == ["cells", "key", "row", "written"]
    assert foreign_file(epath.Path(tmp_path), "index") is None


def test_recall_grows_with_the_cells_that_are_visited(tmp_path):
    key = _clustered()
    engine = RoutedEngine(_built(tmp_path, key), CellSettings(1))
    sample = recall.draw_sample(ArrayKeys(key), _exact(key).search, 1000, 30, (0, 1))
    found = []
    for count in (1, 2, 4, 8, 16, 10**6):
        engine.settings = CellSettings(count)
        found.append(recall.measure(engine, sample))
    assert found == sorted(found)
    assert found[0] < 0.9 < found[3] and found[-1] == 1.0


def test_a_query_finds_the_nearest_of_its_cells(tmp_path):
    """By the definition: the nearest centroids, all rows of these cells, no others."""
    key, query = _clustered(), _clustered(60, seed=2)
    cells = _built(tmp_path, key)
    found = RoutedEngine(cells, CellSettings(3)).search(query, 30)
    row = cells.read_rows(0, ROWS)
    for place, one in enumerate(query):
        near = np.argsort(np.square(cells.centroid_CD - one).sum(axis=1), kind="stable")[:3]
        rows = np.concatenate([row[cells.start_C[c] : cells.start_C[c + 1]] for c in near])
        order = np.lexsort((rows, np.square(key[rows] - one).sum(axis=1)))[:30]
        np.testing.assert_array_equal(np.sort(found.row_QK[place]), np.sort(rows[order]))


def test_more_neighbours_than_the_cells_to_search_hold(tmp_path):
    """Further cells are visited until there are as many rows."""
    key = _clustered()
    cells = _built(tmp_path, key)
    found = RoutedEngine(cells, CellSettings(1)).search(key[::50], 900)
    assert (found.row_QK >= 0).all() and np.isfinite(found.distance_QK).all()
    assert all(len(set(rows)) == 900 for rows in found.row_QK.tolist())
    more = RoutedEngine(cells, CellSettings(1)).search(key[:5], ROWS + 10)
    assert ((more.row_QK >= 0).sum(axis=1) == ROWS).all()
    assert (more.row_QK[:, ROWS:] == -1).all() and np.isinf(more.distance_QK[:, ROWS:]).all()


def test_no_queries_and_queries_one_at_a_time(tmp_path):
    key = _clustered()
    engine = RoutedEngine(_built(tmp_path, key), CellSettings(4))
    whole = engine.search(key[:40], 30)
    for place in range(40):
        one = engine.search_later(key[place : place + 1], 30)()
        _assert_same(one, type(whole)(whole.distance_QK[[place]], whole.row_QK[[place]]))
    assert engine.search(key[:0], 30).row_QK.shape == (0, 30)


def _search(search, engine, key, path):
    specs = {
        "row": ArraySpec((30,), np.int64, 1024, 128),
        "distance": ArraySpec((30,), np.float32, 1024, 128),
    }
    writer = ShardWriter(epath.Path(path), specs, len(key), refuse_non_finite=False)
    search(
        engine,
        SplitSearch(
            keys=ArrayKeys(key),
            writer=writer,
            consume=lambda row, found: {"row": found.row_QK, "distance": found.distance_QK},
            num_neighbors=30,
            query_batch=300,
            queries=Queries(are_keys=True),
            description="test",
        ),
    )
    stores = (open_array(epath.Path(path) / name) for name in specs)
    return [read_rows(store, 0, store.shape[0]) for store in stores]


@pytest.mark.parametrize(
    ("name", "at_once"), [("clustered", 1), ("clustered", 4), ("all equal", 2)]
)
def test_some_key_shards_at_a_time_find_what_all_in_memory_do(tmp_path, name, at_once):
    key = KEYS[name]()
    cells, settings = _built(tmp_path / "index", key), CellSettings(5)
    whole = _search(search_split, RoutedEngine(cells, settings), key, tmp_path / "whole")
    config = RetrievalConfig(engine="routed", cells=CELLS, shard_rows=300)
    shard = routed_plan(ROWS, WIDTH, config, None)
    assert (shard.num_shards, shard.num_loads) == (10, 1)
    memory = at_once * routed_plan(ROWS, WIDTH, config, 2).held_bytes
    plan = routed_plan(ROWS, WIDTH, config.model_copy(update={"memory_bytes": memory}), None)
    assert plan.at_once == at_once and plan.held_bytes <= memory
    plan.check()
    held = []

    def load(shards):
        held.append(cells.shard(shards, plan.num_shards))
        engine = RoutedEngine(cells, settings, held[-1], at_once * 400)
        assert estimates.exact_bytes(engine.num_rows, WIDTH, 1) < plan.held_bytes
        return engine

    engine = KeyShards("routed", ROWS, plan, load, spans_processes=False)
    parts = _search(search_by_shards, engine, key, tmp_path / "parts")
    for found, expected in zip(parts, whole, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert [cell for some in held for cell in some] == list(range(len(cells.centroid_CD)))
    query = key[::11]
    _assert_same(engine.search(query, 30), RoutedEngine(cells, settings).search(query, 30))


class _Killed(BaseException):
    pass


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (routed_index.index_files, "write_whole"),
        (ShardWriter, "put"),
        (ShardWriter, "flush"),
        (routed_index, "_remove_intermediate"),
    ],
)
def test_a_build_stopped_anywhere_goes_on_to_the_same_bits(tmp_path, monkeypatch, owner, name):
    _small_runs(monkeypatch)
    key = _clustered()
    whole = _built(tmp_path / "whole", key)
    original, count, kills = getattr(owner, name), 0, 0

    def killed(*arguments):
        nonlocal count
        count += 1
        if count in (1, 4, 12):
            raise _Killed
        return original(*arguments)

    monkeypatch.setattr(owner, name, killed)
    while True:
        try:
            stopped = _built(tmp_path / "stopped", key)
            break
        except _Killed:
            kills += 1
            assert foreign_file(epath.Path(tmp_path / "stopped"), "index") is None
    assert kills >= 1
    for one, other in (
        (stopped.centroid_CD, whole.centroid_CD),
        (stopped.start_C, whole.start_C),
        (stopped.read_rows(0, ROWS), whole.read_rows(0, ROWS)),
        (stopped.read_keys(0, ROWS), whole.read_keys(0, ROWS)),
    ):
        np.testing.assert_array_equal(one, other)
    assert not (tmp_path / "stopped" / "runs").exists()


def test_a_run_or_two_make_the_same_cells(tmp_path, monkeypatch):
    key = _clustered()
    whole = _built(tmp_path / "one", key)
    _small_runs(monkeypatch, 700)
    parts = _built(tmp_path / "five", key)
    np.testing.assert_array_equal(parts.read_rows(0, ROWS), whole.read_rows(0, ROWS))


def test_a_damaged_run_or_list_of_cells_is_named(tmp_path, monkeypatch):
    _small_runs(monkeypatch)
    with monkeypatch.context() as patch, pytest.raises(_Killed):
        patch.setattr(routed_index, "_write_cells", lambda *_: (_ for _ in ()).throw(_Killed))
        _built(tmp_path, _clustered())
    shard = tmp_path / "runs" / "cell" / "c" / "2"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ArtifactError, match="runs/cell"):
        _built(tmp_path, _clustered())
    shard.unlink()
    shard.with_name("2").write_bytes(b"")
    with pytest.raises(ArtifactError, match="runs/cell"):
        _built(tmp_path, _clustered())


def test_no_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    def no_space(path, needed, what):
        assert needed >= 2 * ROWS * (4 * WIDTH + 8)
        raise UserError(f"{what} needs {needed}")

    monkeypatch.setattr(routed_index, "check_free_space", no_space)
    with pytest.raises(UserError, match="the index, with its runs"):
        _built(tmp_path, _clustered())
    assert not (tmp_path / "runs").exists()


def test_keys_that_are_not_finite_are_named(tmp_path):
    key = _clustered()
    key[1234, 3] = np.inf
    with pytest.raises(ArtifactError, match="train/key: row 1234 is not finite"):
        _built(tmp_path, key)


def test_how_many_cells_there_are_and_how_many_are_visited():
    config = RetrievalConfig(num_neighbors=128)
    assert [num_cells(config, n, 64) for n in (100, 125_000, 2_000_000, 8_000_000)] == [
        1, 488, 7812, 31_250,
    ]  # fmt: skip
    assert num_cells(config, 10**9, 1024) == 1 << 18  # A gigabyte of centroids.
    assert num_cells(RetrievalConfig(num_neighbors=1024), 125_000, 64) == 121
    assert num_cells(config.model_copy(update={"cells": 70}), 50, 64) == 50
    assert first_cells_to_search(config, 125_000, 488) == 4
    assert first_cells_to_search(RetrievalConfig(num_neighbors=1024), 125_000, 488) == 9
    assert first_cells_to_search(RetrievalConfig(cells_to_search=30), 125_000, 20) == 20


def test_large_cells_are_split_and_empty_ones_dropped():
    centroid, start = balanced(np.array([3, 0, 10, 4, 0]), 4)
    np.testing.assert_array_equal(centroid, [0, 2, 2, 2, 3])
    np.testing.assert_array_equal(start, [0, 3, 6, 9, 13, 17])


def test_centroids_are_means_of_what_is_nearest_and_none_is_idle():
    """A sample of few values and of many: empty cells move to where the error is."""
    generator = np.random.default_rng(0)
    spread = generator.normal(size=(400, WIDTH)).astype(np.float32) + 5
    crowd = np.tile(np.float32(np.arange(WIDTH)), (1600, 1))
    sample = generator.permutation(np.concatenate([spread, crowd]))
    found = train_centroids(sample, 30, single_device_mesh())
    distance = np.square(sample[:, None] - found).sum(axis=2)
    assert len(set(distance.argmin(axis=1).tolist())) == 30
    first = np.square(sample[:, None] - sample[:30]).sum(axis=2)
    assert distance.min(axis=1).sum() < 0.8 * first.min(axis=1).sum()


def test_a_cell_without_a_row_of_its_own_is_no_cell(tmp_path):
    cells = Cells(
        one_group(np.zeros((2, 3), np.float32)),
        np.array([0, 2, 4]),
        lambda start, stop: np.zeros((stop - start, 3), np.float32),
        lambda start, stop: np.arange(start, stop),
    )
    engine = RoutedEngine(cells, CellSettings(1))
    own = np.arange(4)
    found = drop_own_row(engine.search(np.zeros((4, 3), np.float32), 3), own)
    # Both cells are as near; the first has two rows, so the second is visited too.
    np.testing.assert_array_equal(found.row_QK, [[1, 2], [0, 2], [0, 1], [0, 1]])


def test_a_damaged_index_is_named(tmp_path):
    artifact = Artifact(epath.Path(tmp_path), "index/cells", "index")
    artifact.begin({})
    about = ArrayKeys(_clustered()), 32, CONFIG, 0, single_device_mesh()
    arrays = build_cells(artifact.path, *about)
    artifact.finish(arrays=arrays, files=described(artifact.path))
    for name in ("key/c/0/0", "row/c/0", "cells/centroid.npy"):
        file = artifact.path / name
        whole = file.read_bytes()
        data = bytearray(whole)
        data[len(data) // 2] ^= 1
        for damaged in (bytes(data), whole[: len(whole) // 2]):
            file.write_bytes(damaged)
            with pytest.raises(ArtifactError, match=name.split("/")[0]):
                RoutedEngine(stored_cells(artifact), ALL)
        file.write_bytes(whole)
    found = RoutedEngine(stored_cells(artifact), ALL).search(_clustered()[:50], 30)
    _assert_same(found, _exact(_clustered()).search(_clustered()[:50], 30))
