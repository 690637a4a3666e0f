"""Rows that arrive in pieces, written as whole shards in the background.

Once a shard of all arrays is on disk its writer puts a small file with their digests beside
(`written/NUMBER.json`): only then it counts. The manifest takes the digests from there, whichever
process and start wrote them, and the folder goes.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath

from mlpmem_jax.errors import RunFailed
from mlpmem_jax.parallel.agreement import of_first
from mlpmem_jax.parallel.multihost import first_alone, is_writer
from mlpmem_jax.parallel.sharing import share_of
from mlpmem_jax.store.array_specs import ArraySpec
from mlpmem_jax.store.arrays import (
    PendingWrite,
    create_array,
    describe,
    finished_shards,
    write_rows,
)
from mlpmem_jax.store.digests import shard_digest
from mlpmem_jax.store.files import check_free_space
from mlpmem_jax.store.shard_records import record_written, recorded_shards

_MAX_PENDING_SHARDS = 2


class ShardWriter:
    """Collects rows of several parallel arrays and writes each shard once it is full.

    Attributes:
        path: Directory of the arrays.
        num_rows: Rows of each array.
        shard_rows: Rows of a shard.
    """

    def __init__(
        self,
        path: epath.Path,
        specs: Mapping[str, ArraySpec],
        num_rows: int,
        *,
        refuse_non_finite: bool = True,
    ):
        """Opens the arrays, created or left by an interrupted start.

        Args:
            specs: The arrays; all have the same shard size.
            num_rows: Rows of each.
            refuse_non_finite: Whether infinities and NaN are an error (they are the
                distances of neighbours that do not exist).
        """
        self.path = path
        self._specs = specs
        self.num_rows = num_rows
        self._refuses_non_finite = refuse_non_finite
        (self.shard_rows,) = {spec.shard_rows for spec in specs.values()}
        with first_alone(f"{path}: arrays"):
            self._stores = self._opened()
        # Listed once, by one process, before any writes: all must know the same.
        self._missing: list[int] = of_first(self._listed() if is_writer() else None)
        self._open: dict[int, tuple[dict[str, np.ndarray], int]] = {}
        self._pending: list[tuple[int, list[PendingWrite]]] = []

    def _opened(self) -> dict[str, ts.TensorStore]:
        return {
            name: create_array(
                self.path / name,
                shape=(self.num_rows, *spec.tail),
                dtype=spec.dtype,
                shard_rows=spec.shard_rows,
                chunk_rows=spec.chunk_rows,
            )
            for name, spec in self._specs.items()
        }

    def _listed(self) -> list[int]:
        done = frozenset.intersection(
            recorded_shards(self.path), *(finished_shards(one) for one in self._stores.values())
        )
        return [shard for shard in range(self.num_shards) if shard not in done]

    @property
    def num_shards(self) -> int:
        """Shards of each array."""
        return -(-self.num_rows // self.shard_rows)

    def missing_shards(self) -> list[int]:
        """Returns the shards that some array lacked at first, ascending.

        Raises:
            UserError: They do not fit on the disk.
        """
        rows = self.count_rows(self._missing)
        check_free_space(self.path, self.missing_bytes(), f"{self.path.name} ({rows} rows)")
        return self._missing

    def missing_bytes(self) -> int:
        """Returns what the missing shards will take on disk, uncompressed."""
        row_bytes = sum(spec.row_bytes for spec in self._specs.values())
        return self.count_rows(self._missing) * row_bytes

    def count_rows(self, shards: Iterable[int]) -> int:
        """Returns the rows of some shards."""
        return sum(self._shard_length(shard) for shard in shards)

    def rows_of(self, shard: int) -> slice:
        """Returns the rows of a shard."""
        start = shard * self.shard_rows
        return slice(start, start + self._shard_length(shard))

    def own_rows(self) -> list[slice]:
        """Returns the rows of the missing shards that this process makes."""
        return [self.rows_of(shard) for shard in share_of(self.missing_shards())]

    def _shard_length(self, shard: int) -> int:
        return min(self.shard_rows, self.num_rows - shard * self.shard_rows)

    def put(self, first_row: int, rows: Mapping[str, np.ndarray]) -> None:
        """Takes consecutive rows that lie in one shard.

        Args:
            rows: For each array its rows.

        Raises:
            RunFailed: A floating-point value is not finite.
        """
        shard, place = divmod(first_row, self.shard_rows)
        length = self._shard_length(shard)
        if shard not in self._open:
            buffers = {
                name: np.empty((length, *spec.tail), spec.dtype)
                for name, spec in self._specs.items()
            }
            self._open[shard] = (buffers, 0)
        buffers, filled = self._open[shard]
        count = len(next(iter(rows.values())))
        for name, buffer in buffers.items():
            buffer[place : place + count] = rows[name]
        self._open[shard] = (buffers, filled + count)
        if filled + count == length:
            self._write(shard, self._open.pop(shard)[0])

    def _write(self, shard: int, buffers: Mapping[str, np.ndarray]) -> None:
        if self._refuses_non_finite:
            for name, buffer in buffers.items():
                self._refuse_non_finite(name, shard, buffer)
        start = shard * self.shard_rows
        writes = [write_rows(self._stores[name], start, buffer) for name, buffer in buffers.items()]
        self._pending.append((shard, writes))
        if len(self._pending) > _MAX_PENDING_SHARDS:
            self._finish_oldest()

    def _refuse_non_finite(self, name: str, shard: int, buffer: np.ndarray) -> None:
        if not np.issubdtype(buffer.dtype, np.integer):
            bad = int(buffer.size - np.count_nonzero(np.isfinite(buffer.astype(np.float32))))
            if bad:
                raise RunFailed(
                    f"{self.path / name}: {bad} values of shard {shard} are not finite in "
                    f"{buffer.dtype.name}; set datastore.dtype to bfloat16 or float32, and look "
                    "at the decoder's loss"
                )

    def _finish_oldest(self) -> None:
        shard, writes = self._pending.pop(0)
        for write in writes:
            write.result()
        digests = {name: shard_digest(store, shard) for name, store in self._stores.items()}
        record_written(self.path, shard, digests)

    def close(self) -> dict[str, Any]:
        """Waits for all writes; returns the arrays as the manifest describes them."""
        assert not self._open, f"shards not filled: {sorted(self._open)}"
        self.flush()
        return self.describe()

    def flush(self) -> None:
        """Waits for the writes of whole shards."""
        while self._pending:
            self._finish_oldest()

    def describe(self) -> dict[str, Any]:
        """Returns shapes, dtypes and chunking for the manifest, which adds the digests."""
        return {name: describe(store) for name, store in self._stores.items()}
