"""Arrays of unknown length, written a whole shard at a time."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from mlpmem_jax.store.arrays import continue_array, create_array, describe, write_rows
from mlpmem_jax.store.checked_json import SHARDS
from mlpmem_jax.store.digests import shard_digest


class Appender:
    """Writes one array.

    Between two appends `state` is everything needed to continue after a kill: rows on disk, the
    digests of their shards, and the rows of the unfinished shard.
    """

    def __init__(
        self,
        path: str | epath.Path,
        dtype: Any,
        shard_rows: int,
        chunk_rows: int,
        width: int | None = None,
        state: Mapping[str, np.ndarray] | None = None,
    ):
        self._dtype = np.dtype(dtype)
        self._tail = () if width is None else (width,)
        self._shard_rows = shard_rows
        rows = 0 if state is None else int(state["rows"])
        if state is None:
            epath.Path(path).rmtree(missing_ok=True)
            shape = (0, *self._tail)
            self._store = create_array(
                path, shape=shape, dtype=dtype, shard_rows=shard_rows, chunk_rows=chunk_rows
            )
        else:
            self._store = continue_array(path)
        self._rows = rows
        self._digests: list[str] = [] if state is None else [str(one) for one in state["digests"]]
        self._pending: list[np.ndarray] = []
        self._num_pending = 0
        if state is not None:
            self._add(np.asarray(state["remainder"], self._dtype))

    def _add(self, rows: np.ndarray) -> None:
        if len(rows):
            self._pending.append(rows)
            self._num_pending += len(rows)

    @property
    def rows(self) -> int:
        """Rows appended so far."""
        return self._rows + self._num_pending

    def append(self, rows: np.ndarray | list[int]) -> bool:
        """Adds rows; returns whether a shard was written, so that `state` is worth saving."""
        self._add(np.asarray(rows, self._dtype))
        if self._num_pending < self._shard_rows:
            return False
        self._flush(self._num_pending - self._num_pending % self._shard_rows)
        return True

    def _flush(self, count: int) -> None:
        rows = np.concatenate(self._pending) if self._pending else np.empty((0, *self._tail))
        stop = self._rows + count
        if stop > self._store.shape[0]:
            bound = [stop, *self._tail]
            self._store = self._store.resize(exclusive_max=bound, expand_only=True).result()
        if count:
            write_rows(self._store, self._rows, rows[:count].astype(self._dtype)).result()
        first = self._rows // self._shard_rows
        self._digests += [
            shard_digest(self._store, shard) for shard in range(first, -(-stop // self._shard_rows))
        ]
        self._rows = stop
        # A copy: a slice would keep the whole concatenation alive.
        self._pending = [rows[count:].copy()] if len(rows) > count else []
        self._num_pending -= count

    def state(self) -> dict[str, np.ndarray]:
        """Returns what a later Appender needs to continue."""
        remainder = (
            np.concatenate(self._pending)
            if self._pending
            else np.empty((0, *self._tail), self._dtype)
        )
        return {
            "rows": np.array(self._rows, np.int64),
            "remainder": remainder,
            "digests": np.array(self._digests, "U16"),
        }

    def close(self) -> int:
        """Writes the last, short shard and returns the number of rows."""
        self._flush(self._num_pending)
        if self._rows < self._store.shape[0]:  # A longer array of an earlier, killed start.
            self._store = self._store.resize(exclusive_max=[self._rows, *self._tail]).result()
        return self._rows

    def describe(self) -> dict[str, Any]:
        """Returns what manifests record of the array."""
        return describe(self._store) | {SHARDS: self._digests}
