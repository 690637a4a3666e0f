"""The decoder's last state at chosen rows of a split, in the windows of `embed`.

The datastore keeps what the memory and the search read, not what the decoder's head reads.
Same windows, same context: the distributions are those whose log-probabilities of the
labels were stored.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.embedding.blocks import EmbeddingSettings, by_window, computed_rows, in_batches
from mlpmem_jax.models.decoder import Decoder


def final_states(
    settings: EmbeddingSettings,
    decoder: Decoder,
    tokens: TokenSplit,
    row_N: np.ndarray,
    mesh: jax.sharding.Mesh,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Runs the decoder over the windows that hold the rows.

    Args:
        settings: The windows, those of `embed`.
        decoder: On the mesh.
        row_N: Rows, ascending.

    Yields:
        Some of the rows, ascending, and their states after the final norm, float32 [n, D].
    """
    plan = settings.plan(tokens.num_rows)
    graphdef, weights = nnx.split(decoder)

    @jax.jit
    def hidden(weights: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        model = nnx.merge(graphdef, weights)
        final_BWD, _ = model.hidden(batch["token"], batch.get("segment"))
        assert final_BWD is not None
        return {"final": by_window(settings.scored_columns(batch["offset"])(final_BWD))}

    step = functools.partial(hidden, weights)
    wanted = np.unique(row_N // settings.stride_tokens)
    with jax.set_mesh(mesh):
        batches = in_batches(wanted.tolist(), settings.batch_size)
        for computed in computed_rows(step, plan, tokens, batches, mesh):
            for first, arrays in computed.blocks:
                stop = first + len(arrays["final"])
                row_n = row_N[np.searchsorted(row_N, first) : np.searchsorted(row_N, stop)]
                yield row_n, arrays["final"][row_n - first].astype(np.float32)
