"""Rows far from all others: found exactly, and no harm to the recall of the others."""

import numpy as np
import pytest
from etils import epath

from mlpmem_jax.config.data import RetrievalConfig
from mlpmem_jax.retrieval import approximate, far_rows, index_files, recall
from mlpmem_jax.retrieval.approximate import ApproximateEngine, SearchSettings
from mlpmem_jax.retrieval.engine import ArrayKeys

ROWS, WIDTH, K = 6000, 64, 10
CONFIG = RetrievalConfig(num_neighbors=K, shard_rows=3500)
FAR = np.array([0, 1, 700, 2999, 3000, 4500, ROWS - 1])


def _keys() -> np.ndarray:
    """Clusters, and few rows with one massive activation each, some of them first and last."""
    generator = np.random.default_rng(0)
    centre = generator.normal(size=(80, WIDTH))
    key_ND = centre[generator.integers(0, 80, ROWS)] + 0.3 * generator.normal(size=(ROWS, WIDTH))
    key_ND[FAR, 7] += 400.0
    return key_ND.astype(np.float32)


def test_none_are_far_in_clusters():
    key_ND = np.delete(_keys(), FAR, axis=0)
    assert len(far_rows.far_rows(key_ND)) == 0
    assert len(far_rows.far_rows(np.ones((50, 3), np.float32))) == 0


def test_rows_with_massive_activations_are_far():
    np.testing.assert_array_equal(far_rows.far_rows(_keys()), FAR)


def test_a_group_that_is_no_exception_stays():
    """Codes are trained on what is more than a hundredth of the rows."""
    key_ND = _keys()
    key_ND[::20, 7] += 400.0
    assert len(far_rows.far_rows(key_ND)) <= ROWS // 100


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[epath.Path, np.ndarray]:
    """An index of two shards, and its keys."""
    pytest.importorskip("scann")
    path, key_ND = epath.Path(tmp_path_factory.mktemp("index")), _keys()
    list(approximate.build_shards(ArrayKeys(key_ND), path, CONFIG))
    return path, key_ND


def test_the_index_finds_far_rows_exactly_and_the_others_as_without_them(built):
    path, key_ND = built
    engine = ApproximateEngine(path, SearchSettings(30, 60))
    assert engine.num_rows == ROWS
    exact = recall.plain_search(ArrayKeys(key_ND))
    found, truth = (search(key_ND, K) for search in (engine.search, exact))
    # Each far row is nearest to itself and to the other far rows.
    np.testing.assert_array_equal(found.row_QK[FAR, : len(FAR)], truth.row_QK[FAR, : len(FAR)])
    np.testing.assert_allclose(
        found.distance_QK[FAR, : len(FAR)], truth.distance_QK[FAR, : len(FAR)]
    )
    others = np.delete(np.arange(ROWS), FAR)
    hits = (found.row_QK[others, :, None] == truth.row_QK[others, None, :]).any(axis=2)
    assert hits.mean() > 0.98
    # Numbers are those of the rows: their distances are the distances that were found.
    difference = key_ND[others, None] - key_ND[found.row_QK[others]]
    distance = np.square(difference).sum(axis=2)
    np.testing.assert_allclose(found.distance_QK[others], distance, rtol=1e-3, atol=1e-3)


def test_every_row_has_a_place_in_the_order_of_leaves(built):
    path, _ = built
    engine = ApproximateEngine(path, SearchSettings(12, 2 * (K + 1)))
    ordered = index_files.leaf_order(path)
    for rows in (slice(0, ROWS), slice(2900, 3100)):
        order = engine.visiting_order(rows)
        np.testing.assert_array_equal(np.sort(order), np.arange(rows.stop - rows.start))
        np.testing.assert_array_equal(ordered(rows), order)


def test_without_far_rows_nothing_is_written(tmp_path):
    pytest.importorskip("scann")
    path = epath.Path(tmp_path)
    list(approximate.build_shards(ArrayKeys(np.delete(_keys(), FAR, axis=0)), path, CONFIG))
    assert not list(path.glob("*/far_*"))


def test_damaged_far_rows_are_noticed(built, capsys):
    path, _ = built
    file = path / "shard-00000" / "far_key.npy"
    data = file.read_bytes()
    file.write_bytes(data[:-8] + bytes(8))
    assert not index_files.is_whole(path / "shard-00000")
    assert "far_key.npy" in capsys.readouterr().err
    file.write_bytes(data)
    assert index_files.is_whole(path / "shard-00000")
