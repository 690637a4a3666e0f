"""The exact engine against NumPy's argsort: ties, padding, thresholds, large row numbers."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.retrieval import blocked, device_search, exact
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


def _on_mesh(key, dtype=np.float32):
    return _MeshSearch(ArrayKeys(key), single_device_mesh(), 1024, "cpu", np.dtype(dtype))


def _searchers(key):
    return ExactEngine(ArrayKeys(key), single_device_mesh(), 1024), _on_mesh(key)


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
    monkeypatch.setattr(blocked, "_SAMPLE_ROWS", 4 * 64)
    monkeypatch.setattr(blocked, "_QUERIES", 32)
    generator = np.random.default_rng(seed)
    key = generator.normal(size=(6000, 8)).astype(np.float32)
    query = generator.normal(size=(100, 8)).astype(np.float32)
    found = ExactEngine(ArrayKeys(key), single_device_mesh(), 1024).search(query, 50)
    np.testing.assert_array_equal(found.row_QK, _expected(key, query, 50)[1])


def test_a_sample_that_misleads_is_found_out(monkeypatch):
    # Only sampled rows are near: the first threshold lets fewer than K pass.
    monkeypatch.setattr(blocked, "_KEYS", 64)
    monkeypatch.setattr(blocked, "_SAMPLE_ROWS", 4 * 64)
    generator = np.random.default_rng(0)
    key = generator.normal(size=(6000, 4)).astype(np.float32) + 50
    sampled = np.linspace(0, 5999, 4 * 64, dtype=np.int64)
    key[sampled] -= 50
    query = generator.normal(size=(10, 4)).astype(np.float32)
    found = ExactEngine(ArrayKeys(key), single_device_mesh(), 1024).search(query, 300)
    distance, row = _expected(key, query, 300)
    np.testing.assert_allclose(found.distance_QK, distance, rtol=1e-6)
    np.testing.assert_array_equal(np.sort(found.row_QK), np.sort(row))


@pytest.mark.parametrize("count", [7, 200])
@pytest.mark.parametrize("keys", [64, 8192])
def test_skipped_rows_are_no_neighbours(monkeypatch, keys, count):
    """Ranges of any size and place, the same for runs of queries; one of all rows but three."""
    monkeypatch.setattr(blocked, "_KEYS", keys)
    monkeypatch.setattr(blocked, "_SAMPLE_ROWS", 4 * keys)
    key, query = _keys(1500), _keys(60, seed=1)
    skipped = np.repeat([[0, 0], [0, 700], [5, 6], [3, 1500], [900, 1500], [0, 1500]], 10, axis=0)
    truth = np.square(query[:, None] - key).sum(axis=2)
    row_N = np.arange(1500)
    truth[(row_N >= skipped[:, :1]) & (row_N < skipped[:, 1:])] = np.inf
    row = np.argsort(truth, axis=1, kind="stable")[:, :count]
    distance = np.take_along_axis(truth, row, axis=1)
    row[np.isinf(distance)] = -1
    base = 1 << 33
    engine = ExactEngine(ArrayKeys(key), single_device_mesh(), 1024, first_row=base)
    found = engine.search_later(query, count, skipped + base)()
    np.testing.assert_array_equal(found.distance_QK, distance)
    np.testing.assert_array_equal(found.row_QK, np.where(row < 0, -1, row + base))
    found = _on_mesh(key).search_later(query, count, skipped)()
    np.testing.assert_array_equal(found.distance_QK, distance)
    same = (found.row_QK == row) | (distance == distance[:, -1:])  # See the test above.
    assert same.all() and (found.row_QK[np.isinf(distance)] == -1).all()


@pytest.mark.parametrize(("num_rows", "count"), [(5, 9), (1500, 7), (1500, 200), (20000, 40)])
@pytest.mark.parametrize("offset", [0, 1000])
def test_rows_within_a_distance(num_rows, count, offset):
    """None, those as far as the distance, more than are wanted, and any; with a common offset."""
    key, query = _keys(num_rows) + offset, _keys(1100, seed=1) + offset
    distance, row = _expected(key, query[:60], min(count, num_rows))
    within = np.tile(np.array([-1, 0, 4, 9, 30, np.inf], np.float32), 10)
    every = np.concatenate([within, np.full(len(query) - 60, -1, np.float32)])
    is_near = distance <= within[:, None]
    engine = ExactEngine(ArrayKeys(key), single_device_mesh(), 1024, first_row=77)
    found = engine.search_within(query, every, count)
    assert found.row_QK.shape[1] == is_near.sum(axis=1).max()  # No longer than need be.
    columns = found.row_QK.shape[1]
    expected = np.where(is_near, row + 77, -1)[:, :columns]
    np.testing.assert_array_equal(found.row_QK[:60], expected)
    np.testing.assert_array_equal(
        found.distance_QK[:60], np.where(is_near, distance, np.inf)[:, :columns]
    )
    assert (found.row_QK[60:] == -1).all()
    assert engine.search_within(query[:0], every[:0], count).row_QK.shape == (0, 0)
    engine._on_host, engine._on_mesh = None, _on_mesh(key)
    on_mesh = engine.search_within(query[:60], within, count)
    np.testing.assert_array_equal(on_mesh.distance_QK[:, :columns], found.distance_QK[:60])
    assert (on_mesh.row_QK[:, columns:] == -1).all()


@pytest.mark.parametrize("ratio", [1, 30, 1000])
def test_a_distance_that_is_far_from_all_keys_loses_none_by_rounding(ratio):
    """The distance is that of a row, so that rounding alone decides what is within."""
    generator = np.random.default_rng(0)
    key = generator.normal(size=(300, 8)).astype(np.float32)
    query = (ratio * generator.normal(size=(2000, 8))).astype(np.float32)
    distance, row = _expected(key, query, 300)
    engine = ExactEngine(ArrayKeys(key), single_device_mesh(), 1024)
    for rank in (0, 5, 299):
        found = engine.search_within(query, distance[:, rank], 300)
        is_near = distance <= distance[:, rank : rank + 1]
        columns = is_near.sum(axis=1).max()
        expected = np.where(is_near, row, -1)[:, :columns]
        np.testing.assert_array_equal(found.row_QK, expected)


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
    original = exact.mean_and_norms
    monkeypatch.setattr(
        exact, "mean_and_norms", lambda *a, **k: made.append(1) or original(*a, **k)
    )
    searcher = _on_mesh(_keys(3000))
    for query in _keys(4, seed=1):
        searcher.search(query[None], 7)
    assert len(made) == 1
    np.testing.assert_allclose(
        searcher._norm_N[:3000], np.square(_keys(3000) - _keys(3000).mean(0)).sum(1), rtol=1e-5
    )
    assert np.isinf(searcher._norm_N[3000:]).all()


@pytest.mark.parametrize(
    ("chunk", "count", "width", "queries", "rescored"),
    [
        (65536, 257, 128, 1024, 1024),
        (65536, 1025, 768, 1024, 128),  # The keys scored again do not shrink the product.
        (65536, 1025, 4096, 1024, 16),
        (1 << 30, 1 << 16, 4096, 8, 1),
    ],
)
def test_blocks_of_queries_are_bounded_each_by_its_own_buffer(
    chunk, count, width, queries, rescored
):
    assert exact.query_block(4 * chunk, 512 << 20) == queries
    assert exact.query_block(4 * (count + 32) * width, 512 << 20, 1) == rescored


def test_scoring_again_takes_no_more_memory_than_its_bound():
    mesh, bound = single_device_mesh(), 32 << 20
    num_rows, width, wanted, chunk = 1 << 15, 768, 1024, 1 << 13
    queries = exact.query_block(4 * chunk, bound)
    shapes = ((num_rows, width), (1, width), (num_rows,), (queries, width))
    compiled = device_search.search_all.lower(
        *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
        mesh=mesh,
        wanted=wanted,
        kept=wanted,
        chunk=chunk,
        query_block=queries,
        rescored=exact.query_block(4 * (wanted + 32) * width, bound, 1),
    ).compile()
    assert queries == 1024
    # All at once would take 3.3 GB.
    assert compiled.memory_analysis().temp_size_in_bytes < 6 * bound


@pytest.mark.parametrize("count", [40, 300])
def test_neighbours_do_not_depend_on_the_block(monkeypatch, count):
    key, query = _keys(3000), _keys(60, seed=1)
    large = _on_mesh(key).search(query, count)
    monkeypatch.setattr(exact, "_BLOCK_BYTES_CPU", 16 * 4 * 1024)
    small = _on_mesh(key).search(query, count)
    np.testing.assert_array_equal(large.row_QK, small.row_QK)
    np.testing.assert_array_equal(large.distance_QK, small.distance_QK)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("scale", "offset"), [(1e-3, 2), (1, 0), (1, 100), (3e3, 2)])
def test_products_of_half_precision_find_the_neighbours_of_float32(dtype, scale, offset):
    """Queries are float32, as states of a decoder are: no half holds them."""
    generator = np.random.default_rng(4)
    key = (scale * (generator.normal(size=(5000, 24)) + offset)).astype(dtype).astype(np.float32)
    query = (scale * (generator.normal(size=(50, 24)) + offset)).astype(np.float32)
    truth = ((query[:, None].astype(np.float64) - key[None]) ** 2).sum(axis=2)
    nearest = np.sort(truth)[:, :300]
    found = _on_mesh(key, dtype).search(query, 300)
    np.testing.assert_allclose(found.distance_QK, nearest, rtol=1e-6)
    of_rows = np.take_along_axis(truth, found.row_QK, axis=1)
    np.testing.assert_allclose(of_rows, nearest, rtol=1e-6)


def test_ties_of_half_precision_are_those_of_float32():
    key, query = _keys(3000), _keys(60, seed=1)
    half, full = (_on_mesh(key, dtype).search(query, 40) for dtype in (np.float16, np.float32))
    np.testing.assert_array_equal(half.row_QK, full.row_QK)
    np.testing.assert_array_equal(half.distance_QK, full.distance_QK)


def test_keys_take_on_devices_what_the_platform_multiplies():
    keys = ArrayKeys(_keys(10).astype(np.float16))
    assert keys.dtype == np.float16
    assert exact.device_dtype(keys, "gpu") == np.float16
    assert exact.device_dtype(keys, "tpu") == np.float32
    assert exact.device_dtype(keys, "cpu") == np.float32
    wide = ArrayKeys(_keys(10).astype(ml_dtypes.bfloat16))
    assert exact.device_dtype(wide, "tpu") == ml_dtypes.bfloat16
    assert exact.device_dtype(ArrayKeys(_keys(10)), "gpu") == np.float32


@pytest.mark.parametrize(
    ("count", "group"), [(160, 32), (288, 16), (1056, 8), (8, 64), (1 << 16, 1), (1 << 17, 1)]
)
def test_groups_follow_the_number_of_neighbours(count, group):
    assert device_search.group_size(65536, count) == group


@pytest.mark.parametrize("group", [1, 4, 16])
@pytest.mark.parametrize("count", [5, 64, 400])
def test_the_best_of_groups_are_the_best_of_all_and_ties_keep_the_smaller_row(count, group):
    generator = np.random.default_rng(count)
    score = generator.integers(0, 30, (6, 2, 1024)).astype(np.float32)
    best = jnp.full((6, count), jnp.inf), jnp.zeros((6, count), jnp.int32)
    for number in range(2):
        best = device_search._nearer(best, jnp.asarray(score[:, number]), number * 1024, group)
    order = np.argsort(score.reshape(6, -1), axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(best[1], order)
    np.testing.assert_array_equal(best[0], np.take_along_axis(score.reshape(6, -1), order, axis=1))


@pytest.mark.parametrize("num_queries", [1, 5, 33])
def test_few_queries_are_not_padded_to_a_block_and_find_the_same(monkeypatch, num_queries):
    key, query = _keys(9000), _keys(600, seed=1)
    searcher = ExactEngine(ArrayKeys(key), single_device_mesh(), 1024)
    every = searcher.search(query, 20)
    sizes = []
    original = blocked.block_scores
    monkeypatch.setattr(
        blocked, "block_scores", lambda q, k: sizes.append(len(q)) or original(q, k)
    )
    few = searcher.search(query[:num_queries], 20)
    np.testing.assert_array_equal(few.row_QK, every.row_QK[:num_queries])
    np.testing.assert_array_equal(few.distance_QK, every.distance_QK[:num_queries])
    assert set(sizes) == {1 << (num_queries - 1).bit_length()}
    assert len(sizes) == 1  # All keys at once.


def test_a_later_answer_is_that_of_a_search_now():
    key, query = _keys(3000), _keys(60, seed=1)
    searcher = _on_mesh(key)
    pending = [searcher.search_later(query[start : start + 20], 40) for start in (0, 20, 40)]
    found = np.concatenate([one().row_QK for one in pending])
    np.testing.assert_array_equal(found, searcher.search(query, 40).row_QK)
