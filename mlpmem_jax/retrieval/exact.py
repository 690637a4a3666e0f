"""Exact brute force: the reference for every other engine, and often fast enough.

Keys are spread over all devices of the mesh. Each device finds the nearest of its own rows
and the lists are merged. Rows on a device are int32, counted within the device's part;
global rows are made in NumPy, since JAX wraps int64.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlpmem_jax.parallel.sharding import AXES, replicated
from mlpmem_jax.retrieval.blocked import BlockedSearch
from mlpmem_jax.retrieval.engine import EngineName, Keys
from mlpmem_jax.retrieval.merge import Neighbors, fit, sort_neighbors

_GROUP = 64
# More rows than asked are scored again by differences, so that rounding in the product
# and equal distances cannot push out a neighbour.
_SPARE = 32
# Of the largest buffers of one block of queries: its scores, or the keys that are scored again.
_BLOCK_BYTES = {"cpu": 32 << 20}
_BLOCK_BYTES_ACCELERATOR = 512 << 20
_QUERY_BLOCKS = range(8, 1024 + 1)


class ExactEngine:
    """Searches every row.

    Args:
        keys: Keys; each device holds its part.
        mesh: Where they lie.
        key_chunk_rows: Keys that one device scores at once.
        first_row: Number of the first row.
    """

    name: EngineName = "exact"

    def __init__(self, keys: Keys, mesh: Mesh, key_chunk_rows: int, first_row: int = 0):
        self.num_rows = keys.num_rows
        self._first_row = first_row
        self._on_host: BlockedSearch | None = None
        self._on_mesh: _MeshSearch | None = None
        platform = mesh.devices.flat[0].platform
        if mesh.size == 1 and platform == "cpu" and jax.process_count() == 1:
            self._on_host = BlockedSearch(keys.num_rows, keys.width, keys.read)
        else:
            self._on_mesh = _MeshSearch(keys, mesh, key_chunk_rows, platform)
        self.spans_processes = len({device.process_index for device in mesh.devices.flat}) > 1

    def search(self, query_QD: np.ndarray, num_neighbors: int) -> Neighbors:
        """Returns the nearest rows, as the protocol says."""
        assert query_QD.dtype == np.float32, query_QD.dtype
        searcher = self._on_host or self._on_mesh
        assert searcher is not None
        found = searcher.search(query_QD, num_neighbors)
        row_QK = np.where(found.row_QK < 0, found.row_QK, found.row_QK + self._first_row)
        return Neighbors(found.distance_QK, row_QK)

    def search_later(self, query_QD: np.ndarray, num_neighbors: int) -> Callable[[], Neighbors]:
        """Searches now: nothing is left for later."""
        found = self.search(query_QD, num_neighbors)
        return lambda: found

    def visiting_order(self, rows: slice) -> np.ndarray | None:
        """Returns none: every query visits every row."""
        del rows
        return None


class _MeshSearch:
    def __init__(self, keys: Keys, mesh: Mesh, key_chunk_rows: int, platform: str):
        self._mesh = mesh
        self._num_rows = keys.num_rows
        shares = mesh.size
        per_device = max(1, -(-keys.num_rows // shares))
        self._chunk = min(_round_up(per_device, _GROUP), _round_up(key_chunk_rows, _GROUP))
        self._rows_per_device = _round_up(per_device, self._chunk)
        self._block_bytes = _BLOCK_BYTES.get(platform, _BLOCK_BYTES_ACCELERATOR)
        split = NamedSharding(mesh, PartitionSpec(AXES))

        def part(index: Any) -> np.ndarray:
            start, stop = index[0].start or 0, index[0].stop
            stop = shares * self._rows_per_device if stop is None else stop
            key_ND = np.zeros((stop - start, keys.width), np.float32)
            real = min(stop, keys.num_rows)
            if start < real:
                key_ND[: real - start] = keys.read(start, real)
            return key_ND

        shape = (shares * self._rows_per_device, keys.width)
        self._key_ND = jax.make_array_from_callback(shape, split, part)
        counts_P = np.clip(
            keys.num_rows - np.arange(shares) * self._rows_per_device, 0, self._rows_per_device
        ).astype(np.int32)
        self._count_P = jax.make_array_from_callback(
            (shares,), split, lambda index: counts_P[index]
        )
        # Once: a single query would otherwise read all keys three times.
        self._mean_PD, self._norm_N = _mean_and_norms(self._key_ND, self._count_P, mesh=mesh)

    def search(self, query_QD: np.ndarray, num_neighbors: int) -> Neighbors:
        num_queries = len(query_QD)
        wanted = min(num_neighbors, self._rows_per_device)
        # Few queries, as in generation, are not padded to a whole block.
        block = query_block(self._chunk, wanted, query_QD.shape[1], self._block_bytes)
        block = min(block, 1 << max(0, num_queries - 1).bit_length())
        padded = np.zeros((max(1, _round_up(num_queries, block)), query_QD.shape[1]), np.float32)
        padded[:num_queries] = query_QD
        queries = jax.make_array_from_callback(
            padded.shape, replicated(self._mesh), lambda index: padded[index]
        )
        distance, row = _search_all(
            self._key_ND,
            self._mean_PD,
            self._norm_N,
            queries,
            mesh=self._mesh,
            wanted=wanted,
            chunk=self._chunk,
            query_block=block,
        )
        # [Q, P · K]: the devices' lists side by side; rows become global here, in int64.
        distance_QK, local_QK = np.asarray(distance), np.asarray(row).astype(np.int64)
        device_K = np.repeat(np.arange(self._mesh.size, dtype=np.int64), wanted)
        row_QK = local_QK + device_K * self._rows_per_device
        found = sort_neighbors(distance_QK[:num_queries], row_QK[:num_queries])
        return fit(found, num_neighbors)


def query_block(chunk: int, num_neighbors: int, width: int, block_bytes: int) -> int:
    """Returns how many queries a device searches for at once, a power of two.

    Args:
        chunk: Keys that are scored at once.
        num_neighbors: K.
        width: D.
        block_bytes: What a buffer of the block may take, unless so few queries take more.
    """
    row_bytes = 4 * max(chunk, (num_neighbors + _SPARE) * width)
    most = min(_QUERY_BLOCKS[-1], max(_QUERY_BLOCKS[0], block_bytes // row_bytes))
    return 1 << int(math.log2(most))


@functools.partial(jax.jit, static_argnames="mesh")
def _mean_and_norms(
    key_ND: jax.Array, count_P: jax.Array, *, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """Returns the mean of each device's keys, [P, D], and ‖key − mean‖² of all, [N]."""

    def local(key_ND: jax.Array, count_1: jax.Array) -> tuple[jax.Array, jax.Array]:
        is_real_N = jnp.arange(len(key_ND), dtype=jnp.int32) < count_1
        mean_D = key_ND.sum(axis=0) / jnp.maximum(1, count_1).astype(jnp.float32)
        norm_N = jnp.square(key_ND - mean_D[None, :]).sum(axis=1)
        return mean_D[None], jnp.where(is_real_N, norm_N, jnp.inf)

    by_device = PartitionSpec(AXES)
    return jax.shard_map(  # type: ignore[no-any-return]
        local, mesh=mesh, in_specs=(by_device, by_device), out_specs=(by_device, by_device)
    )(key_ND, count_P)


@functools.partial(jax.jit, static_argnames=("mesh", "wanted", "chunk", "query_block"))
def _search_all(
    key_ND: jax.Array,
    mean_PD: jax.Array,
    norm_N: jax.Array,
    query_QD: jax.Array,
    *,
    mesh: Mesh,
    wanted: int,
    chunk: int,
    query_block: int,
) -> tuple[jax.Array, jax.Array]:
    """Returns the lists of all devices side by side, on every device: [Q, P · K]."""
    local = functools.partial(_search_device, wanted=wanted, chunk=chunk, query_block=query_block)
    by_device = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(*(PartitionSpec(AXES),) * 3, PartitionSpec()),
        out_specs=(PartitionSpec(None, AXES), PartitionSpec(None, AXES)),
    )
    lists = by_device(key_ND, mean_PD, norm_N, query_QD)
    everywhere = replicated(mesh)
    return tuple(lax.with_sharding_constraint(one, everywhere) for one in lists)  # type: ignore[return-value]


def _search_device(
    key_ND: jax.Array,
    mean_1D: jax.Array,
    norm_N: jax.Array,
    query_QD: jax.Array,
    *,
    wanted: int,
    chunk: int,
    query_block: int,
) -> tuple[jax.Array, jax.Array]:
    """Finds the nearest of one device's rows: float32 distances, int32 rows, both [Q, K]."""
    width = key_ND.shape[1]
    key_MCD = key_ND.reshape(-1, chunk, width)
    base_M = jnp.arange(len(key_MCD), dtype=jnp.int32) * chunk
    kept = wanted + _SPARE
    # Scores ‖k − m‖² − 2 k·(q − m): as small as distances allow, so they round little.
    norm_MC = norm_N.reshape(-1, chunk)

    def block(query_RD: jax.Array) -> tuple[jax.Array, jax.Array]:
        centred_RD = query_RD - mean_1D

        def scan(best: Any, part: Any) -> tuple[Any, None]:
            key_CD, norm_C, base = part
            product_RC = jnp.einsum(
                "rd,cd->rc", centred_RD, key_CD, precision=lax.Precision.HIGHEST
            )
            score_RK, column_RK = _smallest(norm_C[None, :] - 2 * product_RC, kept)
            score = jnp.concatenate([best[0], score_RK], axis=1)
            row = jnp.concatenate([best[1], base + column_RK], axis=1)
            # Stable, and earlier rows stand first: equal scores keep the smaller row.
            smallest, place = lax.top_k(-score, kept)
            return (-smallest, jnp.take_along_axis(row, place, axis=1)), None

        empty = jnp.full((query_block, kept), jnp.inf), jnp.zeros((query_block, kept), jnp.int32)
        empty = jax.tree.map(lambda x: lax.pcast(x, AXES, to="varying"), empty)
        (score_RK, row_RK), _ = lax.scan(scan, empty, (key_MCD, norm_MC, base_M))
        difference = key_ND[row_RK] - query_RD[:, None, :]
        distance_RK = jnp.where(jnp.isinf(score_RK), jnp.inf, jnp.square(difference).sum(axis=2))
        distance_RK, row_RK = lax.sort((distance_RK, row_RK), num_keys=2)
        return distance_RK[:, :wanted], row_RK[:, :wanted]

    blocks = query_QD.reshape(-1, query_block, width)
    distance, row = lax.map(block, blocks)
    return distance.reshape(-1, wanted), row.reshape(-1, wanted)


def _smallest(score_RC: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Returns the smallest scores and their columns, ties by column: `lax.top_k` in two steps.

    The `count` groups with the smallest minima hold the `count` smallest scores, so only
    their members are ranked: a third of the time of ranking all columns.
    """
    num_rows, num_columns = score_RC.shape
    count = min(count, num_columns)
    if num_columns // _GROUP < 2 * count:
        smallest, column = lax.top_k(-score_RC, count)
        return -smallest, column
    grouped_RGW = score_RC.reshape(num_rows, -1, _GROUP)
    _, group_RK = lax.top_k(-grouped_RGW.min(axis=2), count)
    group_RK = jnp.sort(group_RK, axis=1)  # Columns in order again.
    member_RKW = jnp.take_along_axis(grouped_RGW, group_RK[:, :, None], axis=1)
    smallest, place = lax.top_k(-member_RKW.reshape(num_rows, -1), count)
    group = jnp.take_along_axis(group_RK, place // _GROUP, axis=1)
    return -smallest, group * _GROUP + place % _GROUP


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
