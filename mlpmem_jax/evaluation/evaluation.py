"""Evaluates a finished run: reads what the stages stored, scores, compares, measures."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mlpmem_jax.config.schema import Config
from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.datastore.layout import Layout, Split
from mlpmem_jax.datastore.store import open_array, read_rows
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.evaluation.compare import SplitScores, compare
from mlpmem_jax.evaluation.cost import costs
from mlpmem_jax.evaluation.knn_lm import StoredNeighbors, tune_knn_lm
from mlpmem_jax.evaluation.latency import retriever, time_tokens
from mlpmem_jax.evaluation.memory_lm import MemoryScores, SplitRows, score_memory
from mlpmem_jax.evaluation.metrics import DocumentCounts, count_documents
from mlpmem_jax.generation.interpolated import InterpolatedModel
from mlpmem_jax.models.decoder import Decoder, Site
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.retrieval.building import ExactCache, open_index
from mlpmem_jax.training.networks import finished_decoder, finished_memory

SCHEMA_VERSION = 1
_EVALUATED: tuple[Split, ...] = ("valid", "test")


def evaluate_run(config: Config, mesh: jax.sharding.Mesh) -> tuple[dict[str, Any], dict[str, Any]]:
    """Makes the table.

    Args:
        config: The whole configuration.
        mesh: Devices.

    Returns:
        What `evaluate.json` holds, and milliseconds per token of each system.

    Raises:
        ArtifactError: Something is missing, damaged, or speaks of other tokens.
    """
    layout = Layout(config)
    decoder, memory = finished_decoder(config, mesh), finished_memory(config, mesh)
    stored = {split: StoredSplit.open(layout, split) for split in _EVALUATED}
    train_label = _whole(layout, "train", "label")
    neighbors = {
        split: StoredNeighbors(layout, split, stored[split].label_N, train_label)
        for split in _EVALUATED
    }
    tuned = tune_knn_lm(
        neighbors["valid"],
        stored["valid"].counts.scored_N,
        stored["valid"].logprob_N,
        config.evaluate.knn_valid_rows,
        config.seed,
    )
    remembered = {
        split: memory_scores(config, layout, split, decoder, memory, mesh) for split in _EVALUATED
    }
    scores = {
        split: SplitScores(
            stored[split].counts,
            decoder_N=stored[split].logprob_N,
            knn_N=neighbors[split].logprob(stored[split].counts.scored_N, tuned.temperature),
            memory_N=remembered[split].logprob_N,
        )
        for split in _EVALUATED
    }
    results = {"schema_version": SCHEMA_VERSION} | compare(
        scores["valid"],
        scores["test"],
        temperature=tuned.temperature,
        bootstrap_samples=config.evaluate.bootstrap_samples,
        confidence=config.evaluate.confidence,
        seed=config.seed,
    )
    for system, cost in costs(config, decoder, memory).items():
        results["systems"][system] |= cost
    results["diagnostics"] = _diagnostics(scores, remembered["valid"])
    results["retrieval"] = _retrieval(config, layout)
    return results, _latency(config, layout, decoder, memory, train_label, results, mesh)


@dataclasses.dataclass(frozen=True)
class StoredSplit:
    """What `embed` stored of a split, and its documents."""

    label_N: np.ndarray
    logprob_N: np.ndarray
    counts: DocumentCounts

    @classmethod
    def open(cls, layout: Layout, split: Split) -> "StoredSplit":
        tokens = TokenSplit.open(layout.tokens, split)
        label_N = _whole(layout, split, "label")
        name = f"{layout.datastore(split).path} and {layout.tokens.path / split}"
        counts = count_documents(
            label_N,
            tokens.separator_id,
            tokens.document_offset,
            tokens.document_words,
            tokens.document_bytes,
            name=name,
        )
        if not counts.scored_N.any():
            raise ArtifactError(f"{layout.tokens.path / split}: no token to score")
        return cls(label_N, _whole(layout, split, "logprob"), counts)


def _whole(layout: Layout, split: Split, name: str) -> np.ndarray:
    store = open_array(layout.datastore(split).path / name)
    return read_rows(store, 0, store.shape[0])


def memory_scores(
    config: Config,
    layout: Layout,
    split: Split,
    decoder: Decoder,
    memory: Memory,
    mesh: jax.sharding.Mesh,
) -> MemoryScores:
    source = SplitRows(
        layout,
        split,
        config.datastore.chunk_rows,
        config.evaluate.batch_size,
        TokenSplit.open(layout.tokens, split).separator_id,
        # There are targets of validation rows; those of test rows are never made.
        with_targets=split == "valid",
    )
    tied = config.memory.head == "tied"
    head_VD = decoder.head_VD() if tied else None
    return score_memory(memory, head_VD, source, mesh, chunk_tokens=config.train.loss_chunk_tokens)


def _latency(
    config: Config,
    layout: Layout,
    decoder: Decoder,
    memory: Memory,
    train_label: np.ndarray,
    results: dict[str, Any],
    mesh: jax.sharding.Mesh,
) -> dict[str, Any]:
    """Returns milliseconds per token of each system, with λ and τ as they were chosen."""
    sites = {
        name: Site.of(getattr(config.datastore, name), config.decoder.num_layers)
        for name in ("key", "input")
    }
    memory_weight = results["systems"]["memory"]["interpolation"]
    alone, with_memory = (
        InterpolatedModel(decoder, each, site=sites["input"], weight=memory_weight, mesh=mesh)
        for each in (None, memory)
    )
    models = {"decoder": alone, "knn": alone, "memory": with_memory}
    knn = results["systems"]["knn"]
    retrieve = retriever(
        open_index(config, ExactCache(config))[0],
        train_label,
        config.retrieval.num_neighbors,
        knn["temperature"],
        knn["interpolation"],
    )
    return time_tokens(models, sites["key"], retrieve, config.evaluate.latency_tokens)


def _diagnostics(scores: Mapping[Split, SplitScores], valid_memory: MemoryScores) -> dict[str, Any]:
    """Returns numbers that explain the table, none of which is chosen by."""
    report: dict[str, Any] = {"valid_memory_against_targets": dict(valid_memory.diagnostics)}
    for split, one in scores.items():
        scored_N = one.counts.scored_N
        knn = one.knn_N[scored_N]
        report[split] = {
            "memory_alone_nats": float(-one.memory_N[scored_N].mean(dtype=np.float64)),
            "label_among_neighbors": float(np.isfinite(knn).mean()),
            "memory_better_than_decoder": float(
                (one.memory_N[scored_N] > one.decoder_N[scored_N]).mean()
            ),
        }
    return report


def _retrieval(config: Config, layout: Layout) -> dict[str, Any]:
    """Returns which engine searched, and how well, by the manifests."""
    index = layout.index.load()
    measured = {**layout.targets("train").load().measured, **index.measured}
    return {
        "engine": index.counts.get("engine", config.retrieval.engine),
        "num_neighbors": config.retrieval.num_neighbors,
        "recall": measured.get("recall"),
    }
