"""`retrieval.exact_rows`: the index searches for valid and test, and a sample is exact."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mlpmem_jax.config.load import changed_config
from mlpmem_jax.config.schema import Config
from mlpmem_jax.evaluation.metrics import count_documents
from mlpmem_jax.evaluation.report import as_text
from mlpmem_jax.evaluation.run_scores import difference_of_rows
from mlpmem_jax.pipeline import evaluate, exact_sample, index, retrieve
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.scoring import stored_split
from mlpmem_jax.pipeline.sources import Sources
from mlpmem_jax.pipeline.stage import run_stages
from mlpmem_jax.retrieval.knn_lm import read_labels
from mlpmem_jax.store.arrays import open_array, read_rows
from mlpmem_jax.studies.tables.part_scores import Part
from mlpmem_jax.studies.tables.variants import base_variant

ROWS = 300


@pytest.fixture
def sampled(tiny_run: Config, tmp_path: Path) -> Artifacts:
    """The tiny run with a poor index, whose neighbours of valid and test it finds."""
    shutil.copytree(tiny_run.workdir, tmp_path / "run")
    poor = {"engine": "routed", "cells_to_search": 1, "min_recall": 0.0, "exact_rows": ROWS}
    retrieval = tiny_run.retrieval.model_copy(update=poor)
    config = tiny_run.model_copy(update={"workdir": str(tmp_path / "run"), "retrieval": retrieval})
    return Artifacts(config)


def _read(artifact, name):
    store = open_array(artifact.path / name)
    return read_rows(store, 0, store.shape[0])


def test_a_sample_of_test_is_exact_and_says_what_the_index_costs(
    sampled: Artifacts, tiny_run: Config
):
    """Against the neighbours of the tiny run, all of which are exact."""
    run_stages([*index.stages(sampled), *retrieve.stages(sampled)])
    (sample,), all_exact = exact_sample.artifacts(sampled), Artifacts(tiny_run).neighbors("test")
    truth_NK, found_NK = (_read(one, "distance") for one in (all_exact, sampled.neighbors("test")))
    row_Q = np.sort(np.random.default_rng(0).choice(len(truth_NK), ROWS, replace=False))
    np.testing.assert_array_equal(_read(sample, "row"), _read(all_exact, "row")[row_Q])
    assert np.any(found_NK != truth_NK)

    test, train_label = stored_split(sampled, "test"), read_labels(sampled.datastore("train"))
    compared = exact_sample.compared(
        sampled, test, {"temperature": 2.0, "interpolation": 0.4}, train_label
    )
    radius_Q = truth_NK[row_Q].max(axis=1, keepdims=True) * (1 + 1e-5)
    assert compared["recall"] == pytest.approx(np.mean(found_NK[row_Q] <= radius_Q))
    assert 0.1 < compared["recall"] < 0.95

    def logprob(artifact):
        distance_QK = _read(artifact, "distance")[row_Q].astype(np.float64)
        weight_QK = np.exp((distance_QK.min(axis=1, keepdims=True) - distance_QK) / 2.0)
        row_QK = _read(artifact, "row")[row_Q]
        is_hit_QK = (train_label[row_QK] == test.label_N[row_Q, None]) & (row_QK >= 0)
        knn_Q = (weight_QK * is_hit_QK).sum(axis=1) / weight_QK.sum(axis=1)
        return np.log(0.4 * knn_Q + 0.6 * np.exp(test.logprob_N[row_Q].astype(np.float64)))

    scored_Q = test.counts.scored_N[row_Q]
    wanted = (logprob(all_exact) - logprob(sampled.neighbors("test")))[scored_Q].mean()
    assert compared["rows"] == scored_Q.sum()
    assert compared["costs_nats"]["value"] == pytest.approx(wanted, rel=1e-5)


def test_it_is_an_input_of_the_table_and_a_line_of_it(sampled: Artifacts, tiny_run: Config):
    (sample,) = exact_sample.artifacts(sampled)
    assert sample.relative in {one.relative for one in sampled.results.inputs}
    path = Artifacts(tiny_run).results.path
    results = json.loads((path / evaluate.RESULTS).read_text())
    assert "exact_sample" not in results["retrieval"]
    assert not exact_sample.artifacts(Artifacts(tiny_run))
    costs = {"value": 0.0123, "low": 0.01, "high": None}
    results["retrieval"]["exact_sample"] = {"rows": 1000, "recall": 0.9, "costs_nats": costs}
    line = "kNN-LM: recall 0.9000 on 1,000 test rows; exact search would gain 0.0123 nats"
    assert line in as_text(results, {}).splitlines()


def test_the_interval_draws_files():
    """Rows of one file are drawn together: alike, they leave an interval as wide as the files'."""
    offset = np.arange(0, 41, 10)  # Four documents of nine tokens and a separator.
    token = np.ones(40, np.int64)
    token[offset[:-1]] = 0
    counts = count_documents(token[1:], 0, offset, np.ones(4, int), np.ones(4, int))
    row_Q = np.flatnonzero(counts.scored_N)[::2]
    of_document_D = np.array([0.0, 1.0, 2.0, 5.0])
    nats_Q = of_document_D[counts.document_N[row_Q]]
    settings = Config().evaluate
    found = difference_of_rows(counts, row_Q, nats_Q, settings, seed=3)
    assert found["value"] == pytest.approx(nats_Q.mean())
    assert found["low"] < 1.0 and found["high"] > 3.0
    only = row_Q[counts.document_N[row_Q] == 2]
    one = difference_of_rows(counts, only, np.full(len(only), 2.0), settings, seed=3)
    assert one == {"value": 2.0, "low": None, "high": None}


@pytest.mark.parametrize("exact_rows", ["all", 9])
def test_the_index_is_made_for_the_knn_lm_where_it_finds_its_neighbours(
    tiny_run: Config, exact_rows: object
):
    config = changed_config(tiny_run, {"retrieval.exact_rows": exact_rows})
    variant = base_variant(config, 0, Sources(config.workdir, reads=False))
    stages = Part("knn", variant).stages()
    order = [stage.artifact.relative for stage in stages]
    run, is_searched = variant.run, exact_rows != "all"
    assert (run.index.relative in order) == is_searched
    neighbors = [run.neighbors(split).relative for split in ("valid", "test")]
    assert set(neighbors) < set(order)
    if is_searched:
        assert all(order.index(run.index.relative) < order.index(one) for one in neighbors)
    # Exact neighbours of a sample serve the table of `evaluate` alone.
    sample = {one.relative for one in exact_sample.artifacts(run)}
    assert len(sample) == is_searched
    assert not sample & {*order, *(one.artifact.relative for one in variant.memory_stages())}


@pytest.mark.parametrize("without", [{"targets.teacher": "ngram"}, {"retrieval.keep_train": "all"}])
def test_the_recall_of_targets_is_no_setting_where_nothing_is_searched_for_them(
    tiny_run: Config, without: dict[str, object]
):
    plain = changed_config(tiny_run, without)
    asked = changed_config(plain, {"targets.min_recall": 0.5})
    for split in ("train", "valid"):
        found, usual = (Artifacts(one).targets(split).relative for one in (asked, plain))
        assert found == usual
    searched = changed_config(tiny_run, {"targets.min_recall": 0.5})
    assert (
        Artifacts(searched).targets("train").relative
        != Artifacts(tiny_run).targets("train").relative
    )
