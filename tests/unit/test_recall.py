"""Recall: how it is counted, calibrated and enforced; ScaNN held against exact."""

import numpy as np
import pytest

from mlpmem_jax.config.data import RetrievalConfig
from mlpmem_jax.errors import ArtifactError, ConfigError
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.retrieval import approximate, engine, recall
from mlpmem_jax.retrieval.approximate import ApproximateEngine, SearchSettings
from mlpmem_jax.retrieval.engine import ArrayKeys, choose_engine
from mlpmem_jax.retrieval.exact import ExactEngine
from mlpmem_jax.retrieval.merge import Neighbors
from mlpmem_jax.retrieval.neighbors import StoredNeighbors
from mlpmem_jax.retrieval.routed import CellSettings
from mlpmem_jax.store.files import read_json, write_json


def _neighbors(distance, row):
    return Neighbors(np.array(distance, np.float32), np.array(row, np.int64))


def test_ties_in_distance_are_hits(monkeypatch: pytest.MonkeyPatch):
    truth = _neighbors([[1, 2, 2], [1, 2, 3]], [[0, 1, 2], [0, 1, 2]])
    found = _neighbors([[1, 2, 2], [1, 3.5, 4]], [[0, 1, 9], [0, 8, 9]])
    assert recall.recall(found, truth) == pytest.approx((1 + 1 / 3) / 2)
    assert recall.recall(truth, truth) == 1.0

    class Stored(StoredNeighbors):
        """Neighbours that lie in memory."""

        def __init__(self, neighbors: Neighbors):
            self._neighbors = neighbors
            self.num_rows = len(neighbors.row_QK)

        def read(self, start: int, stop: int) -> Neighbors:
            found = self._neighbors
            return Neighbors(found.distance_QK[start:stop], found.row_QK[start:stop])

    # In parts of one row, as a large split is read.
    monkeypatch.setattr("mlpmem_jax.retrieval.neighbors.READ_ROWS", 1)
    assert Stored(found).recall(Stored(truth)) == pytest.approx((1 + 1 / 3) / 2)


def test_missing_places_are_no_hits_and_no_truth():
    truth = _neighbors([[1, 2, np.inf]], [[0, 1, -1]])
    found = _neighbors([[1, np.inf, np.inf]], [[0, -1, -1]])
    assert recall.recall(found, truth) == 0.5


def _keys(num_rows=4000, width=16):
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(50, width))
    key = centres[generator.integers(0, 50, num_rows)] + 0.3 * generator.normal(
        size=(num_rows, width)
    )
    key[100:160] = key[100]  # More equal rows than neighbours are asked for.
    return ArrayKeys(key.astype(np.float32))


def test_plain_and_exact_agree():
    keys = _keys()
    exact = ExactEngine(keys, single_device_mesh(), 1024)
    sample = recall.draw_sample(keys, recall.plain_search(keys), 1000, 20, (0,))
    assert len(sample.row_Q) == len(set(sample.row_Q)) == 1000
    assert not (sample.truth.row_QK == sample.row_Q[:, None]).any()
    assert recall.measure(exact, sample) == 1.0


def test_a_sample_is_no_larger_than_the_datastore():
    keys = _keys(300)
    sample = recall.draw_sample(keys, recall.plain_search(keys), 1000, 5, (0,))
    np.testing.assert_array_equal(sample.row_Q, np.arange(300))


@pytest.mark.parametrize("shard_rows", [10_000, 1500])
def test_scann_against_exact(tmp_path, shard_rows):
    pytest.importorskip("scann")
    from etils import epath

    keys = _keys()
    config = RetrievalConfig(num_neighbors=20, shard_rows=shard_rows)
    built = list(approximate.build_shards(keys, epath.Path(tmp_path), config))
    assert len(built) == (1 if shard_rows > 4000 else 3)
    leaves = approximate.num_leaves(config, 4000)
    everything = SearchSettings(leaves, 2000)
    engine = ApproximateEngine(epath.Path(tmp_path), everything)
    assert engine.num_rows == 4000
    exact = ExactEngine(keys, single_device_mesh(), 1024)
    sample = recall.draw_sample(keys, exact.search, 1000, 20, (0,))
    assert recall.measure(engine, sample) == 1.0
    # Distances are exact, and lists are ordered by distance and row.
    found, truth = engine.search(sample.query_QD, 20), exact.search(sample.query_QD, 20)
    np.testing.assert_allclose(found.distance_QK, truth.distance_QK, rtol=1e-5, atol=1e-5)

    def measure_with(settings):
        engine.settings = settings
        return recall.measure(engine, sample)

    first = SearchSettings(1, 42)
    assert measure_with(first) < 0.9
    settings, calibrated = recall.calibrate(measure_with, first, everything, floor=0.95)
    assert calibrated > 0.95 and settings.num_leaves_to_search > 1
    # What lists the files is damaged, or of an earlier version: it has no checksum that fits.
    shard = epath.Path(tmp_path) / "shard-00000" / approximate.SHARD
    about = read_json(shard)
    write_json(shard, about | {"files": list(about["files"])})
    with pytest.raises(ArtifactError, match="shard.json: damaged"):
        ApproximateEngine(epath.Path(tmp_path), everything)
    assert calibrated == measure_with(settings)


def test_places_that_leaves_cannot_fill_are_missing(tmp_path):
    pytest.importorskip("scann")
    from etils import epath

    keys = _keys(2000)
    config = RetrievalConfig(num_neighbors=200, num_leaves=100)
    list(approximate.build_shards(keys, epath.Path(tmp_path), config))
    engine = ApproximateEngine(epath.Path(tmp_path), SearchSettings(1, 800))
    found = engine.search(keys.read(0, 50), 201)
    missing = found.row_QK < 0
    assert missing.any() and not missing[:, 0].any()
    np.testing.assert_array_equal(missing, np.isinf(found.distance_QK))
    more = engine.search(keys.read(0, 3), 2500)  # More than there are rows.
    assert more.row_QK.shape == (3, 2500) and (more.row_QK[:, -1] == -1).all()


def test_an_index_is_built_alike_twice(tmp_path):
    pytest.importorskip("scann")
    from etils import epath

    config = RetrievalConfig(num_neighbors=20, shard_rows=2500)
    for name in ("a", "b"):
        list(approximate.build_shards(_keys(), epath.Path(tmp_path / name), config))
    files = sorted(
        p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file()
    )
    assert len(files) > 5
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file


def test_calibration_raises_what_helps_and_stops():
    def measure_with(settings):
        return min(settings.num_leaves_to_search / 100, settings.num_reorder / 1000)

    first = SearchSettings(10, 400)
    found = recall.calibrate(measure_with, first, SearchSettings(100, 2000), 0.5)
    assert found == (SearchSettings(53, 600), 0.53)
    given = recall.calibrate(measure_with, first, SearchSettings(100, 400), 0.95)
    assert given == (SearchSettings(100, 400), 0.4)


def test_a_low_recall_is_a_warning_that_names_the_keys(capsys):
    config, settings = RetrievalConfig(), SearchSettings(20, 1028)
    recall.check(0.95, config, None, 1024)
    recall.check(0.95, config, settings, 1024)
    assert capsys.readouterr().err == ""
    recall.check(0.94, config, settings, 1024)
    said = capsys.readouterr().err
    assert said.startswith("warning: recall@256 is 0.9400, below retrieval.min_recall=0.95")
    assert "num_leaves_to_search (now 20) or retrieval.num_reorder (now 1028), or set" in said
    assert "retrieval.engine=routed" in said
    recall.check(0.94, config, CellSettings(7), 1024)
    assert "(now 7), or set retrieval.engine=exact" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="of the exact engine is 0.9400 on 1024 rows"):
        recall.check(0.94, config, None, 1024)


@pytest.mark.parametrize("installed", [True, False])
def test_the_choice_of_engine_is_explained(monkeypatch, installed):
    monkeypatch.setattr(engine, "is_approximate_installed", lambda: installed)
    config = RetrievalConfig()
    chosen = {
        (rows, platform): choose_engine(config, rows, platform)
        for platform, most in (("cpu", 1_500_000), ("gpu", 4_000_000), ("tpu", 4_000_000))
        for rows in (60_000, 60_001, most, most + 1)
    }
    for platform in ("cpu", "gpu", "tpu"):
        between = "exact" if platform != "cpu" else "scann" if installed else "routed"
        engines = [one.engine for (_, on), one in chosen.items() if on == platform]
        assert engines == ["exact", between, between, "routed"]
    assert chosen[1_500_001, "cpu"].why == "auto: 1,500,001 rows are more than 1,500,000"
    assert chosen[4_000_001, "tpu"].why == "auto: 4,000,001 rows are more than 4,000,000"
    assert "60,000 rows are at most 60,000" in chosen[60_000, "cpu"].why
    routed = choose_engine(RetrievalConfig(engine="routed"), 1000, "cpu")
    assert (routed.engine, routed.why) == ("routed", "retrieval.engine=routed")
