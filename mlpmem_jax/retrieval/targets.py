"""Making the artifacts of `retrieve`: kept neighbours and sparse targets of a split."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlpmem_jax.config.schema import Config
from mlpmem_jax.config.stages import TUNING_ROWS
from mlpmem_jax.console import say
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.parallel.agreement import of_all
from mlpmem_jax.parallel.multihost import first_alone, is_writer
from mlpmem_jax.parallel.sharing import share_of
from mlpmem_jax.retrieval import recall
from mlpmem_jax.retrieval.distributions import (
    sparse_distributions,
    without_targets,
)
from mlpmem_jax.retrieval.engine import Engine, StoredKeys
from mlpmem_jax.retrieval.index_builder import MEASUREMENT_SEED, ExactCache, open_index
from mlpmem_jax.retrieval.knn_lm import StoredKnn, read_labels
from mlpmem_jax.retrieval.merge import Neighbors
from mlpmem_jax.retrieval.neighbors import StoredNeighbors, check_enough_rows, search_split
from mlpmem_jax.retrieval.temperature import Tuned
from mlpmem_jax.store.array_specs import ArraySpec, Split, neighbors_arrays, targets_arrays
from mlpmem_jax.store.arrays import open_array, read_rows
from mlpmem_jax.store.checked_json import read_checked_json, write_checked_json
from mlpmem_jax.store.layout import Layout
from mlpmem_jax.store.manifest import Artifact, Completion
from mlpmem_jax.store.shards import ShardWriter
from mlpmem_jax.store.stored_array import StoredArray

TEMPERATURE = "temperature.json"


def keep_neighbors(
    config: Config, split: Split, exact: ExactCache, *, by_index: bool = False
) -> Completion:
    """Finds and stores the neighbours of a split among the training rows.

    Valid and test exactly, unless `by_index` (then into an artifact of their own); train by
    the engine of the index, each row's own excluded.
    """
    layout = Layout(config)
    _check_same_origin(layout, split)
    keys = StoredKeys(layout.datastore(split))
    _check_rows(config)
    artifact = layout.neighbors_by_index(split) if by_index else layout.neighbors(split)
    writer = _writer(
        artifact, neighbors_arrays(config.datastore, config.retrieval.num_neighbors), keys.num_rows
    )
    measured: dict[str, Any] = {"engine": "exact"}
    engine: Engine
    if split == "train" or by_index:
        train_keys = StoredKeys(layout.datastore("train"))
        # Targets must be good; a baseline is what it is, and its recall is reported.
        engine, about = _measured_engine(config, exact, train_keys, must_suffice=not by_index)
        measured |= about
    else:
        engine = exact()

    def consume(row_Q: np.ndarray, found: Neighbors) -> Mapping[str, np.ndarray]:
        del row_Q
        return {"row": found.row_QK, "distance": found.distance_QK}

    measured |= _search(config, split, engine, keys, writer, consume)
    return Completion({"rows": keys.num_rows}, writer.describe(), measured=measured)


def make_train_targets(config: Config, exact: ExactCache) -> Completion:
    """Makes the targets of training rows: τ first, then a search unless neighbours are kept."""
    layout = Layout(config)
    tuned = _temperature(config)
    _check_rows(config)
    keys = StoredKeys(layout.datastore("train"))
    sink = _TargetSink(config, "train", tuned.temperature)
    measured: dict[str, Any] = _about(tuned)
    if config.retrieval.keep_train == "all":
        measured |= _search_numbers(layout.neighbors("train").load().measured)
        sink.take_stored(StoredNeighbors(layout.neighbors("train")))
    else:
        engine, about = _measured_engine(config, exact, keys)
        measured |= about
        measured |= _search(config, "train", engine, keys, sink.writer, sink.consume)
    exact.release()
    return sink.finish(measured)


def make_valid_targets(config: Config) -> Completion:
    """Makes the targets of validation rows from their kept neighbours, with train's τ."""
    layout = Layout(config)
    made = layout.targets("train").load()
    sink = _TargetSink(config, "valid", float(made.counts["temperature"]))
    sink.take_stored(StoredNeighbors(layout.neighbors("valid")))
    return sink.finish({})


class _TargetSink:
    """Turns neighbours into targets and writes them."""

    def __init__(self, config: Config, split: Split, temperature_: float):
        layout = Layout(config)
        tokens = layout.tokens.load().counts
        self._temperature = temperature_
        self._split, self._artifact = split, layout.targets(split)
        self._num_tokens = config.targets.num_tokens
        self._separator_id = int(tokens["separator_id"])
        self._train_label_N = read_labels(layout, "train")
        self._label_N = self._train_label_N if split == "train" else read_labels(layout, split)
        self.writer = _writer(
            self._artifact,
            targets_arrays(config.datastore, config.targets, int(tokens["vocab_size"])),
            len(self._label_N),
        )

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


def _temperature(config: Config) -> Tuned:
    """Returns τ, given or chosen on validation; what was chosen is kept for a later start."""
    file = Layout(config).targets("train").path / TEMPERATURE
    with first_alone("targets: temperature"):
        if is_writer() and not file.exists():
            write_checked_json(file, dataclasses.asdict(_tuned(config)))
    return Tuned(**read_checked_json(file))


def _tuned(config: Config) -> Tuned:
    """Chooses τ, or λ for the τ that is given."""
    layout = Layout(config)
    separator_id = int(layout.tokens.load().counts["separator_id"])
    label_N = read_labels(layout, "valid")
    knn = StoredKnn(layout, "valid", label_N, read_labels(layout, "train"))
    logprob_N = StoredArray(layout.datastore("valid"), "logprob").read_all()
    asked = config.targets.temperature
    tuned = knn.tune(
        label_N != separator_id,
        logprob_N,
        TUNING_ROWS,
        config.seed,
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


def _measured_engine(
    config: Config, exact: ExactCache, keys: StoredKeys, *, must_suffice: bool = True
) -> tuple[Engine, dict[str, Any]]:
    """Opens the engine of the index and measures its recall.

    Raises:
        ConfigError: The recall is below `retrieval.min_recall`, and must not be.
    """
    engine, settings = open_index(config, exact)
    reference = recall.plain_search(keys) if settings is None else exact().search
    sample = recall.draw_sample(
        keys,
        reference,
        config.retrieval.recall_queries,
        config.retrieval.num_neighbors,
        (config.seed, MEASUREMENT_SEED),
    )
    found = recall.measure(engine, sample)
    num_queries = len(sample.row_Q)
    say(
        f"retrieve: recall@{config.retrieval.num_neighbors} of the {engine.name} engine is "
        f"{found:.4f} on {num_queries:,} random rows"
    )
    if must_suffice:
        recall.check(found, config.retrieval, settings, num_queries)
    if settings is not None:
        exact.release()
    measured = {"engine": engine.name, "recall": found, "recall_queries": num_queries}
    return engine, measured


def _search(
    config: Config,
    split: Split,
    engine: Engine,
    keys: StoredKeys,
    writer: ShardWriter,
    consume: Any,
) -> dict[str, Any]:
    numbers = search_split(
        engine,
        keys,
        writer,
        consume,
        num_neighbors=config.retrieval.num_neighbors,
        query_batch=config.retrieval.query_batch,
        exclude_own_row=split == "train",
        description=f"retrieve {split}",
    )
    if numbers["queries"]:
        say(
            f"retrieve: {numbers['queries']:,} rows of {split} by the {engine.name} engine, "
            f"{numbers['queries_per_sec']:,.0f} rows/s"
        )
    return numbers


def _search_numbers(measured: Mapping[str, Any]) -> dict[str, Any]:
    names = ("engine", "recall", "recall_queries", "queries_per_sec")
    return {name: measured[name] for name in names if name in measured}


def _writer(artifact: Artifact, specs: Mapping[str, ArraySpec], num_rows: int) -> ShardWriter:
    # The distance of a neighbour that does not exist is infinite.
    return ShardWriter(artifact.path, specs, num_rows, refuse_non_finite="distance" not in specs)


def _check_rows(config: Config) -> None:
    train = Layout(config).datastore("train")
    num_rows = int(train.load().counts["rows"])
    check_enough_rows(config.retrieval.num_neighbors, num_rows, str(train.path))


def _check_same_origin(layout: Layout, split: Split) -> None:
    """Refuses splits that different decoders or tokenizers made."""
    train, other = layout.datastore("train").load(), layout.datastore(split).load()
    for name in train.made_from:
        if train.made_from[name] != other.made_from.get(name):
            raise ArtifactError(
                f"{layout.datastore(split).path}: made from another {name} "
                f"({other.made_from.get(name)}) than {layout.datastore('train').path} "
                f"({train.made_from[name]}); run embed again with --rebuild"
            )
