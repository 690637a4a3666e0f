"""Networks that are not trained keep their parameters in the compute dtype."""

import math
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
from flax import nnx

from mlpmem_jax.config.networks import MemoryConfig
from mlpmem_jax.models import layers
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.models.joint import Joint
from mlpmem_jax.models.memory import Memory


def freeze(network: Decoder | Memory | Joint, reader: MemoryConfig) -> None:
    """Casts parameters, in place, to the dtype that products cast them to; results stay the same.

    What is read in float32 (norms, gates, the memory's tables) stays float32.

    Args:
        network: What will not be trained.
        reader: The memory that may read embeddings and head of the decoder.
    """
    if isinstance(network, Joint):
        freeze(network.decoder, reader)
        freeze(network.memory, reader)
        return
    cast = {
        path: variable.replace(variable.get_raw_value().astype(dtype))
        for path, variable, dtype in _frozen_dtypes(network, reader)
    }
    nnx.update(network, nnx.from_flat_state(cast))


def frozen_bytes(network: Decoder | Memory, reader: MemoryConfig) -> int:
    """Returns the bytes of the parameters of a network that is frozen, or of its shapes."""
    return sum(
        math.prod(variable.shape) * dtype.itemsize
        for _, variable, dtype in _frozen_dtypes(network, reader)
    )


def _frozen_dtypes(
    network: Decoder | Memory, reader: MemoryConfig
) -> Iterator[tuple[tuple[Any, ...], nnx.Variable, jnp.dtype]]:
    """Yields path, variable and dtype of each parameter."""
    exact = _read_exactly(network, reader) if isinstance(network, Decoder) else ()
    for path, variable in nnx.to_flat_state(nnx.state(network, nnx.Param)):
        kept = variable.get_metadata()["exact"] or path in exact
        yield path, variable, jnp.dtype(jnp.float32) if kept else network.dtype


def _read_exactly(decoder: Decoder, reader: MemoryConfig) -> set[tuple[str, ...]]:
    """Returns the paths of what a memory reads of the decoder in float32."""
    exact: set[tuple[str, ...]] = set()
    if reader.reads_decoder_table:
        exact.add(("embedding",))
    if reader.head == "tied" and layers.resolve_dtype(reader.compute_dtype) != decoder.dtype:
        exact.add(("embedding" if decoder.config.head == "tied" else "head",))
    return exact
