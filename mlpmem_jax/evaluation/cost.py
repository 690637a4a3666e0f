"""What each system costs: parameters, and bytes that must be kept to use it."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.store.arrays import DTYPES
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.training.flops import decoder_parameters, memory_parameters


def parameter_bytes(network: nnx.Module) -> int:
    """Returns the bytes of a network's arrays."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(nnx.state(network)))


def datastore_bytes(datastore: Artifact, index: Artifact) -> int:
    """Returns the bytes that a kNN-LM searches: labels, and keys or the index that holds them."""
    arrays, manifest = datastore.load().arrays, index.load()
    held = sum(int(file["bytes"]) for file in manifest.files.values())
    held += sum(_array_bytes(array) for array in manifest.arrays.values())
    exact = manifest.counts.get("engine") == "exact"
    return _array_bytes(arrays["label"]) + (_array_bytes(arrays["key"]) if exact else held)


def _array_bytes(array: Mapping[str, Any]) -> int:
    dtype = np.dtype(DTYPES.get(array["dtype"], array["dtype"]))
    return int(np.prod(array["shape"], dtype=np.int64)) * dtype.itemsize


def costs(
    decoder: Decoder, memory: Memory, systems: Iterable[str], searched_bytes: int
) -> dict[str, dict[str, int]]:
    """Returns parameters and bytes of each system.

    Args:
        decoder: What every system runs.
        memory: What the system "memory" runs besides.
        searched_bytes: What the system "knn" keeps besides (`datastore_bytes`).
    """
    vocab = decoder.vocab_size
    alone = _network_cost(decoder, decoder_parameters(decoder.config, vocab))
    added = _network_cost(memory, memory_parameters(memory.config, decoder.config.width, vocab))
    table = {}
    for system in systems:
        cost = dict(alone)
        if system == "memory":
            cost = {name: value + added[name] for name, value in alone.items()}
        searched = searched_bytes if system == "knn" else 0
        table[system] = cost | {
            "datastore_bytes": searched,
            "stored_bytes": cost["parameter_bytes"] + searched,
        }
    return table


def _network_cost(network: nnx.Module, counts: dict[str, int]) -> dict[str, int]:
    return {
        "parameters": counts["total"],
        "non_embedding_parameters": counts["non_embedding"],
        "parameter_bytes": parameter_bytes(network),
    }
