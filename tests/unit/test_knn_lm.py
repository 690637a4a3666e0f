"""On how many validation rows the kNN-LM is tuned: their neighbours are held in memory."""

from types import SimpleNamespace

import numpy as np
import pytest

from mlpmem_jax.config.schema import Config
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.retrieval import knn_lm, temperature
from mlpmem_jax.retrieval.distributions import LabelEvidence
from mlpmem_jax.retrieval.engine import ArrayKeys
from mlpmem_jax.retrieval.exact import ExactEngine
from mlpmem_jax.retrieval.knn_lm import KnnLm
from mlpmem_jax.retrieval.temperature import Tuned
from mlpmem_jax.studies.search_quality import search_scores
from mlpmem_jax.studies.search_quality.search_scores import SearchedKnn


class _Knn(KnnLm):
    """Neighbours in memory."""

    def __init__(self, label_N, distance_NK, label_NK):
        super().__init__("neighbors/base/valid", label_N, np.zeros(1, np.int32))
        self.distance_NK, self.label_NK = distance_NK, label_NK

    def parts(self, row_N):
        self.row_N = row_N
        for row_Q in np.array_split(row_N, 3):
            yield row_Q, self.distance_NK[row_Q], self.label_NK[row_Q]


@pytest.fixture
def scored_N():
    scored_N = np.ones(200_000, bool)
    scored_N[::7] = False
    return scored_N


def test_the_default_bounds_the_rows_and_a_note_names_them(monkeypatch, capsys, scored_N):
    def tune(evidence, logprob_N):
        return Tuned(1.0, 0.5, len(evidence), len(logprob_N))

    monkeypatch.setattr(temperature, "tune", tune)
    zero_N = np.zeros(len(scored_N), np.int32)
    knn, most = _Knn(zero_N, np.zeros((len(zero_N), 1)), zero_N[:, None]), Config().evaluate
    tuned = knn.tune(scored_N, zero_N, most.knn_valid_rows, seed=0)
    assert (tuned.nats, tuned.decoder_nats) == (131_072, 131_072)
    assert scored_N[knn.row_N].all()
    assert "131,072 of 171,428 validation rows" in capsys.readouterr().out
    # Drawn over the whole split, not its beginning.
    assert np.sum(knn.row_N < 50_000) == pytest.approx(131_072 / 4, rel=0.05)


def test_a_small_split_is_used_whole_without_a_note(capsys, scored_N):
    row_N = knn_lm.tuning_rows(scored_N[:1000], 131_072, 0)
    np.testing.assert_array_equal(row_N, np.flatnonzero(scored_N[:1000]))
    assert capsys.readouterr().out == ""


def test_all_parts_are_tuned_on_and_a_bound_is_logged(capsys):
    rng = np.random.default_rng(0)
    distance_NK = np.sort(rng.random((60, 4)), axis=1).astype(np.float32)
    label_N = np.full(60, 1, np.int32)
    # The nearest neighbour is always right, and no other: τ goes to its lower bound.
    label_NK = np.tile(np.array([1, 0, 0, 0], np.int32), (60, 1))
    scored_N = rng.random(60) < 0.8
    decoder_N = np.log(rng.uniform(0.1, 0.3, 60))
    knn = _Knn(label_N, distance_NK, label_NK)
    tuned = knn.tune(scored_N, decoder_N, None, seed=0)
    evidence = LabelEvidence(distance_NK[scored_N], label_NK[scored_N], label_N[scored_N])
    assert tuned == temperature.tune(evidence, decoder_N[scored_N])
    assert tuned.at_bound == "lower" and "at the lower bound" in capsys.readouterr().out
    given = knn.tune(scored_N, decoder_N, None, seed=0, temperature=0.5)
    assert given == temperature.fixed(evidence, decoder_N[scored_N], 0.5)
    logprob_N = knn.logprob(scored_N, 0.5)
    np.testing.assert_array_equal(logprob_N[scored_N], evidence.logprob(0.5))
    assert np.isneginf(logprob_N[~scored_N]).all()


def test_searched_neighbours_are_those_of_the_rows_asked_for(monkeypatch):
    rng = np.random.default_rng(1)
    key, query = (rng.standard_normal((n, 4)).astype(np.float32) for n in (50, 23))
    train_label, label_N = (rng.integers(0, 5, n).astype(np.int32) for n in (50, 23))
    monkeypatch.setattr(search_scores, "StoredKeys", lambda datastore: ArrayKeys(query))
    engine = ExactEngine(ArrayKeys(key), single_device_mesh(), 16)
    searched = SearchedKnn(
        engine, SimpleNamespace(path="datastore/base/valid"), label_N, train_label, 6, query_batch=8
    )
    row_N = np.array([0, 5, 7, 8, 22])
    parts = list(searched.parts(row_N))
    assert [row_Q.tolist() for row_Q, *_ in parts] == [[0, 5, 7], [8], [22]]
    found = engine.search(query, 6)
    distance_NK, label_NK = (
        np.concatenate(arrays) for arrays in list(zip(*parts, strict=True))[1:]
    )
    np.testing.assert_allclose(distance_NK, found.distance_QK[row_N], rtol=1e-6)
    np.testing.assert_array_equal(label_NK, train_label[found.row_QK[row_N]])


def test_nothing_to_tune_on_is_refused():
    knn = _Knn(np.zeros(3, np.int32), np.zeros((3, 1)), np.zeros((3, 1), np.int32))
    with pytest.raises(ArtifactError, match="neighbors/base/valid: no row to choose τ and λ on"):
        knn.tune(np.zeros(3, bool), np.zeros(3), None, seed=0)
