"""Evaluates a finished run: reads what the stages stored, scores, compares, measures."""

import functools
from typing import Any

import jax
import numpy as np

from mlpmem_jax.config.schema import Config
from mlpmem_jax.evaluation.cost import costs
from mlpmem_jax.evaluation.latency import compiled_models, time_tokens
from mlpmem_jax.evaluation.run_scores import RunScores, score_run
from mlpmem_jax.evaluation.timed_decoding import System, make_search
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.retrieval.index_builder import exact_engine, open_index
from mlpmem_jax.retrieval.knn_lm import read_labels
from mlpmem_jax.store.layout import Layout

SCHEMA_VERSION = 1


def evaluate_run(
    config: Config, decoder: Decoder, memory: Memory, mesh: jax.sharding.Mesh
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Makes the table.

    Args:
        config: The whole configuration.
        decoder: On the mesh.
        memory: On the mesh.
        mesh: Devices.

    Returns:
        What `evaluate.json` holds, and milliseconds per token of each system.

    Raises:
        ArtifactError: Something is missing, damaged, or speaks of other tokens.
    """
    layout = Layout(config)
    scored = score_run(config, decoder, memory, mesh)
    results = {"schema_version": SCHEMA_VERSION} | scored.table(config)
    for system, cost in costs(config, decoder, memory, results["systems"]).items():
        results["systems"][system] |= cost
    results["diagnostics"] = _diagnostics(scored)
    results["retrieval"] = _retrieval(config, layout)
    return results, _latency(config, layout, decoder, memory, results, mesh)


def _latency(
    config: Config,
    layout: Layout,
    decoder: Decoder,
    memory: Memory,
    results: dict[str, Any],
    mesh: jax.sharding.Mesh,
) -> dict[str, Any]:
    """Returns milliseconds per token of each system, with λ and τ as they were chosen."""
    models = compiled_models(config, decoder, memory, results["systems"], mesh)
    knn = results["systems"]["knn"]
    train, retrieval = layout.datastore("train"), config.retrieval
    exact = functools.partial(exact_engine, train, mesh, retrieval.key_chunk_rows)
    search = make_search(
        open_index(layout.index, retrieval, config.decoder.width, exact)[0],
        read_labels(train),
        retrieval.num_neighbors,
        knn["temperature"],
        knn["interpolation"],
    )
    # The run's decoder and the one trained jointly have one shape, so the same time.
    systems = {name: System(models["decoder"]) for name in results["systems"]}
    systems |= {"knn": System(models["decoder"], search), "memory": System(models["memory"])}
    return time_tokens(systems, config.evaluate.latency_tokens)


def _diagnostics(scored: RunScores) -> dict[str, Any]:
    """Returns numbers that explain the table, none of which is chosen by."""
    report: dict[str, Any] = {"valid_memory_against_targets": dict(scored.against_targets)}
    for split, one in scored.splits.items():
        scored_N = one.counts.scored_N
        knn = one.knn_N[scored_N]
        beside_N = one.parts("memory")[1]
        report[split] = {
            "memory_alone_nats": float(-one.memory_N[scored_N].mean(dtype=np.float64)),
            "decoder_beside_memory_nats": float(-beside_N[scored_N].mean(dtype=np.float64)),
            "label_among_neighbors": float(np.isfinite(knn).mean()),
            "memory_better_than_decoder": float(
                (one.memory_N[scored_N] > beside_N[scored_N]).mean()
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
