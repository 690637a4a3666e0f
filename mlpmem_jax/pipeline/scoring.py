"""Scores of a finished run: opens what a configuration names and hands it to `evaluation`."""

from collections.abc import Mapping
from typing import Any

import jax

from mlpmem_jax.console import say
from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.evaluation.cost import costs, datastore_bytes
from mlpmem_jax.evaluation.joint_lm import score_joint
from mlpmem_jax.evaluation.labels import StoredSplit
from mlpmem_jax.evaluation.memory_lm import Remembered, score_memory
from mlpmem_jax.evaluation.metrics import FITTED_GATE_NOTE
from mlpmem_jax.evaluation.run_scores import EVALUATED, RunScores, score_run
from mlpmem_jax.evaluation.timed_decoding import CompiledModel, System, make_search, time_tokens
from mlpmem_jax.generation.interpolated import InterpolatedModel
from mlpmem_jax.input.rows import StoredRows
from mlpmem_jax.models.decoder import Decoder, Site
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.pipeline import exact_sample
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.networks import finished_networks, separator_id
from mlpmem_jax.pipeline.settings import embedding_settings
from mlpmem_jax.pipeline.text_scores import text_scores
from mlpmem_jax.retrieval.index_builder import ExactCache, open_index
from mlpmem_jax.retrieval.key_shards import KeyShards
from mlpmem_jax.retrieval.knn_lm import StoredKnn, read_labels
from mlpmem_jax.store.array_specs import Split

SCHEMA_VERSION = 1


def stored_split(run: Artifacts, split: Split) -> StoredSplit:
    """Opens the labels of a split, and what the decoder gives them."""
    tokens = TokenSplit.open(run.tokens, split)
    return StoredSplit.open(tokens, run.datastore(split))


def stored_rows(run: Artifacts, split: Split, *, with_targets: bool) -> StoredRows:
    """Opens the stored inputs of a split, in order.

    Args:
        split: Which.
        with_targets: Whether the kNN targets are read too, for diagnostics.
    """
    config = run.config
    return StoredRows(
        run.datastore(split),
        config.datastore.chunk_rows,
        TokenSplit.open(run.tokens, split).separator_id,
        config.memory.num_read_tokens,
        targets=run.targets(split) if with_targets else None,
        batch_size=config.evaluate.batch_size,
    )


def memory_scores(
    run: Artifacts,
    split: Split,
    decoder: Decoder,
    memory: Memory,
    mesh: jax.sharding.Mesh,
    weight: float | None,
) -> Remembered:
    """Scores the memory on a split, with the decoder that it was trained beside or with.

    Args:
        split: Which.
        decoder: On the mesh.
        memory: On the mesh.
        weight: λ that a memory without a gate was trained with; None: it is to be chosen.
    """
    config = run.config
    limits: dict[str, Any] = {"chunk_tokens": config.train.loss_chunk_tokens, "weight": weight}
    if config.train.mode == "joint":
        tokens, settings = (
            TokenSplit.open(run.tokens, split),
            embedding_settings(config, ("input",)),
        )
        return score_joint(decoder, memory, tokens, settings, mesh, **limits)
    # There are targets of validation rows; those of test rows are never made.
    rows = stored_rows(run, split, with_targets=split == "valid")
    return score_memory(memory, decoder, rows, mesh, **limits)


def run_scores(
    run: Artifacts, decoder: Decoder, memory: Memory, mesh: jax.sharding.Mesh
) -> RunScores:
    """Scores the three systems, the kNN-LM with the neighbours that are stored.

    Raises:
        ArtifactError: Something is missing, damaged, or speaks of other tokens.
    """
    config = run.config
    stored = {split: stored_split(run, split) for split in EVALUATED}
    train_label = read_labels(run.datastore("train"))
    neighbors = {
        split: StoredKnn(run.neighbors(split), one.label_N, train_label)
        for split, one in stored.items()
    }
    weight = config.trained_interpolation
    remembered = {
        split: memory_scores(run, split, decoder, memory, mesh, weight) for split in EVALUATED
    }
    return score_run(stored, neighbors, remembered, config.evaluate.knn_valid_rows, config.seed)


def evaluate_run(run: Artifacts, mesh: jax.sharding.Mesh) -> tuple[dict[str, Any], dict[str, Any]]:
    """Makes the table.

    Returns:
        What `evaluate.json` holds, and milliseconds per token of each system.

    Raises:
        ArtifactError: Something is missing, damaged, or speaks of other tokens.
    """
    config = run.config
    decoder, memory = finished_networks(run, mesh, frozen=True)
    scored = run_scores(run, decoder, memory, mesh)
    results = {"schema_version": SCHEMA_VERSION} | scored.table(config.evaluate, config.seed)
    searched = datastore_bytes(run.datastore("train"), run.index)
    for system, cost in costs(decoder, memory, results["systems"], searched).items():
        results["systems"][system] |= cost
    if config.memory.gate == "fitted":
        results["notes"].append(FITTED_GATE_NOTE)
    results["diagnostics"] = scored.diagnostics()
    results["retrieval"] = _retrieval(run)
    if exact_sample.artifacts(run):
        test, train_label = stored_split(run, "test"), read_labels(run.datastore("train"))
        found = exact_sample.compared(run, test, results["systems"]["knn"], train_label)
        results["retrieval"]["exact_sample"] = found
    if run.corpus.held_out:
        results["texts"] = text_scores(run, results, decoder, memory, mesh)
    return results, _latency(run, decoder, memory, results["systems"], mesh)


def _retrieval(run: Artifacts) -> dict[str, Any]:
    """Returns which engine searched, and how well, by the manifests."""
    config, index = run.config, run.index.load()
    measured = {**run.targets("train").load().measured, **index.measured}
    return {
        "engine": index.counts.get("engine", config.retrieval.engine),
        "num_neighbors": config.retrieval.num_neighbors,
        "recall": measured.get("recall"),
        "of_targets": config.targets.min_recall is not None,
    }


def _latency(
    run: Artifacts,
    decoder: Decoder,
    memory: Memory,
    systems: Mapping[str, Mapping[str, Any]],
    mesh: jax.sharding.Mesh,
) -> dict[str, Any]:
    """Returns milliseconds per token of each system, with λ and τ as they were chosen.

    The kNN-LM is left out where its keys do not fit in memory: each token would load them all.
    """
    config, train = run.config, run.datastore("train")
    models = compiled_models(run, decoder, memory, systems, mesh)
    knn = systems["knn"]
    exact = ExactCache(train, config.retrieval, config.mesh)
    engine = open_index(run.index, config.retrieval, config.decoder.width, exact)[0]
    # The run's decoder and the one trained jointly have one shape, so the same time.
    timed = {name: System(models["decoder"]) for name in systems}
    timed["memory"] = System(models["memory"])
    if isinstance(engine, KeyShards):
        del timed["knn"]
        say(
            f"evaluate: the kNN-LM is not timed: memory holds {engine.plan.at_once} of "
            f"{engine.plan.num_shards} key shards at a time (retrieval.memory_bytes)"
        )
    else:
        about = config.retrieval.num_neighbors, knn["temperature"], knn["interpolation"]
        search = make_search(engine, read_labels(train), *about)
        timed["knn"] = System(models["decoder"], search)
    return time_tokens(timed, config.evaluate.latency_tokens)


def compiled_models(
    run: Artifacts,
    decoder: Decoder,
    memory: Memory,
    systems: Mapping[str, Mapping[str, Any]],
    mesh: jax.sharding.Mesh,
) -> dict[str, CompiledModel]:
    """Returns the decoder alone and with the memory, ready to be timed.

    Args:
        decoder: On the mesh.
        memory: On the mesh.
        systems: As in `evaluate.json`: λ of the kNN-LM and of the memory.
    """
    config = run.config
    key, read = (
        Site.of(site, config.decoder.num_layers)
        for site in (config.datastore.key, config.datastore.input)
    )
    weight = None
    if not config.memory.has_gate:
        weight = float(systems["memory"]["interpolation"])
    separator = separator_id(run)
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
