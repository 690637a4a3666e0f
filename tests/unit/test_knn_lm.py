"""On how many validation rows the kNN-LM is tuned: their neighbours are held in memory."""

import numpy as np
import pytest

from mlpmem_jax.config.schema import Config
from mlpmem_jax.evaluation import knn_lm
from mlpmem_jax.studies.search_quality import search_scores
from mlpmem_jax.studies.search_quality.search_scores import SearchedKnn


class _Neighbors:
    def evidence(self, chosen_N):
        self.chosen_N = chosen_N
        return int(chosen_N.sum())


@pytest.fixture
def scored_N():
    scored_N = np.ones(200_000, bool)
    scored_N[::7] = False
    return scored_N


def test_the_default_bounds_the_rows_and_a_note_names_them(monkeypatch, capsys, scored_N):
    monkeypatch.setattr(knn_lm, "tune", lambda evidence, logprob_N: (evidence, len(logprob_N)))
    neighbors, most = _Neighbors(), Config().evaluate.knn_valid_rows
    tuned = knn_lm.tune_knn_lm(neighbors, scored_N, np.zeros(len(scored_N)), most, seed=0)
    assert tuned == (131_072, 131_072)
    assert not (neighbors.chosen_N & ~scored_N).any()
    assert "131,072 of 171,428 validation rows" in capsys.readouterr().out
    # Drawn over the whole split, not its beginning.
    assert neighbors.chosen_N[:50_000].sum() == pytest.approx(131_072 / 4, rel=0.05)


def test_a_small_split_is_used_whole_without_a_note(capsys, scored_N):
    row_N = knn_lm.tuning_rows(scored_N[:1000], 131_072, 0)
    np.testing.assert_array_equal(row_N, np.flatnonzero(scored_N[:1000]))
    assert capsys.readouterr().out == ""


def test_searched_neighbours_are_bounded_alike(monkeypatch, scored_N):
    """`search-quality` draws the same rows as `evaluate`."""
    seen = []

    def evidence(self, split, row_N):
        seen.append(row_N)
        raise StopIteration

    monkeypatch.setattr(SearchedKnn, "_evidence", evidence)
    monkeypatch.setattr(search_scores, "tune", None)

    class Stored:
        counts = type("Counts", (), {"scored_N": scored_N})

    with pytest.raises(StopIteration):
        SearchedKnn(None, None, None, 4, 8).tune(Stored, Config().evaluate.knn_valid_rows, seed=0)
    np.testing.assert_array_equal(seen[0], knn_lm.tuning_rows(scored_N, 131_072, 0))
