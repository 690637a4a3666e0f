"""The exact engine against NumPy's argsort: ties, padding, thresholds, large row numbers."""

import numpy as np
import pytest

from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.retrieval import blocked, exact
from mlpmem_jax.retrieval.engine import ArrayKeys
from mlpmem_jax.retrieval.exact import ExactEngine, _MeshSearch
from mlpmem_jax.retrieval.merge import drop_own_row


def _expected(key, query, count):
    """Distances by differences, ordered by distance and then by row."""
    difference = query[:, None].astype(np.float32) - key[None]
    distance = np.einsum("qnd,qnd->qn", difference, difference)
    order = np.argsort(distance, axis=1, kind="stable")[:, :count]
    return np.take_along_axis(distance, order, axis=1), order


def _keys(num_rows, width=8, seed=0):
    """Keys on a coarse grid, so that distances are exact and many are equal."""
    generator = np.random.default_rng(seed)
    key = generator.integers(-3, 4, (num_rows, width)).astype(np.float32)
    key[num_rows // 2 : num_rows // 2 + 3] = key[0]
    return key


def _searchers(key):
    mesh = single_device_mesh()
    return (
        ExactEngine(ArrayKeys(key), mesh, 1024),
        _MeshSearch(ArrayKeys(key), mesh, 1024, "cpu"),
    )


@pytest.mark.parametrize(
    ("num_rows", "count"), [(1, 1), (5, 9), (3000, 7), (3000, 257), (9000, 40), (20000, 300)]
)
def test_neighbours_are_those_of_argsort(num_rows, count):
    key, query = _keys(num_rows), _keys(60, seed=1)
    distance, row = _expected(key, query, count)
    for searcher in _searchers(key):
        found = searcher.search(query, count)
        np.testing.assert_array_equal(found.distance_QK[:, : row.shape[1]], distance)
        same = found.row_QK[:, : row.shape[1]] == row
        if isinstance(searcher, _MeshSearch):
            # More rows than it ranks again may be as far as the last one.
            same |= distance == distance[:, -1:]
        assert same.all()
        assert found.row_QK.shape == (60, count)
        assert (found.row_QK[:, row.shape[1] :] == -1).all()
        assert np.isinf(found.distance_QK[:, row.shape[1] :]).all()


@pytest.mark.parametrize("seed", range(3))
def test_many_blocks_and_a_sampled_threshold(monkeypatch, seed):
    # Small blocks: the threshold comes from 4 x 64 of 6,000 rows, and lists overflow.
    monkeypatch.setattr(blocked, "_KEYS", 64)
    monkeypatch.setattr(blocked, "_QUERIES", 32)
    generator = np.random.default_rng(seed)
    key = generator.normal(size=(6000, 8)).astype(np.float32)
    query = generator.normal(size=(100, 8)).astype(np.float32)
    found = ExactEngine(ArrayKeys(key), single_device_mesh(), 1024).search(query, 50)
    np.testing.assert_array_equal(found.row_QK, _expected(key, query, 50)[1])


def test_a_sample_that_misleads_is_found_out(monkeypatch):
    # Only sampled rows are near: the first threshold lets fewer than K pass.
    monkeypatch.setattr(blocked, "_KEYS", 64)
    generator = np.random.default_rng(0)
    key = generator.normal(size=(6000, 4)).astype(np.float32) + 50
    sampled = np.linspace(0, 5999, 4 * 64, dtype=np.int64)
    key[sampled] -= 50
    query = generator.normal(size=(10, 4)).astype(np.float32)
    found = ExactEngine(ArrayKeys(key), single_device_mesh(), 1024).search(query, 300)
    distance, row = _expected(key, query, 300)
    np.testing.assert_allclose(found.distance_QK, distance, rtol=1e-6)
    np.testing.assert_array_equal(np.sort(found.row_QK), np.sort(row))


@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_a_common_offset_costs_no_precision(offset):
    generator = np.random.default_rng(2)
    key = (generator.normal(size=(5000, 16)) + offset).astype(np.float16).astype(np.float32)
    query = (generator.normal(size=(40, 16)) + offset).astype(np.float16).astype(np.float32)
    exact = ((query[:, None].astype(np.float64) - key[None]) ** 2).sum(axis=2)
    for searcher in _searchers(key):
        found = searcher.search(query, 100)
        np.testing.assert_allclose(found.distance_QK, np.sort(exact)[:, :100], rtol=1e-6)
        np.testing.assert_allclose(
            np.take_along_axis(exact, found.row_QK, axis=1), np.sort(exact)[:, :100], rtol=1e-6
        )


def test_rows_past_two_to_the_31():
    base = 1 << 33
    key = _keys(2000)
    engine = ExactEngine(ArrayKeys(key), single_device_mesh(), 1024, first_row=base)
    near = ExactEngine(ArrayKeys(key), single_device_mesh(), 1024)
    rows = np.arange(0, 2000, 37, dtype=np.int64)
    far_found = drop_own_row(engine.search(key[rows], 21), rows + base)
    near_found = drop_own_row(near.search(key[rows], 21), rows)
    assert far_found.row_QK.dtype == np.int64
    np.testing.assert_array_equal(far_found.row_QK - base, near_found.row_QK)
    np.testing.assert_array_equal(engine.search(key[:1], 2001).row_QK[0, -1:], [-1])


def test_keys_that_are_not_finite_are_named():
    key = _keys(100)
    key[70, 2] = np.inf
    with pytest.raises(ArtifactError, match=r"keys: row 70 is not finite \(1 such"):
        ExactEngine(ArrayKeys(key), single_device_mesh(), 1024)


def test_no_queries():
    found = _searchers(_keys(100))[0].search(np.empty((0, 8), np.float32), 5)
    assert found.row_QK.shape == (0, 5)


def test_means_and_norms_of_keys_are_made_once_not_for_every_query(monkeypatch):
    made = []
    original = exact._mean_and_norms
    monkeypatch.setattr(
        exact, "_mean_and_norms", lambda *a, **k: made.append(1) or original(*a, **k)
    )
    searcher = _MeshSearch(ArrayKeys(_keys(3000)), single_device_mesh(), 1024, "cpu")
    for query in _keys(4, seed=1):
        searcher.search(query[None], 7)
    assert len(made) == 1
    np.testing.assert_allclose(
        searcher._norm_N[:3000], np.square(_keys(3000) - _keys(3000).mean(0)).sum(1), rtol=1e-5
    )
    assert np.isinf(searcher._norm_N[3000:]).all()


@pytest.mark.parametrize(
    ("chunk", "count", "width", "expected"),
    [
        (65536, 257, 128, 1024),  # scores are the larger buffer
        (65536, 1025, 768, 128),  # the keys that are scored again are
        (65536, 1025, 4096, 16),
        (1 << 30, 1025, 4096, 8),
    ],
)
def test_a_block_of_queries_is_bounded_by_its_largest_buffer(chunk, count, width, expected):
    block = exact.query_block(chunk, count, width, 512 << 20)
    assert block == expected
    if block > 8:
        assert 4 * block * max(chunk, (count + 32) * width) <= 512 << 20


def test_neighbours_do_not_depend_on_the_block(monkeypatch):
    key, query = _keys(3000), _keys(60, seed=1)
    large = _MeshSearch(ArrayKeys(key), single_device_mesh(), 1024, "cpu").search(query, 40)
    monkeypatch.setitem(exact._BLOCK_BYTES, "cpu", 16 * 4 * 1024)
    small = _MeshSearch(ArrayKeys(key), single_device_mesh(), 1024, "cpu").search(query, 40)
    np.testing.assert_array_equal(large.row_QK, small.row_QK)
    np.testing.assert_array_equal(large.distance_QK, small.distance_QK)
