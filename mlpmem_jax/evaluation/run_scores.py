"""Scores of a run's decoder, kNN-LM and memory, without its latency.

Suffixes: N rows of a split.
"""

from typing import Any

import jax

from mlpmem_jax.config.schema import Config
from mlpmem_jax.evaluation.evaluate_table import SplitScores, compare
from mlpmem_jax.evaluation.labels import StoredSplit
from mlpmem_jax.evaluation.memory_scores import Remembered, remember
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.retrieval.knn_lm import StoredKnn, read_labels
from mlpmem_jax.store.layout import Layout, Split
from mlpmem_jax.training.networks import check_interpolation, finished_decoder, finished_memory

EVALUATED: tuple[Split, ...] = ("valid", "test")


def remembered_splits(
    config: Config, decoder: Decoder, mesh: jax.sharding.Mesh
) -> dict[Split, Remembered]:
    """Returns what the memory gives the labels of validation and test, and its λ."""
    memory = finished_memory(config, mesh)
    check_interpolation(config, Layout(config).memory)
    return {split: remember(config, split, decoder, memory, mesh) for split in EVALUATED}


def score_run(config: Config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Compares the three systems, the kNN-LM with exact neighbours.

    Returns:
        What `compare` returns.
    """
    layout = Layout(config)
    decoder = finished_decoder(config, mesh)
    train_label = read_labels(layout, "train")
    stored = {split: StoredSplit.open(layout, split) for split in EVALUATED}
    neighbors = {
        split: StoredKnn(layout, split, stored[split].label_N, train_label) for split in EVALUATED
    }
    valid = stored["valid"]
    tuned = neighbors["valid"].tune(
        valid.counts.scored_N,
        valid.logprob_N,
        config.evaluate.knn_valid_rows,
        config.seed,
    )
    remembered = remembered_splits(config, decoder, mesh)
    scores = {
        split: SplitScores(
            one.counts,
            one.logprob_N,
            neighbors[split].logprob(one.counts.scored_N, tuned.temperature),
            remembered[split].logprob_N,
            memory_weight=remembered[split].weight,
        )
        for split, one in stored.items()
    }
    return compare(
        scores["valid"],
        scores["test"],
        temperature=tuned.temperature,
        temperature_at_bound=tuned.at_bound,
        bootstrap_samples=config.evaluate.bootstrap_samples,
        confidence=config.evaluate.confidence,
        seed=config.seed,
    )
