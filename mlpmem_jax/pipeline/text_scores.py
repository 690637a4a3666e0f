"""Scores on the first text, and on appended text that is held out, each apart."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.evaluation.evaluate_table import SplitScores
from mlpmem_jax.evaluation.labels import StoredSplit
from mlpmem_jax.evaluation.memory_lm import score_memory
from mlpmem_jax.evaluation.run_scores import EVALUATED
from mlpmem_jax.input.rows import StoredRows
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.pipeline.changed import neighbors_of, rows_of, tokens_of
from mlpmem_jax.pipeline.corpus_record import HeldOut
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.retrieval.knn_lm import StoredKnn, read_labels


def text_scores(
    run: Artifacts,
    results: Mapping[str, Any],
    decoder: Decoder,
    memory: Memory,
    mesh: jax.sharding.Mesh,
) -> list[dict[str, Any]]:
    """Returns documents, tokens and nats of every system, of each text apart.

    Args:
        run: The artifacts of the configuration.
        results: What `evaluate.json` holds of the first text: its nats, and λ and τ, which were
            chosen on its validation split and hold for all texts.
        decoder: On the mesh.
        memory: On the mesh.
        mesh: Devices.
    """
    systems = results["systems"]
    first = [
        {
            "text": f"first text, {split}",
            "documents": results[split]["documents"],
            "tokens": results[split]["tokens"],
            "nats": {key: found[f"{split}_nats"] for key, found in systems.items()},
        }
        for split in EVALUATED
    ]
    train_label = read_labels(run.datastore("train"))
    appended = []
    for held in run.corpus.held_out:
        scores = _scores(run, held, systems, train_label, decoder, memory, mesh)
        appended.append({"text": f"appended text, {held.name}", **_numbers(scores, systems)})
    return first + appended


def _scores(
    run: Artifacts,
    held: HeldOut,
    systems: Mapping[str, Any],
    train_label: np.ndarray,
    decoder: Decoder,
    memory: Memory,
    mesh: jax.sharding.Mesh,
) -> SplitScores:
    config, rows = run.config, rows_of(run, held)
    tokens = TokenSplit.open(tokens_of(run, held), "test")
    stored = StoredSplit.open(tokens, rows)
    knn = StoredKnn(neighbors_of(run, held), stored.label_N, train_label)
    inputs = StoredRows(
        rows,
        config.datastore.chunk_rows,
        tokens.separator_id,
        config.memory.num_read_tokens,
        batch_size=config.evaluate.batch_size,
    )
    remembered = score_memory(
        memory,
        decoder,
        inputs,
        mesh,
        chunk_tokens=config.train.loss_chunk_tokens,
        weight=config.trained_interpolation,
    )
    return SplitScores(
        stored.counts,
        decoder_N=stored.logprob_N,
        knn_N=knn.logprob(stored.counts.scored_N, systems["knn"]["temperature"]),
        memory_N=remembered.logprob_N,
        memory_weight=remembered.weight,
    )


def _numbers(scores: SplitScores, systems: Mapping[str, Any]) -> dict[str, Any]:
    nats = {}
    for key, system in scores.systems.items():
        weight_M = np.ones(1)
        if len(system.parts) > 1:
            weight = systems[key]["interpolation"]
            weight_M = np.asarray([1.0 - weight, weight])
        total = scores.parts.nats_by_document(system, weight_M).sum()
        nats[key] = float(total / scores.counts.tokens_D.sum())
    totals = scores.counts.totals
    return {"documents": totals["documents"], "tokens": totals["tokens"], "nats": nats}
