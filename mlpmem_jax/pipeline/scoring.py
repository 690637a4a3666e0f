"""Scores of a finished run: opens what a configuration names and hands it to `evaluation`."""

from collections.abc import Mapping
from typing import Any

import jax

from mlpmem_jax.config.schema import Config
from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.embedding.blocks import EmbeddingSettings
from mlpmem_jax.evaluation.cost import costs, datastore_bytes
from mlpmem_jax.evaluation.joint_lm import TokenWindows
from mlpmem_jax.evaluation.labels import StoredSplit
from mlpmem_jax.evaluation.latency import time_tokens
from mlpmem_jax.evaluation.memory_scores import Remembered, remember
from mlpmem_jax.evaluation.run_scores import EVALUATED, RunScores, score_run
from mlpmem_jax.evaluation.timed_decoding import CompiledModel, System, make_search
from mlpmem_jax.generation.interpolated import InterpolatedModel
from mlpmem_jax.input.rows import StoredRows
from mlpmem_jax.models.decoder import Decoder, Site
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.retrieval.index_builder import ExactCache, open_index
from mlpmem_jax.retrieval.knn_lm import StoredKnn, read_labels
from mlpmem_jax.store.array_specs import Split
from mlpmem_jax.store.layout import Layout
from mlpmem_jax.training.networks import finished_networks, separator_id

SCHEMA_VERSION = 1


def stored_split(config: Config, split: Split) -> StoredSplit:
    """Opens the labels of a split, and what the decoder gives them."""
    layout = Layout(config)
    tokens = TokenSplit.open(layout.tokens, split)
    return StoredSplit.open(tokens, layout.datastore(split))


def stored_rows(config: Config, split: Split, *, with_targets: bool) -> StoredRows:
    """Opens the stored inputs of a split, in order.

    Args:
        config: The whole configuration.
        split: Which.
        with_targets: Whether the kNN targets are read too, for diagnostics.
    """
    layout = Layout(config)
    return StoredRows(
        layout,
        split,
        config.datastore.chunk_rows,
        TokenSplit.open(layout.tokens, split).separator_id,
        config.memory.num_read_tokens,
        batch_size=config.evaluate.batch_size,
        with_targets=with_targets,
    )


def memory_scores(
    config: Config, split: Split, decoder: Decoder, memory: Memory, mesh: jax.sharding.Mesh
) -> Remembered:
    """Scores the memory on a split, with the decoder that it was trained beside or with."""
    inputs: StoredRows | TokenWindows
    if config.train.mode == "joint":
        tokens = TokenSplit.open(Layout(config).tokens, split)
        inputs = TokenWindows(tokens, EmbeddingSettings.of(config, ("input",)))
    else:  # There are targets of validation rows; those of test rows are never made.
        inputs = stored_rows(config, split, with_targets=split == "valid")
    return remember(
        decoder,
        memory,
        inputs,
        mesh,
        chunk_tokens=config.train.loss_chunk_tokens,
        weight=config.trained_interpolation,
    )


def run_scores(
    config: Config, decoder: Decoder, memory: Memory, mesh: jax.sharding.Mesh
) -> RunScores:
    """Scores the three systems, the kNN-LM with exact neighbours.

    Raises:
        ArtifactError: Something is missing, damaged, or speaks of other tokens.
    """
    layout = Layout(config)
    stored = {split: stored_split(config, split) for split in EVALUATED}
    train_label = read_labels(layout, "train")
    neighbors = {
        split: StoredKnn(layout, split, one.label_N, train_label) for split, one in stored.items()
    }
    remembered = {split: memory_scores(config, split, decoder, memory, mesh) for split in EVALUATED}
    return score_run(stored, neighbors, remembered, config.evaluate.knn_valid_rows, config.seed)


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
    decoder, memory = finished_networks(config, mesh)
    scored = run_scores(config, decoder, memory, mesh)
    results = {"schema_version": SCHEMA_VERSION} | scored.table(config.evaluate, config.seed)
    searched = datastore_bytes(layout.datastore("train"), layout.index)
    for system, cost in costs(decoder, memory, results["systems"], searched).items():
        results["systems"][system] |= cost
    results["diagnostics"] = scored.diagnostics()
    results["retrieval"] = _retrieval(config, layout)
    return results, _latency(config, decoder, memory, results["systems"], mesh)


def _retrieval(config: Config, layout: Layout) -> dict[str, Any]:
    """Returns which engine searched, and how well, by the manifests."""
    index = layout.index.load()
    measured = {**layout.targets("train").load().measured, **index.measured}
    return {
        "engine": index.counts.get("engine", config.retrieval.engine),
        "num_neighbors": config.retrieval.num_neighbors,
        "recall": measured.get("recall"),
    }


def _latency(
    config: Config,
    decoder: Decoder,
    memory: Memory,
    systems: Mapping[str, Mapping[str, Any]],
    mesh: jax.sharding.Mesh,
) -> dict[str, Any]:
    """Returns milliseconds per token of each system, with λ and τ as they were chosen."""
    models = compiled_models(config, decoder, memory, systems, mesh)
    knn = systems["knn"]
    search = make_search(
        open_index(config, ExactCache(config))[0],
        read_labels(Layout(config), "train"),
        config.retrieval.num_neighbors,
        knn["temperature"],
        knn["interpolation"],
    )
    # The run's decoder and the one trained jointly have one shape, so the same time.
    timed = {name: System(models["decoder"]) for name in systems}
    timed |= {"knn": System(models["decoder"], search), "memory": System(models["memory"])}
    return time_tokens(timed, config.evaluate.latency_tokens)


def compiled_models(
    config: Config,
    decoder: Decoder,
    memory: Memory,
    systems: Mapping[str, Mapping[str, Any]],
    mesh: jax.sharding.Mesh,
) -> dict[str, CompiledModel]:
    """Returns the decoder alone and with the memory, ready to be timed.

    Args:
        config: The whole configuration.
        decoder: On the mesh.
        memory: On the mesh.
        systems: As in `evaluate.json`: λ of the kNN-LM and of the memory.
        mesh: Devices.
    """
    key, read = (
        Site.of(site, config.decoder.num_layers)
        for site in (config.datastore.key, config.datastore.input)
    )
    weight = None
    if config.memory.gate != "learned":
        weight = float(systems["memory"]["interpolation"])
    separator = separator_id(config)
    return {
        name: CompiledModel(
            InterpolatedModel(
                decoder, each, site=read, weight=weight, separator=separator, mesh=mesh
            ),
            key,
            float(systems["knn"]["interpolation"]),
        )
        for name, each in (("decoder", None), ("memory", memory))
    }
