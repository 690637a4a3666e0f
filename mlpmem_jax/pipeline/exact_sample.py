"""Exact neighbours of some rows of test, where the index finds those of valid and test.

They say what it costs the explicit kNN-LM that its neighbours are approximate.
"""

from typing import TYPE_CHECKING, Any

import numpy as np

from mlpmem_jax.pipeline import recipes
from mlpmem_jax.store.manifest import Artifact, Completion

if TYPE_CHECKING:
    from collections.abc import Mapping

    from mlpmem_jax.evaluation.labels import StoredSplit
    from mlpmem_jax.pipeline.graph import Artifacts
    from mlpmem_jax.retrieval.index_builder import ExactCache


def artifacts(run: "Artifacts") -> list[Artifact]:
    """Returns the artifact, or none where all neighbours of valid and test are exact."""
    if run.config.retrieval.exact_rows == "all" or run.corpus.changes:
        return []
    recipe = recipes.exact_sample(run.config)
    searched = run.datastore("train"), run.datastore("test")
    return [Artifact.of(run.store, "neighbors", recipe, searched, "neighbors/test-exact")]


def neighbors_of_test(run: "Artifacts") -> list[Artifact]:
    """Returns all neighbours of test rows: they serve tables alone."""
    return [run.neighbors("test"), *artifacts(run)]


def _drawn(run: "Artifacts") -> np.ndarray:
    """Returns the rows of test that are searched exactly, int64 ascending."""
    from mlpmem_jax.retrieval.knn_lm import draw_rows

    count = run.config.retrieval.exact_rows
    assert count != "all"
    num_rows = int(run.datastore("test").load().counts["rows"])
    return draw_rows(np.ones(num_rows, bool), count, run.config.seed)


def build(run: "Artifacts", artifact: Artifact, exact: "ExactCache") -> Completion:
    """Searches exactly for the rows that are drawn.

    Args:
        run: The artifacts of the configuration.
        artifact: Where the neighbours go.
        exact: Exact search among the training rows.
    """
    from mlpmem_jax.retrieval.engine import ArrayKeys, StoredKeys
    from mlpmem_jax.retrieval.search import Search, keep_neighbors

    config, rows = run.config, run.datastore("test")
    keys = ArrayKeys(StoredKeys(rows).take(_drawn(run)), str(rows.path))
    search = Search(run.datastore("train"), None, exact, config.retrieval, config.seed, run.tokens)
    return keep_neighbors(artifact, rows, "test", config.datastore, search, keys)


def compared(
    run: "Artifacts", test: "StoredSplit", knn: "Mapping[str, Any]", train_label: np.ndarray
) -> dict[str, Any] | None:
    """Returns what exact neighbours would change, on the rows that are drawn.

    Args:
        run: The artifacts of the configuration.
        test: Labels of the split, and what the decoder gives them.
        knn: What the table holds of the kNN-LM: its λ and τ.
        train_label: Labels of the training rows.

    Returns:
        Scored rows among them, recall of the neighbours that the index found for these, and the
        nats per token that it costs, with an interval; None: all neighbours are exact, or none of
        the rows is scored.
    """
    from mlpmem_jax.evaluation.run_scores import difference_of_rows
    from mlpmem_jax.retrieval.knn_lm import StoredKnn
    from mlpmem_jax.retrieval.neighbors import StoredNeighbors
    from mlpmem_jax.retrieval.recall import recall
    from mlpmem_jax.stats.mixing import mixture_logprob

    for artifact in artifacts(run):
        found, drawn_Q = StoredNeighbors(run.neighbors("test")), _drawn(run)
        is_scored_Q = test.counts.scored_N[drawn_Q]
        row_Q = drawn_Q[is_scored_Q]
        if not len(row_Q):
            return None
        is_scored_N = np.zeros(len(test.label_N), bool)
        is_scored_N[row_Q] = True
        by_index = StoredKnn(run.neighbors("test"), test.label_N, train_label)
        by_all = StoredKnn(artifact, test.label_N[drawn_Q], train_label)
        index_Q, exact_Q = (
            mixture_logprob(each, test.logprob_N[row_Q], knn["interpolation"])
            for each in (
                by_index.logprob(is_scored_N, knn["temperature"])[row_Q],
                by_all.logprob(is_scored_Q, knn["temperature"])[is_scored_Q],
            )
        )
        config = run.config
        costs = difference_of_rows(
            test.counts, row_Q, exact_Q - index_Q, config.evaluate, config.seed
        )
        truth = StoredNeighbors(artifact).take(np.flatnonzero(is_scored_Q))
        return {
            "rows": len(row_Q),
            "recall": recall(found.take(row_Q), truth),
            "costs_nats": costs,
        }
    return None
