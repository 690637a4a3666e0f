"""Arrays of finished artifacts: each shard is compared with the manifest when it is first read."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorstore as ts

from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.store.arrays import describe, open_array, read_failure
from mlpmem_jax.store.checked_json import SHARDS
from mlpmem_jax.store.digests import shard_digest, shard_key
from mlpmem_jax.store.manifest import Artifact

_CHECKERS = ThreadPoolExecutor(8, "shards")  # Of all arrays: small reads, which overlap.


class StoredArray:
    """An array of a finished artifact. Reads go on in the background until they are asked for.

    Attributes:
        path: Directory of the array.
        shape: Rows first.
        dtype: NumPy dtype.
    """

    def __init__(self, artifact: Artifact, name: str):
        """Opens an array.

        Args:
            artifact: What holds it.
            name: Its path in the artifact.

        Raises:
            ArtifactError: The artifact is missing or unfinished, or the array's metadata are not
                those that its manifest records.
        """
        self.path = artifact.path / name
        about = dict(artifact.load().arrays.get(name) or {})
        self._digests: list[str] = about.pop(SHARDS, [])
        self._store = open_array(self.path)
        found = describe(self._store)
        if found != about:
            raise ArtifactError(
                f"{self.path}: damaged, its metadata (zarr.json) say {found}, its manifest {about}"
            )
        self.shape: tuple[int, ...] = tuple(self._store.shape)
        self.dtype: np.dtype[Any] = self._store.dtype.numpy_dtype
        self._shard_rows = int(found["shard_rows"])
        self._checks: dict[int, Future[None]] = {}

    @property
    def num_rows(self) -> int:
        """Rows."""
        return self.shape[0]

    def start(self, start: int, stop: int) -> "PendingRead":
        """Begins to read rows [start, stop)."""
        shards = np.arange(start // self._shard_rows, -(-stop // self._shard_rows))
        return self._begun(shards, slice(start, stop))

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns rows [start, stop).

        Raises:
            ArtifactError: A shard is missing, damaged or another one; it is named.
        """
        return self.start(start, stop).result()

    def read_all(self) -> np.ndarray:
        """Returns all rows; raises as `read`."""
        return self.read(0, self.num_rows)

    def take(self, row_Q: np.ndarray) -> np.ndarray:
        """Returns single rows (int64 numbers); raises as `read`."""
        return self._begun(np.unique(row_Q // self._shard_rows), row_Q).result()

    def _begun(self, shards: np.ndarray, rows: Any) -> "PendingRead":
        checks = [self._check(int(shard)) for shard in shards]
        return PendingRead(self._store, checks, self._store[rows].read())

    def _check(self, shard: int) -> Future[None]:
        if shard not in self._checks:  # Twice, by two threads, does no harm.
            self._checks[shard] = _CHECKERS.submit(self._compare, shard)
        return self._checks[shard]

    def _compare(self, shard: int) -> None:
        found = shard_digest(self._store, shard)
        expected = self._digests[shard] if shard < len(self._digests) else "none"
        if found != expected:
            raise ArtifactError(
                f"{self.path}/{shard_key(self._store, shard)}: not the shard that was written "
                f"(digest {found}, its manifest has {expected}): changed, or from elsewhere"
            )


class PendingRead:
    """A read under way."""

    def __init__(self, store: ts.TensorStore, checks: list[Future[None]], rows: ts.Future):
        self._store = store
        self._checks = checks
        self._rows = rows

    def result(self) -> np.ndarray:
        """Waits; returns the rows.

        Raises:
            ArtifactError: As `StoredArray.read`.
        """
        for check in self._checks:
            check.result()
        try:
            return np.asarray(self._rows.result())
        except (ValueError, RuntimeError, OSError) as error:
            raise read_failure(self._store, error) from None
