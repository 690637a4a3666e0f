"""Arrays of finished artifacts: each shard is compared with the manifest when it is first read."""

from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import tensorstore as ts

from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.store.arrays import describe, open_array, read_failure
from mlpmem_jax.store.checked_json import SHARDS
from mlpmem_jax.store.digests import shard_digest, shard_key
from mlpmem_jax.store.joined import JOINED, Rows, parts_of
from mlpmem_jax.store.manifest import Artifact

_CHECKERS = ThreadPoolExecutor(8, "shards")  # Of all arrays: small reads, which overlap.


class StoredArray:
    """An array of a finished artifact. Reads go on in the background until they are asked for.

    Attributes:
        path: Directory of the array.
        shape: Rows first.
    """

    def __init__(self, artifact: Artifact, name: str):
        """Opens an array.

        Args:
            artifact: What holds it, or joins the artifacts that do.
            name: Its path in the artifact.

        Raises:
            ArtifactError: The artifact is missing or unfinished, or the array's metadata are not
                those that its manifest records.
        """
        self.path = artifact.path / name
        manifest = artifact.load()
        about = manifest.arrays.get(name) or {}
        if JOINED in about:
            self._shards = [_Shards(part, name) for part in parts_of(artifact, manifest)]
            self._rows = Rows.of(artifact)
        else:
            self._shards = [_Shards(artifact, name)]
            self._rows = Rows({}, np.asarray([[0, 0, self._shards[0].num_rows]]), (0,))
        self._firsts = self._rows.firsts
        self.shape: tuple[int, ...] = (self._rows.num_rows, *self._shards[0].tail)
        self.dtype: np.dtype[Any] = self._shards[0].dtype

    @property
    def num_rows(self) -> int:
        """Rows."""
        return self.shape[0]

    def start(self, start: int, stop: int) -> "PendingRead":
        """Begins to read rows [start, stop)."""
        first = max(0, int(np.searchsorted(self._firsts, start, "right")) - 1)
        first = min(first, len(self._rows.ranges) - 1)
        last = max(first + 1, int(np.searchsorted(self._firsts, stop, "left")))
        reads = []
        for number in range(first, last):
            part, begin, end = (int(one) for one in self._rows.ranges[number])
            shift = begin - int(self._firsts[number])
            inside = slice(max(begin, start + shift), min(end, stop + shift))
            reads.append(self._shards[part].start(inside))
        return PendingRead(reads)

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
        if len(self._rows.ranges) == 1:
            part, begin, _ = (int(one) for one in self._rows.ranges[0])
            return self._shards[part].take(row_Q + begin).result()
        range_Q = np.searchsorted(self._firsts, row_Q, "right") - 1
        part_Q = self._rows.ranges[range_Q, 0]
        place_Q = row_Q - self._firsts[range_Q] + self._rows.ranges[range_Q, 1]
        found = np.empty((len(row_Q), *self.shape[1:]), self.dtype)
        for part in np.unique(part_Q):
            found[part_Q == part] = self._shards[part].take(place_Q[part_Q == part]).result()
        return found


class _Shards:
    """An array of one artifact, whose shards are compared with its manifest."""

    def __init__(self, artifact: Artifact, name: str):
        self.path = artifact.path / name
        about = dict(artifact.load().arrays.get(name) or {})
        self._digests: list[str] = about.pop(SHARDS, [])
        self._store = open_array(self.path)
        found = describe(self._store)
        if found != about:
            raise ArtifactError(
                f"{self.path}: damaged, its metadata (zarr.json) say {found}, its manifest {about}"
            )
        self.num_rows = int(self._store.shape[0])
        self.tail: tuple[int, ...] = tuple(self._store.shape[1:])
        self.dtype: np.dtype[Any] = self._store.dtype.numpy_dtype
        self._shard_rows = int(found["shard_rows"])
        self._checks: dict[int, Future[None]] = {}

    def start(self, rows: slice) -> "_PendingRows":
        shards = np.arange(rows.start // self._shard_rows, -(-rows.stop // self._shard_rows))
        return self._begun(shards, rows)

    def take(self, row_Q: np.ndarray) -> "_PendingRows":
        return self._begun(np.unique(row_Q // self._shard_rows), row_Q)

    def _begun(self, shards: np.ndarray, rows: Any) -> "_PendingRows":
        checks = [self._check(int(shard)) for shard in shards]
        return _PendingRows(self._store, checks, self._store[rows].read())

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

    def __init__(self, parts: list["_PendingRows"]):
        self._parts = parts

    def result(self) -> np.ndarray:
        """Waits; returns the rows.

        Raises:
            ArtifactError: As `StoredArray.read`.
        """
        if len(self._parts) == 1:
            return self._parts[0].result()
        return np.concatenate([part.result() for part in self._parts])


class _PendingRows:
    """Rows of one artifact that are being read."""

    def __init__(self, store: ts.TensorStore, checks: list[Future[None]], rows: ts.Future):
        self._store = store
        self._checks = checks
        self._rows = rows

    def result(self) -> np.ndarray:
        for check in self._checks:
            check.result()
        try:
            return np.asarray(self._rows.result())
        except (ValueError, RuntimeError, OSError) as error:
            raise read_failure(self._store, error) from None
