"""Sparse targets of a split's rows, from neighbours that are kept or searched for."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlpmem_jax.config.data import DatastoreConfig, TargetsConfig
from mlpmem_jax.config.stages import TUNING_ROWS
from mlpmem_jax.console import say
from mlpmem_jax.parallel.multihost import first_alone, is_writer
from mlpmem_jax.retrieval.distributions import sparse_distributions
from mlpmem_jax.retrieval.engine import StoredKeys
from mlpmem_jax.retrieval.knn_lm import StoredKnn, read_labels
from mlpmem_jax.retrieval.merge import Neighbors
from mlpmem_jax.retrieval.neighbors import Consume, StoredNeighbors
from mlpmem_jax.retrieval.search import Search
from mlpmem_jax.retrieval.target_sink import TargetSink, share_of_rows
from mlpmem_jax.retrieval.temperature import Tuned
from mlpmem_jax.store.checked_json import read_checked_json, write_checked_json
from mlpmem_jax.store.manifest import Artifact, Completion
from mlpmem_jax.store.stored_array import StoredArray

TEMPERATURE = "temperature.json"


@dataclasses.dataclass(frozen=True)
class TargetInputs:
    """What targets are made from besides training rows and their neighbours.

    Attributes:
        valid: The datastore of the validation rows, on which τ is chosen.
        valid_neighbors: Their neighbours.
        chunking: How arrays are cut: as those of the datastore.
    """

    tokens: Artifact
    valid: Artifact
    valid_neighbors: Artifact
    targets: TargetsConfig
    chunking: DatastoreConfig


def make_train_targets(
    artifact: Artifact, inputs: TargetInputs, search: Search, kept: Artifact | None = None
) -> Completion:
    """Makes the targets of training rows: τ first, then a search unless neighbours are kept.

    Args:
        artifact: Where they go.
        inputs: What they are made from.
        search: What is searched, and how.
        kept: Neighbours of the training rows; None: they are searched for.
    """
    label_N = read_labels(search.train)
    share = share_of_rows(inputs.targets, inputs.tokens, label_N, search.seed)
    tuned = _temperature(artifact, inputs, label_N, search.seed)
    search.check_rows()
    sink = TargetSink(
        artifact, "train", inputs.tokens, inputs.targets, inputs.chunking, label_N, share
    )
    consume = _consume(sink, label_N, tuned.temperature)
    measured: dict[str, Any] = _about(tuned)
    if kept is not None:
        measured |= _search_numbers(kept.load().measured)
        _take_stored(sink, consume, StoredNeighbors(kept))
    else:
        engine, about = search.measured_engine(inputs.targets.min_recall)
        measured |= about
        keys = StoredKeys(search.train)
        measured |= search.search_split(engine, keys, "train", sink.writer, consume, share)
    search.exact.release()
    return sink.finish(measured, {"temperature": tuned.temperature})


def make_valid_targets(
    artifact: Artifact, inputs: TargetInputs, train: Artifact, train_targets: Artifact
) -> Completion:
    """Makes the targets of validation rows from their kept neighbours, with train's τ.

    Args:
        artifact: Where they go.
        inputs: What they are made from.
        train: The datastore of the training rows.
        train_targets: Targets of these.
    """
    temperature = float(train_targets.load().counts["temperature"])
    label_N, train_label_N = read_labels(inputs.valid), read_labels(train)
    sink = TargetSink(artifact, "valid", inputs.tokens, inputs.targets, inputs.chunking, label_N)
    consume = _consume(sink, train_label_N, temperature)
    _take_stored(sink, consume, StoredNeighbors(inputs.valid_neighbors))
    return sink.finish({}, {"temperature": temperature})


def _consume(sink: TargetSink, train_label_N: np.ndarray, temperature: float) -> Consume:
    """Returns what turns neighbours into the arrays of targets."""

    def consume(row_Q: np.ndarray, found: Neighbors) -> Mapping[str, np.ndarray]:
        made = sparse_distributions(
            found.distance_QK,
            train_label_N[np.maximum(found.row_QK, 0)],
            temperature,
            sink.num_tokens,
        )
        return sink.arrays(row_Q, made)

    return consume


def _take_stored(sink: TargetSink, consume: Consume, stored: StoredNeighbors) -> None:
    """Makes targets of neighbours that lie on disk."""
    for rows in sink.writer.own_rows():
        found = stored.read(rows.start, rows.stop)
        sink.writer.put(rows.start, consume(np.arange(rows.start, rows.stop), found))
    sink.writer.close()


def _temperature(
    artifact: Artifact, inputs: TargetInputs, train_label_N: np.ndarray, seed: int
) -> Tuned:
    """Returns τ, given or chosen on validation; what was chosen is kept for a later start."""
    file = artifact.path / TEMPERATURE
    with first_alone("targets: temperature"):
        if is_writer() and not file.exists():
            write_checked_json(file, dataclasses.asdict(_tuned(inputs, train_label_N, seed)))
    return Tuned(**read_checked_json(file))


def _tuned(inputs: TargetInputs, train_label_N: np.ndarray, seed: int) -> Tuned:
    """Chooses τ, or λ for the τ that is given."""
    separator_id = int(inputs.tokens.load().counts["separator_id"])
    label_N = read_labels(inputs.valid)
    knn = StoredKnn(inputs.valid_neighbors, label_N, train_label_N)
    logprob_N = StoredArray(inputs.valid, "logprob").read_all()
    asked = inputs.targets.temperature
    tuned = knn.tune(
        label_N != separator_id,
        logprob_N,
        TUNING_ROWS,
        seed,
        None if asked == "auto" else asked,
    )
    how = "chosen on validation" if asked == "auto" else "given"
    say(
        f"targets: temperature {tuned.temperature:g} ({how}); kNN-LM on validation "
        f"{tuned.nats:.4f} nats at weight {tuned.weight:.3f}, decoder {tuned.decoder_nats:.4f}"
    )
    return tuned


def _about(tuned: Tuned) -> dict[str, Any]:
    return {
        "knn_lm_weight": tuned.weight,
        "knn_lm_valid_nats": tuned.nats,
        "decoder_valid_nats": tuned.decoder_nats,
    }


def _search_numbers(measured: Mapping[str, Any]) -> dict[str, Any]:
    names = ("engine", "recall", "recall_queries", "queries_per_sec")
    return {name: measured[name] for name in names if name in measured}
