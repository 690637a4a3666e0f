"""Scores: what one model gives the labels of a split, stored so that tables are recombined
without running a network again.

Suffix: N rows of the split.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mlpmem_jax.config.data import DatastoreConfig
from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.embedding.embed import embed_split
from mlpmem_jax.evaluation.labels import whole_array
from mlpmem_jax.evaluation.memory_lm import score_memory
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.networks import finished_decoder, finished_memory, finished_networks
from mlpmem_jax.pipeline.scoring import memory_scores, stored_rows
from mlpmem_jax.pipeline.settings import embedding_settings
from mlpmem_jax.retrieval.knn_lm import StoredKnn, read_labels
from mlpmem_jax.stats.mixing import mixture_logprob
from mlpmem_jax.store.array_specs import Split, scores_arrays
from mlpmem_jax.store.manifest import Artifact, Completion
from mlpmem_jax.store.shards import ShardWriter
from mlpmem_jax.training.interpolation import at_step


def score_decoder(
    run: Artifacts, decoder: Decoder, split: Split, artifact: Artifact, mesh: jax.sharding.Mesh
) -> Completion:
    """Scores a decoder with the windows of `embed`; finished shards are skipped."""
    config = run.config
    tokens = TokenSplit.open(run.tokens, split)
    settings = embedding_settings(config)
    specs = scores_arrays(config.datastore)
    name = f"score {artifact.relative.removeprefix('scores/')}"
    arrays = embed_split(decoder, tokens, artifact, specs, settings, mesh, name)
    return Completion({"rows": tokens.num_rows}, arrays)


def score_memory_alone(
    run: Artifacts, memory: Memory, split: Split, artifact: Artifact, mesh: jax.sharding.Mesh
) -> Completion:
    """Scores a memory on the stored inputs of its datastore."""
    config = run.config
    decoder = finished_decoder(run, mesh, frozen=True) if config.memory.reads_decoder else None
    rows = stored_rows(run, split, with_targets=False)
    chunk_tokens = config.train.loss_chunk_tokens
    scores = score_memory(memory, decoder, rows, mesh, chunk_tokens=chunk_tokens)
    label_N = read_labels(run.datastore(split))
    return _written(config.datastore, artifact, scores.logprob_N, label_N, {})


def score_mixture(
    run: Artifacts,
    split: Split,
    artifact: Artifact,
    mesh: jax.sharding.Mesh,
    step: int | None = None,
) -> Completion:
    """Scores decoder and memory mixed by the λ that they were trained with.

    Args:
        step: Of a memory beside a frozen decoder, a step before its last; None: the last.
    """
    config = run.config
    decoder, memory = finished_networks(run, mesh, frozen=True)
    weight = config.trained_interpolation
    if step is not None:
        memory = finished_memory(run, mesh, step, frozen=True)
        train = at_step(config.train, step)
        weight = config.model_copy(update={"train": train}).trained_interpolation
    scores = memory_scores(run, split, decoder, memory, mesh, weight)
    assert scores.weight is not None
    decoder_N = scores.decoder_N
    if decoder_N is None:
        decoder_N = whole_array(run.datastore(split), "logprob")
    logprob_N = mixture_logprob(scores.logprob_N, decoder_N, scores.weight)
    tokens = TokenSplit.open(run.tokens, split)
    label_N = tokens.read(1, tokens.num_tokens)
    weight_N = np.broadcast_to(scores.weight, label_N.shape)[label_N != tokens.separator_id]
    counts = {"interpolation": float(np.mean(weight_N, dtype=np.float64))}
    return _written(config.datastore, artifact, logprob_N, label_N, counts)


def score_knn(
    run: Artifacts, split: Split, artifact: Artifact, *, by_index: bool, temperature: float | None
) -> Completion:
    """Scores the kNN distribution over all K neighbours.

    Args:
        by_index: Whether the neighbours are those that the engine of the index finds,
            rather than the exact ones.
        temperature: τ; None chooses it, together with λ, on this split.
    """
    config = run.config
    label_N = read_labels(run.datastore(split))
    train_label = read_labels(run.datastore("train"))
    found = run.neighbors_by_index(split) if by_index else run.neighbors(split)
    neighbors = StoredKnn(found, label_N, train_label)
    separator_id = TokenSplit.open(run.tokens, split).separator_id
    scored_N = label_N != separator_id
    counts: dict[str, Any] = {}
    if temperature is None:
        decoder_N = whole_array(run.datastore(split), "logprob")
        most = config.evaluate.knn_valid_rows
        tuned = neighbors.tune(scored_N, decoder_N, most, config.seed)
        temperature = tuned.temperature
        counts["temperature_at_bound"] = tuned.at_bound
    # No neighbour of a row may hold its label: −inf, which is a score like any other.
    logprob_N = neighbors.logprob(scored_N, temperature)
    counts["temperature"] = temperature
    return _written(config.datastore, artifact, logprob_N, label_N, counts)


def _written(
    store: DatastoreConfig,
    artifact: Artifact,
    logprob_N: np.ndarray,
    label_N: np.ndarray,
    counts: Mapping[str, Any],
) -> Completion:
    writer = ShardWriter(artifact.path, scores_arrays(store), len(label_N), refuse_non_finite=False)
    for rows in writer.own_rows():
        part = {"logprob": logprob_N[rows].astype(np.float32), "label": label_N[rows]}
        writer.put(rows.start, part)
    return Completion({"rows": len(label_N), **counts}, writer.close())
