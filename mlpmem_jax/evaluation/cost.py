"""What each system costs: parameters, and bytes that must be kept to use it."""

from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from mlpmem_jax.config.schema import Config
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.store.arrays import DTYPES
from mlpmem_jax.store.layout import Layout
from mlpmem_jax.training.flops import decoder_parameters, memory_parameters


def network_cost(network: nnx.Module, counts: dict[str, int]) -> dict[str, int]:
    """Returns parameters, those without embeddings and output head, and bytes of a network."""
    leaves = jax.tree.leaves(nnx.state(network))
    return {
        "parameters": counts["total"],
        "non_embedding_parameters": counts["non_embedding"],
        "parameter_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in leaves),
    }


def datastore_bytes(layout: Layout) -> int:
    """Returns the bytes that a kNN-LM searches: labels, and keys or the index that holds them."""
    arrays = layout.datastore("train").load().arrays
    files = layout.index.load().files
    index = sum(int(file["bytes"]) for file in files.values())
    exact = layout.index.load().counts.get("engine") == "exact"
    return _array_bytes(arrays["label"]) + (_array_bytes(arrays["key"]) if exact else index)


def _array_bytes(array: Mapping[str, Any]) -> int:
    dtype = np.dtype(DTYPES.get(array["dtype"], array["dtype"]))
    return int(np.prod(array["shape"], dtype=np.int64)) * dtype.itemsize


def costs(
    config: Config, decoder: Decoder, memory: Memory, systems: Iterable[str]
) -> dict[str, dict[str, int]]:
    """Returns parameters and bytes of each system."""
    vocab = decoder.vocab_size
    alone = network_cost(decoder, decoder_parameters(config.decoder, vocab))
    added = network_cost(memory, memory_parameters(config.memory, config.decoder.width, vocab))
    table = {}
    for system in systems:
        cost = dict(alone)
        if system == "memory":
            cost = {name: value + added[name] for name, value in alone.items()}
        searched = datastore_bytes(Layout(config)) if system == "knn" else 0
        table[system] = cost | {
            "datastore_bytes": searched,
            "stored_bytes": cost["parameter_bytes"] + searched,
        }
    return table
