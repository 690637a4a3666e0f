"""What stages will need, beforehand: rows, bytes, parameters, flops. For `--dry-run`."""

import contextlib
from typing import Any

import numpy as np

from mlpmem_jax.corpus.row_estimates import UNKNOWN_ROWS, count_rows, rows_entry
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.parallel.hardware import this_machine
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.search_needs import chosen_engine
from mlpmem_jax.retrieval import approximate
from mlpmem_jax.retrieval.cells import num_cells
from mlpmem_jax.retrieval.estimates import (
    cells_memory_bytes,
    exact_bytes,
    first_cells_to_search,
    routed_index_bytes,
)
from mlpmem_jax.retrieval.groups import compared
from mlpmem_jax.store.array_specs import Split, datastore_arrays, neighbors_arrays, targets_arrays
from mlpmem_jax.store.arrays import DTYPES
from mlpmem_jax.training.flops import (
    TRAINING_FACTOR,
    decoder_flops_per_token,
    decoder_parameters,
    frozen_input_flops_per_token,
    joint_training_flops_per_token,
    memory_flops_per_token,
    memory_parameters,
    memory_training_flops_per_token,
    tied_head_flops_per_token,
)

# float32 master weights, gradients and two moments.
_TRAINING_BYTES_PER_PARAMETER = 16
ROUTED_FLOPS = "flops of the routed search"


def _vocab_size(run: Artifacts) -> int:
    """V of the tokenizer that is there, or that will be trained."""
    config = run.config
    try:
        return int(run.tokens.load().counts["vocab_size"])
    except ArtifactError:
        return config.tokenizer.vocab_size


def pretraining_estimate(run: Artifacts) -> dict[str, Any]:
    """Parameters, memory, disk and flops of pretraining."""
    config = run.config
    vocab = _vocab_size(run)
    counts = decoder_parameters(config.decoder, vocab)
    window = config.pretrain_window_tokens
    tokens = config.pretrain.num_steps * config.pretrain.batch_size * window
    return {
        "parameters": counts["total"],
        "non-embedding parameters": counts["non_embedding"],
        "training tokens": tokens,
        "model flops": tokens
        * TRAINING_FACTOR
        * decoder_flops_per_token(config.decoder, vocab, window),
        "state bytes, over all devices": counts["total"] * _TRAINING_BYTES_PER_PARAMETER,
        "logits bytes of a chunk, a device": 4 * vocab * config.pretrain.loss_chunk_tokens,
        "disk bytes of checkpoints": 12 * counts["total"] * config.pretrain.keep_checkpoints,
    }


def training_estimate(run: Artifacts, steps: range | None = None) -> dict[str, Any]:
    """Parameters, memory, disk and flops of training the memory, or both networks.

    Args:
        steps: Those of one phase; None: all.
    """
    config = run.config
    steps = range(config.train.num_steps) if steps is None else steps
    vocab, window = _vocab_size(run), config.train_window_tokens
    joint = config.train.mode == "joint"
    counts = memory_parameters(config.memory, config.decoder.width, vocab)
    step_rows = config.train.batch_size * window
    flops = len(steps) * memory_training_flops_per_token(config.memory, config.decoder.width, vocab)
    if joint:
        added = decoder_parameters(config.decoder, vocab)
        counts = {name: counts[name] + added[name] for name in counts}
        memory = (config.memory, config.decoder.width, vocab)
        flops = joint_training_flops_per_token(
            config.train,
            decoder_flops_per_token(config.decoder, vocab, window),
            memory_flops_per_token(*memory),
            steps,
            tied_head_flops_per_token(*memory),
            frozen_input_flops_per_token(*memory[:2]),
        )
    elif config.decoder_runs:
        site = config.datastore.input
        flops += len(steps) * decoder_flops_per_token(
            config.decoder,
            vocab,
            window,
            num_layers=site.block(config.decoder.num_layers),
            last_ffn=site.site == "residual",
            head=False,
        )
    return {
        "parameters": counts["total"],
        "non-embedding parameters": counts["non_embedding"],
        "training rows": len(steps) * step_rows,
        "model flops": step_rows * flops,
        "state bytes, over all devices": counts["total"] * _TRAINING_BYTES_PER_PARAMETER,
        "disk bytes of checkpoints": 12 * counts["total"] * config.train.keep_checkpoints,
    }


def embedding_estimate(run: Artifacts, split: Split) -> dict[str, Any]:
    """Rows, disk, host memory and flops of embedding a split."""
    config = run.config
    counted = _count(run, split)
    if counted is None:
        return {"rows": UNKNOWN_ROWS}
    rows = counted[0]
    specs = datastore_arrays(config.datastore, config.decoder.width)
    row_bytes = sum(spec.row_bytes for spec in specs.values())
    return {
        **rows_entry(*counted),
        "disk bytes": rows * row_bytes,
        "host bytes of shards under way": 4 * config.datastore.shard_rows * row_bytes,
        "model flops": embedding_flops(run, rows),
    }


def embedding_flops(run: Artifacts, rows: int) -> float:
    """Returns the flops of embedding so many rows."""
    config, vocab = run.config, _vocab_size(run)
    window, stride = config.embedding_window_tokens, config.embedding_stride_tokens
    # Every token of a window goes through the blocks, only scored rows through the head.
    blocks = decoder_flops_per_token(config.decoder, vocab, window, head=False)
    head = decoder_flops_per_token(config.decoder, vocab, window) - blocks
    return rows * (blocks * window / stride + head)


def index_estimate(run: Artifacts) -> dict[str, Any]:
    """Disk and memory of the index, as far as the number of rows is known."""
    config = run.config
    counted, width = _count(run, "train"), config.decoder.width
    if counted is None:
        return {"rows": UNKNOWN_ROWS}
    num_rows = counted[0]
    if _is_routed(run, num_rows):
        itemsize = np.dtype(DTYPES[config.datastore.dtype]).itemsize
        cells = num_cells(config.retrieval, num_rows, width)
        return {
            "cells": cells,
            "index bytes on disk, at most": routed_index_bytes(num_rows, width, itemsize),
            "index bytes of memory, at most": cells_memory_bytes(
                num_rows, width, itemsize, config.retrieval
            ),
            "flops": 2.0 * num_rows * compared(cells, is_query=False) * width,
        }
    largest = min(num_rows, config.retrieval.shard_rows)
    return {
        "index bytes on disk, at most": approximate.index_bytes(
            num_rows, width, config.retrieval.dims_per_block
        ),
        "index bytes of memory, at most": approximate.build_memory_bytes(
            largest, width, config.retrieval.training_rows
        ),
    }


def neighbors_estimate(run: Artifacts, split: Split) -> dict[str, Any]:
    """Disk and work of keeping the neighbours of a split."""
    config = run.config
    queries, keys = _count(run, split), _count(run, "train")
    if queries is None or keys is None:
        return {"rows": UNKNOWN_ROWS}
    num_rows, num_keys = queries[0], keys[0]
    specs = neighbors_arrays(config.datastore, config.retrieval.num_neighbors)
    found: dict[str, Any] = {
        **rows_entry(*queries),
        "bytes on disk": num_rows * sum(spec.row_bytes for spec in specs.values()),
    }
    if config.retrieval.searches_by_index(split):
        if _is_routed(run, num_keys):
            found[ROUTED_FLOPS] = num_rows * _routed_flops(run, num_keys)
        return found
    return found | {
        "bytes of all keys, all devices": exact_bytes(num_keys, config.decoder.width, 1),
        "flops": 2.0 * num_rows * num_keys * config.decoder.width,
    }


def targets_estimate(run: Artifacts, split: Split) -> dict[str, Any]:
    """Disk of the targets of a split."""
    config = run.config
    counted = _count(run, split)
    if counted is None:
        return {"rows": UNKNOWN_ROWS}
    num_rows = counted[0]
    specs = targets_arrays(config.datastore, config.targets, config.tokenizer.vocab_size)
    found: dict[str, Any] = {
        **rows_entry(*counted),
        "bytes on disk": num_rows * sum(spec.row_bytes for spec in specs.values()),
    }
    if split == "train" and config.targets.teacher == "knn" and _is_routed(run, num_rows):
        found[ROUTED_FLOPS] = num_rows * _routed_flops(run, num_rows)
    return found


def _is_routed(run: Artifacts, num_keys: int) -> bool:
    return chosen_engine(run, this_machine(str(run.store)), num_keys) == "routed"


def _routed_flops(run: Artifacts, num_keys: int) -> float:
    """Returns the flops of a query: products with centroids, and with the rows it visits."""
    config = run.config
    cells = num_cells(config.retrieval, num_keys, config.decoder.width)
    visited = first_cells_to_search(config.retrieval, num_keys, cells)
    with contextlib.suppress(ArtifactError):  # What was chosen once there is an index.
        counts = run.index.load().counts
        cells, visited = int(counts["cells"]), int(counts["cells_to_search"])
    return 2.0 * config.decoder.width * (compared(cells) + visited * num_keys / cells)


def _count(run: Artifacts, split: Split) -> tuple[int, bool] | None:
    return count_rows(run.config.corpus, run.tokens, split)
