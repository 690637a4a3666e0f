"""The arrays of each kind of artifact: names, dtypes, shapes and chunking.

Writers and readers import these; no other module spells them.
"""

import dataclasses
from collections.abc import Collection
from typing import Any, Literal

import numpy as np

from mlpmem_jax.config.data import DatastoreConfig, TargetsConfig
from mlpmem_jax.store.arrays import DTYPES

Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")

# Tokens are read in windows and in embedding order: large shards, small readable pieces.
TOKEN_SHARD_ROWS = 1 << 20
TOKEN_CHUNK_ROWS = 1 << 14
DOCUMENT_SHARD_ROWS = 1 << 16
DOCUMENT_CHUNK_ROWS = 1 << 13


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Shape, dtype and chunking of one array.

    Attributes:
        tail: Shape after the rows.
        shard_rows: Rows of a shard.
        chunk_rows: Rows of a readable piece.
    """

    tail: tuple[int, ...]
    dtype: Any
    shard_rows: int
    chunk_rows: int

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.tail, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def token_dtype(vocab_size: int) -> Any:
    """Returns the smallest unsigned dtype that holds every token id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


def datastore_arrays(store: DatastoreConfig, width: int) -> dict[str, ArraySpec]:
    """Returns the arrays of a datastore split: key_ND, input_ND, label_N, logprob_N.

    Args:
        store: Which arrays, in which dtype and chunking.
        width: D of the decoder.
    """
    chunking = (store.shard_rows, store.chunk_rows)
    state = ArraySpec((width,), DTYPES[store.dtype], *chunking)
    specs = {
        "key": state,
        "input": state,
        "label": ArraySpec((), np.int32, *chunking),
        "logprob": ArraySpec((), np.float32, *chunking),
    }
    wanted = [name for name in specs if name in store.arrays]
    if store.key == store.input and "key" in wanted and "input" in wanted:
        wanted.remove("input")  # The same state is stored once.
    return {name: specs[name] for name in wanted}


def input_array(arrays: Collection[str]) -> str:
    """Returns which of a datastore's arrays holds the memory's input."""
    return "input" if "input" in arrays else "key"


def scores_arrays(store: DatastoreConfig) -> dict[str, ArraySpec]:
    """Returns the arrays of scores: logprob_N (float32), and label_N to compare sides."""
    chunking = (store.shard_rows, store.chunk_rows)
    return {
        "logprob": ArraySpec((), np.float32, *chunking),
        "label": ArraySpec((), np.int32, *chunking),
    }


def neighbors_arrays(store: DatastoreConfig, num_neighbors: int) -> dict[str, ArraySpec]:
    """Returns the arrays of neighbours: row_NK (int64) and squared distance_NK (float32)."""
    chunking = (store.shard_rows, store.chunk_rows)
    return {
        "row": ArraySpec((num_neighbors,), np.int64, *chunking),
        "distance": ArraySpec((num_neighbors,), np.float32, *chunking),
    }


def targets_arrays(
    store: DatastoreConfig, targets: TargetsConfig, vocab_size: int
) -> dict[str, ArraySpec]:
    """Returns the arrays of sparse targets: id_NS, prob_NS, mass_N; label_N to compare sides."""
    tail = (targets.num_tokens,)
    chunking = (store.shard_rows, store.chunk_rows)
    return {
        "id": ArraySpec(tail, token_dtype(vocab_size), *chunking),
        "prob": ArraySpec(tail, DTYPES[targets.dtype], *chunking),
        "mass": ArraySpec((), np.float32, *chunking),
        "label": ArraySpec((), np.int32, *chunking),
    }
