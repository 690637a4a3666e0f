"""Sparse targets of a split's rows, from neighbours that are kept or searched for."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlpmem_jax.config.data import DatastoreConfig, TargetsConfig
from mlpmem_jax.config.stages import TUNING_ROWS
from mlpmem_jax.console import say
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.parallel.agreement import of_all
from mlpmem_jax.parallel.multihost import first_alone, is_writer
from mlpmem_jax.parallel.sharing import share_of
from mlpmem_jax.retrieval.distributions import sparse_distributions, without_targets
from mlpmem_jax.retrieval.engine import StoredKeys
from mlpmem_jax.retrieval.knn_lm import StoredKnn, read_labels
from mlpmem_jax.retrieval.merge import Neighbors
from mlpmem_jax.retrieval.neighbors import StoredNeighbors
from mlpmem_jax.retrieval.search import Search
from mlpmem_jax.retrieval.temperature import Tuned
from mlpmem_jax.store.array_specs import Split, targets_arrays
from mlpmem_jax.store.arrays import open_array, read_rows
from mlpmem_jax.store.checked_json import read_checked_json, write_checked_json
from mlpmem_jax.store.manifest import Artifact, Completion
from mlpmem_jax.store.shards import ShardWriter
from mlpmem_jax.store.stored_array import StoredArray

TEMPERATURE = "temperature.json"


@dataclasses.dataclass(frozen=True)
class TargetInputs:
    """What targets are made from besides training rows and their neighbours.

    Attributes:
        tokens: The token stream.
        valid: The datastore of the validation rows, on which τ is chosen.
        valid_neighbors: Their exact neighbours.
        targets: The section.
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
    tuned = _temperature(artifact, inputs, label_N, search.seed)
    search.check_rows()
    sink = _TargetSink(artifact, "train", inputs, label_N, label_N, tuned.temperature)
    measured: dict[str, Any] = _about(tuned)
    if kept is not None:
        measured |= _search_numbers(kept.load().measured)
        sink.take_stored(StoredNeighbors(kept))
    else:
        engine, about = search.measured_engine()
        measured |= about
        keys = StoredKeys(search.train)
        measured |= search.search_split(engine, keys, "train", sink.writer, sink.consume)
    search.exact.release()
    return sink.finish(measured)


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
    labels = read_labels(inputs.valid), read_labels(train)
    sink = _TargetSink(artifact, "valid", inputs, *labels, temperature)
    sink.take_stored(StoredNeighbors(inputs.valid_neighbors))
    return sink.finish({})


class _TargetSink:
    """Turns neighbours into targets and writes them."""

    def __init__(
        self,
        artifact: Artifact,
        split: Split,
        inputs: TargetInputs,
        label_N: np.ndarray,
        train_label_N: np.ndarray,
        temperature: float,
    ):
        tokens = inputs.tokens.load().counts
        self._artifact, self._split, self._temperature = artifact, split, temperature
        self._num_tokens = inputs.targets.num_tokens
        self._separator_id = int(tokens["separator_id"])
        self._label_N, self._train_label_N = label_N, train_label_N
        specs = targets_arrays(inputs.chunking, inputs.targets, int(tokens["vocab_size"]))
        self.writer = ShardWriter(artifact.path, specs, len(label_N))

    def consume(self, row_Q: np.ndarray, found: Neighbors) -> Mapping[str, np.ndarray]:
        """Returns the targets of rows; those that are never scored have none."""
        label_Q = self._label_N[row_Q]
        made = sparse_distributions(
            found.distance_QK,
            self._train_label_N[np.maximum(found.row_QK, 0)],
            self._temperature,
            self._num_tokens,
        )
        made = without_targets(made, label_Q != self._separator_id)
        return {"id": made.id_QS, "prob": made.prob_QS, "mass": made.mass_Q, "label": label_Q}

    def take_stored(self, stored: StoredNeighbors) -> None:
        """Makes targets of neighbours that lie on disk."""
        for rows in self.writer.own_rows():
            found = stored.read(rows.start, rows.stop)
            self.writer.put(rows.start, self.consume(np.arange(rows.start, rows.stop), found))
        self.writer.close()

    def finish(self, measured: Mapping[str, Any]) -> Completion:
        """Returns what the manifest says; targets are counted in what was written.

        Raises:
            ArtifactError: No scored row has a target: there is nothing to train on.
        """
        arrays = self.writer.describe()
        scored = int((self._label_N != self._separator_id).sum())
        mass = open_array(self._artifact.path / "mass")
        own = map(self.writer.rows_of, share_of(range(self.writer.num_shards)))
        counted = (np.count_nonzero(read_rows(mass, part.start, part.stop) > 0) for part in own)
        with_target = sum(of_all(sum(map(int, counted))))
        if scored and not with_target:
            raise ArtifactError(
                f"{self._artifact.path}: none of {scored:,} rows has a neighbour at a finite "
                "distance, so there is no target; are the keys too large for float32?"
            )
        if with_target < scored:
            say(
                f"warning: {scored - with_target:,} of {scored:,} rows of {self._split} have no "
                "neighbour and so no target; the memory learns their labels alone"
            )
        counts = {
            "rows": len(self._label_N),
            "rows_with_target": with_target,
            "temperature": self._temperature,
        }
        return Completion(counts, arrays, measured=measured)


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
