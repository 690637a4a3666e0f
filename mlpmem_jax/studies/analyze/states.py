"""The decoder's last state at chosen rows of a split, in the windows of `embed`.

The datastore keeps what the memory and the search read, not what the decoder's head reads.
Same windows, same context: the distributions are those whose log-probabilities of the
labels were stored.
"""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from mlpmem_jax.config.schema import Config
from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.corpus.windows import EmbeddingPlan
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.parallel.sharding import batch_sharding, replicated


def final_states(
    config: Config,
    decoder: Decoder,
    tokens: TokenSplit,
    row_N: np.ndarray,
    mesh: jax.sharding.Mesh,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Runs the decoder over the windows that hold the rows.

    Args:
        config: The whole configuration; windows are those of `embed`.
        decoder: On the mesh.
        tokens: The split.
        row_N: Rows, ascending.
        mesh: Devices.

    Yields:
        Some of the rows, ascending, and their states after the final norm, float32 [n, D].
    """
    window, stride = config.embedding_window_tokens, config.embedding_stride_tokens
    plan = EmbeddingPlan(tokens.num_rows, window, stride, config.attends_within)
    graphdef, weights = nnx.split(decoder)
    batch_size = config.datastore.batch_size

    def hidden(weights: Any, batch: dict[str, jax.Array]) -> jax.Array:
        model = nnx.merge(graphdef, weights)
        final_BWD, _ = model.hidden(batch["token"], batch.get("segment"))
        assert final_BWD is not None
        return final_BWD

    step = jax.jit(hidden, out_shardings=replicated(mesh))
    wanted = np.unique(row_N // stride)
    with jax.set_mesh(mesh):
        for first in range(0, len(wanted), batch_size):
            numbers = wanted[first : first + batch_size]
            padded = np.pad(numbers, (0, batch_size - len(numbers)), mode="edge")
            read = plan.read(tokens, padded).items()
            batch = {
                name: jax.device_put(array_BW, batch_sharding(mesh))
                for name, array_BW in read
                if name in ("token", "segment")
            }
            final_BWD = step(weights, batch)
            low, high = numbers[0] * stride, (numbers[-1] + 1) * stride
            row = row_N[np.searchsorted(row_N, low) : np.searchsorted(row_N, high)]
            place = np.searchsorted(numbers, row // stride)
            column = row - plan.blocks(numbers).start[place]
            # A power of two of places: few shapes to compile for.
            extra = (1 << max(0, len(row) - 1).bit_length()) - len(row)
            place_P, column_P = (np.pad(index, (0, extra)) for index in (place, column))
            yield row, np.asarray(final_BWD[place_P, column_P])[: len(row)].astype(np.float32)
