"""What each stage needs at least of disk, of a device's memory and of a host's.

Everything is bytes that the code below the stages cannot do without: all keys, an index, a
state. Buffers and activations come on top.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from mlpmem_jax.config.networks import DecoderConfig, MemoryConfig
from mlpmem_jax.config.stages import TUNING_ROWS
from mlpmem_jax.corpus.row_estimates import Rows
from mlpmem_jax.errors import ArtifactError, ConfigError
from mlpmem_jax.models import layers
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.models.frozen import frozen_bytes
from mlpmem_jax.parallel.hardware import Machine
from mlpmem_jax.parallel.mesh import mesh_sizes
from mlpmem_jax.pipeline.fitting import Moment, Need, RowCounter
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.search_needs import (
    chosen_engine,
    exact_moment,
    exact_search_plan,
    index_moment,
    measured_search,
    num_neighbors,
    search_need,
)
from mlpmem_jax.retrieval import approximate
from mlpmem_jax.retrieval.contexts import LEAST_TOKEN_BYTES
from mlpmem_jax.retrieval.estimates import cells_memory_bytes, routed_index_bytes
from mlpmem_jax.store.array_specs import (
    ArraySpec,
    Split,
    datastore_arrays,
    input_array,
    targets_arrays,
    token_dtype,
)
from mlpmem_jax.store.arrays import DTYPES
from mlpmem_jax.training.flops import decoder_parameters, memory_parameters

_STATE_BYTES = 12  # of a parameter that is trained: itself and two moments, float32
_WEIGHT_BYTES = 4  # of a parameter that is read in float32
_NEIGHBOR_BYTES = 12  # row and distance
_EVIDENCE_BYTES = 8  # distance and label


def tokens_need(run: Artifacts, machine: Machine, count: RowCounter) -> Need:
    """Returns what the token stream takes."""
    config = run.config
    del machine
    itemsize = token_dtype(config.tokenizer.vocab_size)().itemsize
    return Need(disk_bytes=sum(count(run).values()) * itemsize)


def pretraining_need(run: Artifacts, machine: Machine, count: RowCounter) -> Need:
    """Returns what the decoder's training takes."""
    del count
    return _training(run, machine, _parameters(run, "decoder"), 0)


def training_need(run: Artifacts, machine: Machine, count: RowCounter) -> Need:
    """Returns what the memory's training takes, or that of both networks."""
    config = run.config
    del count
    decoder, memory = (_parameters(run, name) for name in ("decoder", "memory"))
    if config.train.mode == "joint":
        return _training(run, machine, decoder + memory, 0)
    if config.decoder_runs or config.memory.head == "tied":
        beside = _frozen_decoder_bytes(run, machine)
    else:
        table = config.decoder.width * _vocab_size(run)
        beside = _WEIGHT_BYTES * table * config.memory.reads_decoder_table
    need = _training(run, machine, memory, beside)
    mixed = _mixed_rows(run, machine)
    return dataclasses.replace(need, moments=(*need.moments, *mixed))


def _mixed_rows(run: Artifacts, machine: Machine) -> tuple[Moment, ...]:
    """Returns the windows whose rows are dealt out together, and those that are read ahead."""
    config = run.config
    mixed = config.train_mix_windows
    if mixed == 1:
        return ()
    windows = min(2 * mixed, config.train.num_steps)  # of a position: a group, and the next
    specs = datastore_arrays(config.datastore, config.decoder.width)
    state = specs[input_array(specs)].row_bytes
    # Label, log p, weight, mass; id and probability of each token of a target.
    row_bytes = state + 4 * (4 + 2 * config.targets.num_tokens + config.memory.num_read_tokens)
    rows = config.train.batch_size * config.train_window_tokens * windows
    return (
        Moment(
            "the rows that are dealt out over steps",
            f"lower train.mix_windows={mixed}",
            host_bytes=rows * row_bytes // machine.num_processes,
        ),
    )


def embedding_need(run: Artifacts, split: Split, machine: Machine, count: RowCounter) -> Need:
    """Returns what embedding a split takes."""
    config = run.config
    rows = count(run)[split]
    row_bytes = _row_bytes(datastore_arrays(config.datastore, config.decoder.width))
    networks = Moment(
        "the decoder and a shard of rows",
        "raise mesh.fsdp or lower datastore.shard_rows",
        _frozen_decoder_bytes(run, machine) // _parts(run, machine),
        min(rows // machine.num_processes, config.datastore.shard_rows) * row_bytes,
    )
    return Need(rows * row_bytes, (networks,))


def index_need(run: Artifacts, machine: Machine, count: RowCounter) -> Need:
    """Returns what building the index takes, and choosing how thoroughly it is searched."""
    config = run.config
    rows, retrieval = count(run), config.retrieval
    num_rows, width = rows["train"], config.decoder.width
    engine = chosen_engine(run, machine, num_rows)
    if not num_rows or engine == "exact":
        return Need()
    if engine == "routed":
        return _cells_need(run, machine, rows)
    shard_rows = min(num_rows, retrieval.shard_rows)
    building = Moment(
        "a shard under construction",
        f"lower retrieval.shard_rows={retrieval.shard_rows}",
        host_bytes=approximate.build_memory_bytes(shard_rows, width, retrieval.training_rows),
    )
    moments = [building]
    if "auto" in (retrieval.num_leaves_to_search, retrieval.num_reorder):
        moments += [index_moment(run, machine, rows), exact_moment(run, machine, rows)]
    disk = approximate.index_bytes(num_rows, width, retrieval.dims_per_block)
    return Need(disk, tuple(moments))


def _cells_need(run: Artifacts, machine: Machine, rows: Rows) -> Need:
    """Returns what putting keys in the order of cells takes, and choosing how many are visited."""
    config = run.config
    itemsize = np.dtype(DTYPES[config.datastore.dtype]).itemsize
    shape = config.decoder.width, itemsize
    run_of_keys = Moment(
        "keys that are put in the order of cells",
        "lower retrieval.cells, or use hosts with more memory",
        host_bytes=cells_memory_bytes(rows["train"], *shape, config.retrieval),
    )
    moments = [run_of_keys]
    if config.retrieval.cells_to_search == "auto":
        moments += [index_moment(run, machine, rows), exact_moment(run, machine, rows)]
    disk = routed_index_bytes(rows["train"], *shape)
    return Need(disk, tuple(moments), temporary_bytes=disk)  # Runs beside what becomes of them.


def neighbors_need(
    run: Artifacts, split: Split, machine: Machine, count: RowCounter, *, by_index: bool = False
) -> Need:
    """Returns what the kept neighbours of a split take."""
    rows = count(run)
    disk = rows[split] * num_neighbors(run, rows) * _NEIGHBOR_BYTES
    if by_index or run.config.retrieval.searches_by_index(split):
        return measured_search(run, machine, rows, split, disk)
    plan = exact_search_plan(run, machine, rows)
    return search_need(run, rows, split, disk, (exact_moment(run, machine, rows),), plan)


def exact_sample_need(run: Artifacts, machine: Machine, count: RowCounter) -> Need:
    """Returns what exact neighbours of some rows of test take."""
    rows, most = count(run), run.config.retrieval.exact_rows
    assert most != "all"
    rows = {**rows, "test": min(most, rows["test"])}
    disk = rows["test"] * num_neighbors(run, rows) * _NEIGHBOR_BYTES
    plan = exact_search_plan(run, machine, rows)
    return search_need(run, rows, "test", disk, (exact_moment(run, machine, rows),), plan)


def targets_need(run: Artifacts, split: Split, machine: Machine, count: RowCounter) -> Need:
    """Returns what the targets of a split take."""
    config = run.config
    rows = count(run)
    disk = rows[split] * _row_bytes(
        targets_arrays(config.datastore, config.targets, config.tokenizer.vocab_size)
    )
    if config.targets.teacher == "ngram":
        return Need(disk, (_suffixes(rows, split),))
    if config.targets.teacher == "arrow":
        return Need(disk)
    if split != "train":
        return Need(disk)
    moments = (_evidence(run, rows, TUNING_ROWS, "lower retrieval.num_neighbors"),)
    if config.retrieval.keep_train == "all":
        return Need(disk, moments)
    need = measured_search(run, machine, rows, split, disk, config.targets.share)
    return dataclasses.replace(need, moments=(*moments, *need.moments))


def _suffixes(rows: Rows, split: Split) -> Moment:
    """Returns the contexts in order, which each process holds."""
    num_rows = rows["train"] + (rows["valid"] if split == "valid" else 0)
    return Moment(
        "the contexts of all tokens in order",
        "set targets.teacher=knn or lower corpus.max_bytes",
        host_bytes=num_rows * LEAST_TOKEN_BYTES,
    )


def evaluation_need(run: Artifacts, machine: Machine, count: RowCounter) -> Need:
    """Returns what the table takes: tuning the kNN-LM, and timing its search."""
    rows = count(run)
    if chosen_engine(run, machine, rows["train"]) == "exact":
        searched = exact_moment(run, machine, rows)
    else:
        searched = index_moment(run, machine, rows)
    return Need(moments=(*scores_need(run, machine, count).moments, searched))


def scores_need(run: Artifacts, machine: Machine, count: RowCounter) -> Need:
    """Returns what scoring the kNN-LM takes."""
    config = run.config
    del machine
    rows, most = count(run), config.evaluate.knn_valid_rows
    return Need(moments=(_evidence(run, rows, most, "lower evaluate.knn_valid_rows"),))


def search_quality_need(run: Artifacts, machine: Machine, count: RowCounter) -> Need:
    """Returns what comparing searches with the exact one takes."""
    moments = scores_need(run, machine, count).moments
    return Need(moments=(*moments, exact_moment(run, machine, count(run))))


def _evidence(run: Artifacts, rows: Rows, most: int | None, way_out: str) -> Moment:
    """Returns what τ is chosen on: distances and labels of the neighbours of validation rows."""
    num_rows = rows["valid"] if most is None else min(rows["valid"], most)
    return Moment(
        "the neighbours of validation rows on which the kNN-LM is tuned",
        way_out,
        host_bytes=num_rows * num_neighbors(run, rows) * _EVIDENCE_BYTES,
    )


def _training(run: Artifacts, machine: Machine, trained: int, beside: int) -> Need:
    """Returns what training so many parameters takes, beside bytes of what is frozen."""
    held = _STATE_BYTES * trained + beside
    state = Moment(
        "parameters and the optimiser's moments",
        "raise mesh.fsdp or mesh.tensor, or use more devices",
        device_bytes=held // _parts(run, machine),
    )
    return Need(_STATE_BYTES * trained, (state,))


def _parts(run: Artifacts, machine: Machine) -> int:
    """Returns into how many parts the mesh cuts parameters, at most."""
    config = run.config
    try:
        _, fsdp, tensor = mesh_sizes(config.mesh, machine.num_devices)
    except ConfigError:  # Another check refuses the mesh.
        return machine.num_devices
    return fsdp * tensor


def _vocab_size(run: Artifacts) -> int:
    config = run.config
    try:
        return int(run.tokens.load().counts["vocab_size"])
    except ArtifactError:  # At least the smallest that a tokenizer can have.
        return config.tokenizer.vocab_size if config.tokenizer.path is None else 257


def _parameters(run: Artifacts, network: str) -> int:
    config = run.config
    vocab = _vocab_size(run)
    if network == "decoder":
        return _counted(decoder_parameters, config.decoder, vocab)
    return _counted(memory_parameters, config.memory, config.decoder.width, vocab)


def _frozen_decoder_bytes(run: Artifacts, machine: Machine) -> int:
    networks = []
    for section in (run.config.decoder, run.config.memory):
        dtype = layers.resolve_dtype(section.compute_dtype, machine.platform)
        networks.append(section.model_copy(update={"compute_dtype": dtype.name}))
    return _bytes_of_decoder(*networks, _vocab_size(run))


@functools.lru_cache(maxsize=128)
def _bytes_of_decoder(decoder: DecoderConfig, memory: MemoryConfig, vocab: int) -> int:
    return frozen_bytes(Decoder(decoder, vocab, rngs=None), memory)


@functools.lru_cache(maxsize=128)
def _counted(count: Callable[..., dict[str, int]], *network: Any) -> int:
    """Returns the parameters of a network; to trace it takes a tenth of a second."""
    return count(*network)["total"]


def _row_bytes(specs: dict[str, ArraySpec]) -> int:
    return sum(spec.row_bytes for spec in specs.values())
