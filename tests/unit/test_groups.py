"""Centroids with groups above them: close to a comparison with all, and the same search on top."""

import numpy as np
import pytest
from etils import epath

from mlpmem_jax.config.data import RetrievalConfig
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.retrieval import estimates, groups, recall
from mlpmem_jax.retrieval.engine import ArrayKeys
from mlpmem_jax.retrieval.exact import ExactEngine
from mlpmem_jax.retrieval.routed import CellSettings, RoutedEngine
from mlpmem_jax.retrieval.routed_index import build_cells, unfinished_cells
from mlpmem_jax.store.shards import ShardWriter

ROWS, WIDTH, CELLS = 12_000, 12, 400
CONFIG = RetrievalConfig(engine="routed", cells=CELLS, num_neighbors=20)


@pytest.fixture(autouse=True)
def _few_around(monkeypatch):
    monkeypatch.setattr(groups, "_AROUND", 128)
    monkeypatch.setattr(groups, "_AROUND_TO_ASSIGN", 32)


def _keys(num_rows=ROWS, seed=0):
    generator = np.random.default_rng(seed)
    centre = np.random.default_rng(1).normal(size=(90, WIDTH))
    noise = generator.normal(size=(num_rows, WIDTH))
    return (centre[generator.integers(0, 90, num_rows)] + 0.6 * noise).astype(np.float32)


def _nearest(query, centroid, count):
    distance = np.square(query[:, None] - centroid).sum(axis=2)
    return np.argsort(distance, axis=1, kind="stable")[:, :count]


def test_centroids_are_as_good_as_those_without_groups():
    """About as many, hardly any idle, and keys are hardly farther from theirs."""
    key, mesh = _keys(), single_device_mesh()
    found = groups.train(key, CELLS, mesh)
    assert len(found.group_GD) == groups.num_groups(CELLS) == 80
    assert 0.8 * CELLS < len(found.centroid_CD) < 1.2 * CELLS
    assert len(set(_nearest(key, found.centroid_CD, 1)[:, 0])) > 0.98 * len(found.centroid_CD)
    flat = groups.train_centroids(key, len(found.centroid_CD), mesh)
    errors = [
        np.square(key - one[_nearest(key, one, 1)[:, 0]]).sum() for one in (found.centroid_CD, flat)
    ]
    assert errors[0] < 1.1 * errors[1]


def test_keys_are_given_the_nearest_centroid_with_few_exceptions():
    key, mesh = _keys(), single_device_mesh()
    centroids = groups.train(key, CELLS, mesh)
    given = groups.assigner(centroids, mesh)(key)
    nearest = _nearest(key, centroids.centroid_CD, 1)[:, 0]
    assert 0.9 < (given == nearest).mean() < 1
    off = np.flatnonzero(given != nearest)
    distance = np.square(key - centroids.centroid_CD[given]).sum(axis=1)
    best = np.square(key - centroids.centroid_CD[nearest]).sum(axis=1)
    assert np.median(np.sqrt(distance[off] / best[off])) < 1.15


@pytest.mark.parametrize("count", [1, 8, 32])
def test_the_nearest_centroids_are_found_with_few_exceptions(count):
    centroids = groups.train(_keys(), CELLS, single_device_mesh())
    query = _keys(500, seed=3)
    found = centroids.nearest(query, count)
    expected = _nearest(query, centroids.centroid_CD, count)
    shared = [len(set(one) & set(other)) for one, other in zip(found, expected, strict=True)]
    assert np.mean(shared) > 0.93 * count
    assert all(len(set(one)) == count for one in found.tolist())
    # In order, and a query's answer does not depend on the others.
    distance = np.square(query[:, None] - centroids.centroid_CD[found]).sum(axis=2)
    assert (np.diff(distance, axis=1) >= -1e-5).all()
    alone = [centroids.nearest(query[place : place + 1], count)[0] for place in range(500)]
    np.testing.assert_array_equal(np.stack(alone), found)


def test_more_than_a_quarter_of_those_around_a_group_are_found_among_all():
    centroids = groups.train(_keys(), CELLS, single_device_mesh())
    query = _keys(50, seed=3)
    cells = len(centroids.centroid_CD)
    for count in (33, cells):
        expected = _nearest(query, centroids.centroid_CD, count)
        np.testing.assert_array_equal(centroids.nearest(query, count), expected)


@pytest.mark.parametrize(
    "key",
    [np.ones((ROWS, WIDTH), np.float32), _keys()[np.arange(ROWS) % 9]],
    ids=["all equal", "nine values"],
)
def test_few_values_make_few_groups_and_all_rows_are_found(tmp_path, key):
    build_cells(epath.Path(tmp_path), ArrayKeys(key), 32, CONFIG, 0, single_device_mesh())
    cells = unfinished_cells(epath.Path(tmp_path))
    assert int(np.diff(cells.start_C).min()) > 0 and cells.num_rows == ROWS
    exact = ExactEngine(ArrayKeys(key), single_device_mesh(), 1024).search(key[::400], 25)
    every = RoutedEngine(cells, CellSettings(10**6)).search(key[::400], 25)
    np.testing.assert_array_equal(every.row_QK, exact.row_QK)
    np.testing.assert_array_equal(every.distance_QK, exact.distance_QK)
    # Through the groups: others of the rows that are as near.
    some = RoutedEngine(cells, CellSettings(3)).search(key[::400], 25)
    np.testing.assert_array_equal(some.distance_QK, exact.distance_QK)
    assert all(len(set(rows)) == 25 for rows in some.row_QK.tolist())


def test_split_cells_leave_room_for_others(monkeypatch):
    """Most rows are equal: their cells share a centroid, and do not fill what is around it."""
    monkeypatch.setattr(groups, "_MOST_COPIES", 16)
    far = _keys(300)
    centroid_CD = np.concatenate([np.repeat(far[:1], 1000, axis=0), far[1:]])
    found = groups.Centroids.of(centroid_CD, far[:40])
    assert found.around_GM.shape == (40, 128)
    copies = (found.around_GM < 1000).sum(axis=1)
    assert copies.max() == 16
    # Of all that is no further copy, the nearest; of the copies any.
    every = np.concatenate([centroid_CD[:16], far[1:]])
    expected = np.sort(np.square(far[:40, None] - every).sum(axis=2), axis=1)[:, :128]
    distance = np.square(far[:40, None] - centroid_CD[found.around_GM]).sum(axis=2)
    np.testing.assert_allclose(distance, expected, rtol=1e-4, atol=1e-4)
    assert all(len(set(one)) == 128 for one in found.around_GM.tolist())


def test_recall_is_that_of_cells_without_groups(tmp_path, monkeypatch):
    key, found = _keys(), {}
    keys = ArrayKeys(key)
    exact = ExactEngine(keys, single_device_mesh(), 1024)
    sample = recall.draw_sample(keys, exact.search, 1000, 20, (0, 1))
    for name in ("groups", "flat"):
        if name == "flat":
            monkeypatch.setattr(groups, "_AROUND", CELLS)
        path = epath.Path(tmp_path) / name
        build_cells(path, keys, 32, CONFIG, 0, single_device_mesh())
        cells = unfinished_cells(path)
        assert (len(cells.centroids.group_GD) > 1) == (name == "groups")
        found[name] = recall.measure(RoutedEngine(cells, CellSettings(8)), sample)
        whole = recall.measure(RoutedEngine(cells, CellSettings(10**6)), sample)
        assert whole == 1
    assert found["flat"] > 0.85
    assert found["groups"] > found["flat"] - 0.03


def test_rows_are_searched_in_the_order_of_cells(tmp_path):
    key = _keys()
    build_cells(epath.Path(tmp_path), ArrayKeys(key), 32, CONFIG, 0, single_device_mesh())
    cells = unfinished_cells(epath.Path(tmp_path))
    order = RoutedEngine(cells, CellSettings(3)).visiting_order(slice(1000, 5000))
    np.testing.assert_array_equal(np.sort(order), np.arange(4000))
    cell_N = np.empty(ROWS, np.int64)
    row_N = cells.read_rows(0, ROWS)
    cell_N[row_N] = np.repeat(np.arange(len(cells.start_C) - 1), np.diff(cells.start_C))
    assert (np.diff(cell_N[1000 + order]) >= 0).all()
    # Of some cells in memory their rows come first.
    part = RoutedEngine(cells, CellSettings(3), range(20, 40)).visiting_order(slice(1000, 5000))
    np.testing.assert_array_equal(np.sort(part), np.arange(4000))
    held = np.isin(cell_N[1000 + part], np.arange(20, 40))
    assert held.any() and not (np.diff(held.astype(int)) > 0).any()


def test_a_build_stopped_between_cells_and_rows_goes_on_to_the_same_bits(tmp_path, monkeypatch):
    class _Killed(BaseException):
        pass

    about = ArrayKeys(_keys()), 32, CONFIG, 0, single_device_mesh()
    whole, stopped = epath.Path(tmp_path) / "whole", epath.Path(tmp_path) / "stopped"
    build_cells(whole, *about)
    monkeypatch.setattr(estimates, "_RUN_BYTES", 5000 * (4 * WIDTH + 12))
    put, count = ShardWriter.put, 0

    def killed(*arguments):
        nonlocal count
        count += 1
        if count in (2, 5):
            raise _Killed
        return put(*arguments)

    monkeypatch.setattr(ShardWriter, "put", killed)
    for _ in range(2):
        with pytest.raises(_Killed):
            build_cells(stopped, *about)
    build_cells(stopped, *about)
    one, other = (unfinished_cells(path) for path in (whole, stopped))
    for name in ("centroid_CD", "group_GD", "around_GM"):
        expected = getattr(one.centroids, name)
        np.testing.assert_array_equal(getattr(other.centroids, name), expected)
    np.testing.assert_array_equal(other.read_rows(0, ROWS), one.read_rows(0, ROWS))
    np.testing.assert_array_equal(other.read_keys(0, ROWS), one.read_keys(0, ROWS))
