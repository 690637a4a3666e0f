"""Exact brute force: the reference for every other engine, and often fast enough.

Keys are spread over all devices of the mesh. Each device finds the nearest of its own rows
and the lists are merged there too. Rows on a device are int32, counted within the device's
part; global rows are made in NumPy, since JAX wraps int64.
"""

import concurrent.futures
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlpmem_jax.parallel.sharding import AXES, replicated
from mlpmem_jax.retrieval.blocked import BlockedSearch
from mlpmem_jax.retrieval.device_search import (
    LARGEST_GROUP,
    SPARE,
    mean_and_norms,
    search_all,
)
from mlpmem_jax.retrieval.engine import EngineName, Keys
from mlpmem_jax.retrieval.merge import MISSING_ROW, Neighbors, fit

# Of the largest buffers of one block of queries: its scores, and the keys scored again. On an
# accelerator a share of its memory, so that few chunks of keys are ranked: ranking costs more
# than the product there. (Both halves of a product and its scores are three such buffers.)
_BLOCK_BYTES_CPU, _CHUNK_ROWS_CPU = 32 << 20, 1 << 16
_BLOCK_SHARE, _LEAST_DEVICE_BYTES = 12, 8 << 30
_QUERY_BLOCKS = range(8, 1024 + 1)
_READ_ROWS = 1 << 16
_FEW_WITHIN = 32  # Rows within a distance that devices rank at first.
# What a platform multiplies as it is stored, one product exact in float32. Elsewhere, and on
# a CPU, keys are float32.
_MULTIPLIED = {"gpu": ("float16", "bfloat16"), "tpu": ("bfloat16",)}


class ExactEngine:
    """Searches every row.

    Args:
        keys: Keys; each device holds its part.
        mesh: Where they lie.
        key_chunk_rows: Keys that one device scores at once; auto: by its memory.
    """

    name: EngineName = "exact"
    skips_rows = True

    def __init__(
        self,
        keys: Keys,
        mesh: Mesh,
        key_chunk_rows: int | Literal["auto"] = "auto",
        first_row: int = 0,
    ):
        self.num_rows = keys.num_rows
        self.rows = range(first_row, first_row + keys.num_rows)
        self._first_row = first_row
        self._on_host: BlockedSearch | None = None
        self._on_mesh: _MeshSearch | None = None
        platform = mesh.devices.flat[0].platform
        if mesh.size == 1 and platform == "cpu" and jax.process_count() == 1:
            self._on_host = BlockedSearch(keys.num_rows, keys.width, keys.read)
        else:
            dtype = device_dtype(keys, platform)
            self._on_mesh = _MeshSearch(keys, mesh, key_chunk_rows, platform, dtype)
        self.spans_processes = len({device.process_index for device in mesh.devices.flat}) > 1

    def search(self, query_QD: np.ndarray, num_neighbors: int) -> Neighbors:
        """Returns the nearest rows, as the protocol says."""
        return self.search_later(query_QD, num_neighbors)()

    def visiting(self, num_rows: int) -> None:
        """Returns none: every query visits every row."""
        del num_rows

    def search_later(
        self, query_QD: np.ndarray, num_neighbors: int, skipped_Q2: np.ndarray | None = None
    ) -> Callable[[], Neighbors]:
        """Has a mesh search meanwhile; a single CPU searches now, on all its cores."""
        assert query_QD.dtype == np.float32, query_QD.dtype
        if skipped_Q2 is not None:
            skipped_Q2 = np.clip(skipped_Q2 - self._first_row, 0, self.num_rows)
        if self._on_mesh is not None:
            pending = self._on_mesh.search_later(query_QD, num_neighbors, skipped_Q2)
            return lambda: self._numbered(pending())
        assert self._on_host is not None
        found = self._numbered(self._on_host.search(query_QD, num_neighbors, skipped_Q2))
        return lambda: found

    def search_within(
        self, query_QD: np.ndarray, distance_Q: np.ndarray, num_neighbors: int
    ) -> Neighbors:
        """Returns the nearest rows that are no farther than a distance of each query.

        Args:
            query_QD: float32 queries.
            distance_Q: float32, inf for any.
            num_neighbors: K, at most.

        Returns:
            Lists ordered by (distance, row), of at most K entries.
        """
        if self._on_host is not None:
            return self._numbered(self._on_host.search_within(query_QD, distance_Q, num_neighbors))
        wanted = min(num_neighbors, _FEW_WITHIN)
        while True:  # All together: processes search equally often.
            found = self.search(query_QD, wanted)
            is_near_QK = np.isfinite(found.distance_QK) & (found.distance_QK <= distance_Q[:, None])
            if wanted == num_neighbors or not is_near_QK[:, -1].any():
                break
            wanted = min(num_neighbors, 4 * wanted)
        return Neighbors(
            np.where(is_near_QK, found.distance_QK, np.float32(np.inf)),
            np.where(is_near_QK, found.row_QK, MISSING_ROW),
        )

    def _numbered(self, found: Neighbors) -> Neighbors:
        row_QK = np.where(found.row_QK < 0, found.row_QK, found.row_QK + self._first_row)
        return Neighbors(found.distance_QK, row_QK)

    def visiting_order(self, rows: slice) -> np.ndarray | None:
        """Returns none: every query visits every row."""
        del rows
        return None


class _MeshSearch:
    def __init__(
        self,
        keys: Keys,
        mesh: Mesh,
        key_chunk_rows: int | Literal["auto"],
        platform: str,
        dtype: Any = np.float32,
    ):
        self._mesh = mesh
        shares = mesh.size
        per_device = max(1, -(-keys.num_rows // shares))
        self._block_bytes = block_bytes(mesh.local_devices[0])
        if key_chunk_rows == "auto":
            most = self._block_bytes // (4 * _QUERY_BLOCKS[-1])
            key_chunk_rows = _CHUNK_ROWS_CPU if platform == "cpu" else most
        num_chunks = -(-per_device // key_chunk_rows)
        self._chunk = _round_up(-(-per_device // num_chunks), LARGEST_GROUP)
        self._rows_per_device = num_chunks * self._chunk
        split = NamedSharding(mesh, PartitionSpec(AXES))

        def part(index: Any) -> np.ndarray:
            start, stop = index[0].start or 0, index[0].stop
            stop = shares * self._rows_per_device if stop is None else stop
            key_ND = np.zeros((stop - start, keys.width), dtype)
            real = min(stop, keys.num_rows)

            def fill(first: int) -> None:  # `read` returns float32, so a part of them at a time.
                last = min(first + _READ_ROWS, real)
                key_ND[first - start : last - start] = keys.read(first, last)

            with concurrent.futures.ThreadPoolExecutor() as pool:
                list(pool.map(fill, range(start, real, _READ_ROWS)))
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
        self._mean_PD, self._norm_N = mean_and_norms(self._key_ND, self._count_P, mesh=mesh)

    def search(self, query_QD: np.ndarray, num_neighbors: int) -> Neighbors:
        return self.search_later(query_QD, num_neighbors)()

    def search_later(
        self, query_QD: np.ndarray, num_neighbors: int, skipped_Q2: np.ndarray | None = None
    ) -> Callable[[], Neighbors]:
        num_queries, width = query_QD.shape
        wanted = min(num_neighbors, self._rows_per_device)
        # Few queries, as in generation, are not padded to a whole block.
        block = query_block(4 * self._chunk, self._block_bytes)
        block = min(block, 1 << max(0, num_queries - 1).bit_length())
        padded = np.zeros((max(1, _round_up(num_queries, block)), width), np.float32)
        padded[:num_queries] = query_QD
        queries = jax.make_array_from_callback(
            padded.shape, replicated(self._mesh), lambda index: padded[index]
        )
        found = search_all(
            self._key_ND,
            self._mean_PD,
            self._norm_N,
            queries,
            None if skipped_Q2 is None else self._on_devices(skipped_Q2, len(padded)),
            mesh=self._mesh,
            wanted=wanted,
            kept=min(num_neighbors, self._mesh.size * wanted),
            chunk=self._chunk,
            query_block=block,
            # The keys that are scored again, beside their differences from a query.
            rescored=min(block, query_block(4 * (wanted + SPARE) * width, self._block_bytes, 1)),
        )

        def finished() -> Neighbors:
            distance_QK, device_QK, local_QK = (np.asarray(one)[:num_queries] for one in found)
            row_QK = device_QK.astype(np.int64) * self._rows_per_device + local_QK
            row_QK = np.where(np.isfinite(distance_QK), row_QK, MISSING_ROW)
            return fit(Neighbors(distance_QK, row_QK), num_neighbors)

        return finished

    def _on_devices(self, skipped_Q2: np.ndarray, num_padded: int) -> jax.Array:
        """Returns the skipped rows of each query on each device, counted there: int32 [P, Q, 2]."""
        padded_Q2 = np.zeros((num_padded, 2), np.int64)
        padded_Q2[: len(skipped_Q2)] = skipped_Q2
        first_P = np.arange(self._mesh.size) * self._rows_per_device
        local_PQ2 = np.clip(padded_Q2 - first_P[:, None, None], 0, self._rows_per_device)
        local_PQ2 = local_PQ2.astype(np.int32)
        split = NamedSharding(self._mesh, PartitionSpec(AXES))
        return jax.make_array_from_callback(local_PQ2.shape, split, lambda index: local_PQ2[index])


def device_dtype(keys: Keys, platform: str) -> np.dtype[Any]:
    """Returns in which dtype devices hold keys: as stored, if they multiply that."""
    is_multiplied = str(keys.dtype) in _MULTIPLIED.get(platform, ())
    return keys.dtype if is_multiplied else np.dtype(np.float32)


def block_bytes(device: jax.Device) -> int:
    """Returns what the largest buffer of one block of queries may take on a device."""
    if device.platform == "cpu":
        return _BLOCK_BYTES_CPU
    stats = device.memory_stats() or {}
    return max(_LEAST_DEVICE_BYTES, stats.get("bytes_limit", 0)) // _BLOCK_SHARE


def query_block(query_bytes: int, block_bytes: int, least: int = _QUERY_BLOCKS[0]) -> int:
    """Returns how many queries a device works on at once, a power of two.

    Args:
        query_bytes: What one query takes in the buffer.
        block_bytes: What the buffer may take, unless so few queries take more.
        least: So few.
    """
    most = min(_QUERY_BLOCKS[-1], max(least, block_bytes // query_bytes))
    return 1 << (most.bit_length() - 1)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
