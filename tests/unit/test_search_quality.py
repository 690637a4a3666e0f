"""Divergence of neighbour lists against dense distributions; configurations of settings."""

import numpy as np
import pytest

from mlpmem_jax.config.load import load_config
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.sources import Unread
from mlpmem_jax.retrieval.merge import Neighbors
from mlpmem_jax.studies.search_quality.divergence import SKEW, compare_neighbors
from mlpmem_jax.studies.search_quality.settings import reference_of, with_setting
from tests.conftest import ROOT

VOCAB = 12


def _neighbors(rng, num_rows, missing=False):
    distance = np.sort(rng.gamma(2.0, 2.0, (20, 15)), axis=1).astype(np.float32)
    row = rng.integers(0, num_rows, (20, 15))
    if missing:
        distance[:, -3:], row[:, -3:] = np.inf, -1
    return Neighbors(distance, row)


def _dense(neighbors, label, temperature):
    prob = np.zeros((len(neighbors), VOCAB))
    for query in range(len(neighbors)):
        for distance, row in zip(
            neighbors.distance_QK[query], neighbors.row_QK[query], strict=True
        ):
            if row >= 0:
                nearest = neighbors.distance_QK[query, 0]
                prob[query, label[row]] += np.exp((nearest - distance) / temperature)
    return prob / prob.sum(axis=1, keepdims=True)


def test_divergence_is_that_of_dense_distributions():
    rng = np.random.default_rng(0)
    label = rng.integers(0, VOCAB, 100).astype(np.int32)
    truth, found = _neighbors(rng, 100), _neighbors(rng, 100, missing=True)
    p, q = (_dense(one, label, 3.0) for one in (truth, found))
    measured = compare_neighbors(found, truth, label, 3.0)
    mixed = (1 - SKEW) * q + SKEW * p
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = np.where(p > 0, p * np.log(p / mixed), 0).sum(axis=1)
    assert measured["skew_kl"] == pytest.approx(kl.mean(), rel=1e-4)
    assert measured["missed_mass"] == pytest.approx(np.where(q == 0, p, 0).sum(axis=1).mean())
    assert measured["missed_mass"] > 0
    assert measured["top1"] == (p.argmax(axis=1) == q.argmax(axis=1)).mean()


def test_exact_neighbours_diverge_in_nothing():
    rng = np.random.default_rng(1)
    label = rng.integers(0, VOCAB, 100).astype(np.int32)
    truth = _neighbors(rng, 100)
    measured = compare_neighbors(truth, truth, label, 3.0)
    assert measured["skew_kl"] == pytest.approx(0, abs=1e-7)
    assert (measured["missed_mass"], measured["top1"]) == (0, 1)


def _config(*overrides):
    return load_config(ROOT / "configs" / "tiny.yaml", overrides, {"workdir": "run"})


def test_each_setting_has_artifacts_of_its_own_and_shares_the_rest():
    config = _config("retrieval.engine=scann")
    run = Artifacts(config, Unread("run"))
    names = [one.name for one in config.search_quality.settings]
    parts = [with_setting(run, one) for one in config.search_quality.settings]
    runs = [run, *parts]
    for own in ("index", "memory"):
        assert len({getattr(one, own).relative for one in runs}) == len(runs)
    assert len({one.targets("train").relative for one in runs}) == len(runs)
    assert len({one.neighbors("test").relative for one in runs}) == 1
    assert len({one.datastore("train").relative for one in runs}) == 1
    assert [one.index.label for one in parts] == [f"index [{name}]" for name in names]
    assert reference_of(config.search_quality) == "exact" == names[-1]
    assert parts[0].config.retrieval.num_leaves_to_search == 1
    assert parts[0].config.retrieval.min_recall == 0


def test_a_setting_like_the_configuration_shares_its_index_and_memory():
    settings = "search_quality.settings=[{name: exact, engine: exact, min_recall: 0.95}]"
    config = _config(settings)
    run = Artifacts(config, Unread("run"))
    (same,) = (with_setting(run, one) for one in config.search_quality.settings)
    assert same.index.relative == run.index.relative
    assert same.memory.relative == run.memory.relative


def test_what_the_routed_engine_reads_enters_its_recipes_alone():
    """Those of other engines stay what they were before there was one."""
    names = {"cells", "cells_to_search"}
    settings = "search_quality.settings=[{name: a, engine: routed, cells_to_search: 3}, {name: b}]"
    config = _config(settings)
    routed, scann = (
        with_setting(Artifacts(config, Unread("run")), one)
        for one in config.search_quality.settings
    )
    assert names <= routed.index.recipe["retrieval"].keys()
    assert not names & scann.index.recipe["retrieval"].keys()
    assert routed.config.retrieval.cells_to_search == 3
    # `auto` may choose the engine, and artifacts from before it did are the same.
    auto, given = (
        Artifacts(_config(one), Unread("run")).index.recipe["retrieval"].keys()
        for one in ("retrieval.engine=auto", "retrieval={engine: auto, cells_to_search: 3}")
    )
    assert auto == scann.index.recipe["retrieval"].keys()
    assert given == auto | {"cells_to_search"}
    first, second = config.search_quality.recipe()["settings"]
    assert first["cells_to_search"] == 3 and "cells_to_search" not in second


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("search_quality.settings=[]", "must have at least one entry"),
        ("search_quality.settings=[{name: a}, {name: a}]", "the name a is given twice"),
        ("search_quality.settings=[{name: a, num_reorder: 16}]", "num_reorder=16 must be more"),
        ("cost.engines=[]", "must have at least one entry"),
        ("analyze.ngram_orders=[2, 2]", "repeats an entry"),
        ("analyze.masses=[]", "must have at least one entry"),
        ("analyze.masses=[1.0]", "analyze.masses"),
    ],
)
def test_mistakes_are_named(override: str, said: str):
    with pytest.raises(ConfigError, match=".") as caught:
        _config(override)
    assert said in str(caught.value)
