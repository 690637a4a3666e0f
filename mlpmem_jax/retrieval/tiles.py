"""Products of queries with the keys of the cells that they visit, in tiles of few shapes.

Suffixes: Q queries, V visits of a query, C cells, N keys, A = D + 1 columns, M pairs of a query and
a cell, W scores of a query side by side; G tiles of R queries.
"""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mlpmem_jax.retrieval.blocked import block_scores, host_device
from mlpmem_jax.retrieval.engine import row_ranges

_TILE_QUERIES = 16  # Queries that are multiplied with one cell at once.
_CALL_TILES = 16  # Of one call of XLA.
_LEAST_QUERIES = 1024  # Queries are padded to so many, or a power of two.
_LEAST_LENGTH = 64


def pair_scores(
    query_QA: np.ndarray,
    key_NA: jax.Array,
    start_C: np.ndarray,
    length_C: np.ndarray,
    cell_QV: np.ndarray,
) -> np.ndarray:
    """Returns scores [Q, W]: of each query those of its visits side by side, then inf.

    Args:
        query_QA: As `augmented` returns them.
        key_NA: Keys as `blocked.block_scores` takes them, in the order of cells, with room behind
            for the longest cell.
        start_C: Place of the first key of each cell, and the end of the last: [C + 1].
        length_C: Columns of each cell, as `padded_lengths` returns; inf beyond its keys.
        cell_QV: Cells that each query visits; -1 for none, which takes no columns.
    """
    length_QV = np.where(cell_QV < 0, 0, length_C[cell_QV])
    width = int(length_QV.sum(axis=1).max())
    score_QW = np.full((len(cell_QV), width), np.inf, np.float32)
    query_M, visit_M = np.nonzero(cell_QV >= 0)
    cell_M = cell_QV[query_M, visit_M]
    offset_M = (np.cumsum(length_QV, axis=1) - length_QV)[query_M, visit_M]
    length_M, size_C = length_C[cell_M], np.diff(start_C)
    queries = jax.device_put(query_QA, host_device())
    for length in np.unique(length_M).tolist():
        some_M = np.flatnonzero(length_M == length)
        some_M = some_M[np.argsort(cell_M[some_M], kind="stable")]
        # All windows of so many columns: assigning to some of them copies whole lines.
        windows = np.ndarray(
            (len(score_QW), width - length + 1, length),
            np.float32,
            score_QW.data,
            strides=(*score_QW.strides, 4),
        )
        for pair_GR in _tiles(some_M, cell_M):
            is_pair_GR = pair_GR >= 0
            query_GR = np.where(is_pair_GR, query_M[pair_GR], 0).astype(np.int32)
            cell_G = cell_M[pair_GR[:, 0]]
            about = (start_C[cell_G].astype(np.int32), size_C[cell_G].astype(np.int32))
            found = _tile_scores(queries, key_NA, query_GR, *about, length=length)
            pair_P = pair_GR[is_pair_GR]
            windows[query_M[pair_P], offset_M[pair_P]] = np.asarray(found)[is_pair_GR]
    return score_QW


@functools.partial(jax.jit, static_argnames="length")
def _tile_scores(
    query_QA: jax.Array,
    key_NA: jax.Array,
    query_GR: jax.Array,
    start_G: jax.Array,
    size_G: jax.Array,
    *,
    length: int,
) -> jax.Array:
    """Returns scores [G, R, length] of some queries of each of G cells; inf beyond the cell."""

    def tile(one: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        query_R, start, size = one
        key_LA = lax.dynamic_slice(key_NA, (start, 0), (length, key_NA.shape[1]))
        return jnp.where(
            jnp.arange(length) < size, block_scores(query_QA[query_R], key_LA), jnp.inf
        )

    return lax.map(tile, (query_GR, start_G, size_G))


def _tiles(pair_M: np.ndarray, cell_M: np.ndarray) -> Iterator[np.ndarray]:
    """Yields pairs of a query and a cell in tiles of one cell each: numbers [G, R], -1 for none.

    Args:
        pair_M: Pairs, in the order of their cells.
        cell_M: The cell of every pair.
    """
    own_M = cell_M[pair_M]
    is_first = np.append(True, own_M[1:] != own_M[:-1])
    first_M = np.maximum.accumulate(np.where(is_first, np.arange(len(own_M)), 0))
    number_M = np.arange(len(own_M)) - first_M
    tile_M = np.cumsum(number_M % _TILE_QUERIES == 0) - 1
    pair_TR = np.full((int(tile_M[-1]) + 1, _TILE_QUERIES), -1, np.int64)
    pair_TR[tile_M, number_M % _TILE_QUERIES] = pair_M
    for part in row_ranges(len(pair_TR), _CALL_TILES):
        one = pair_TR[part]  # Padded to one size: XLA compiles a program for each.
        yield np.pad(one, ((0, _CALL_TILES - len(one)), (0, 0)), constant_values=-1)


def augmented(query_QD: np.ndarray) -> np.ndarray:
    """Returns −2 · queries and a column of ones, of as many rows as a power of two."""
    num_queries, width = query_QD.shape
    padded = max(_LEAST_QUERIES, 1 << max(0, num_queries - 1).bit_length())
    query_QA = np.zeros((padded, width + 1), np.float32)
    query_QA[:num_queries, :width] = -2 * query_QD
    query_QA[:num_queries, width] = 1
    return query_QA


def padded_lengths(size_C: np.ndarray) -> np.ndarray:
    """Returns rows of cells, rounded up to a power of two, at least 64."""
    return np.int64(1) << np.ceil(np.log2(np.maximum(size_C, _LEAST_LENGTH))).astype(np.int64)
