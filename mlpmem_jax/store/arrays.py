"""Arrays on disk: zarr v3 through TensorStore, sharded, with checksums.

A shard is one file and has one writer; it is written whole, so a kill leaves it absent or
complete. A missing shard is an error on reading, never a fill value.
"""

import errno
import os
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts
from etils import epath

from mlpmem_jax.errors import ArtifactError, UserError
from mlpmem_jax.failures import os_error_in
from mlpmem_jax.store.files import has_locks, is_local

DTYPES: Mapping[str, Any] = {
    "float16": np.float16,
    "bfloat16": ml_dtypes.bfloat16,
    "float32": np.float32,
}
# Of a bucket whose server does not do what it is asked now.
_UNREACHABLE = (
    "UNAVAILABLE", "DEADLINE_EXCEEDED", "ABORTED", "CANCELLED", "RESOURCE_EXHAUSTED",
    "UNAUTHENTICATED",
)  # fmt: skip
# Zeros are data: without this an all-zero shard would not be written.
_WRITTEN: dict[str, Any] = {"store_data_equal_to_fill_value": True}
_DRIVERS = {"gs": "gcs"}  # TensorStore's names, where they are not the scheme of URLs.


def kvstore_spec(path: str | epath.Path) -> dict[str, Any]:
    """Returns TensorStore's specification of a directory as a store of keys."""
    text = str(path).rstrip("/") + "/"
    if is_local(text):
        spec: dict[str, Any] = {"driver": "file", "path": text}
        # TensorStore locks what it writes, and would call a file system without locks damaged.
        return spec if has_locks(path) else spec | {"file_io_locking": {"mode": "none"}}
    # In its parts: TensorStore would read %, ? and # of a URL otherwise than etils does.
    scheme, _, rest = text.partition("://")
    bucket, _, inside = rest.partition("/")
    return {"driver": _DRIVERS.get(scheme, scheme), "bucket": bucket, "path": inside}


def _codecs(chunk_shape: list[int]) -> list[dict[str, Any]]:
    checked_bytes = [
        {"name": "bytes", "configuration": {"endian": "little"}},
        {"name": "crc32c"},
    ]
    return [
        {
            "name": "sharding_indexed",
            "configuration": {
                "chunk_shape": chunk_shape,
                "codecs": checked_bytes,
                "index_codecs": checked_bytes,
            },
        }
    ]


def create_array(
    path: str | epath.Path,
    *,
    shape: tuple[int, ...],
    dtype: Any,
    shard_rows: int,
    chunk_rows: int,
) -> ts.TensorStore:
    """Creates an array, or opens the one that an interrupted start left.

    Args:
        shape: Rows first.
        dtype: NumPy dtype, `ml_dtypes.bfloat16` included.
        shard_rows: Rows of a shard, the unit of writing.
        chunk_rows: Rows of the smallest readable piece; divides `shard_rows`.

    Returns:
        An array open for reading and writing.
    """
    tail = [max(1, n) for n in shape[1:]]
    metadata = {
        "shape": list(shape),
        "data_type": np.dtype(dtype).name,
        "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [shard_rows, *tail]}},
        "codecs": _codecs([chunk_rows, *tail]),
    }
    return _opened(path, _WRITTEN | {"metadata": metadata}, create=True, open=True)


def continue_array(path: str | epath.Path) -> ts.TensorStore:
    """Opens an array that is there already for reading and writing.

    Raises:
        ArtifactError: There is none, or its metadata is damaged.
    """
    return _opened(path, _WRITTEN, open=True)


def open_array(path: str | epath.Path) -> ts.TensorStore:
    """Opens an array for reading.

    Raises:
        ArtifactError: There is none, or its metadata is damaged.
    """
    return _opened(path, {"fill_missing_data_reads": False}, open=True, read=True)


def _opened(path: str | epath.Path, options: Mapping[str, Any], **mode: Any) -> ts.TensorStore:
    spec = {"driver": "zarr3", "kvstore": kvstore_spec(path), **options}
    try:
        return ts.open(spec, **mode).result()
    except (ValueError, RuntimeError, OSError) as error:
        raise storage_error(path, error) from None


def storage_error(path: str | epath.Path, error: Exception) -> Exception:
    """Returns what TensorStore's error means: the machine's, the server's, or damage."""
    of_system = os_error_in(error, path)
    if of_system is not None:
        return of_system
    text = re.split(r" \[(?:source locations|\w*spec)=", str(error))[0]
    if text.startswith(_UNREACHABLE):
        return UserError(f"{path}: cannot be reached ({text}); start the same command again")
    if "PERMISSION_DENIED" in text:
        return PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    if "NOT_FOUND" in text:
        return ArtifactError(f"{path}: a part is missing ({text})")
    return ArtifactError(f"{path}: damaged or unreadable ({text})")


def read_failure(store: ts.TensorStore, error: Exception, part: str = "") -> Exception:
    """Returns what a failed read of an array, or of a part of it, is to its user."""
    return storage_error(array_path(store) + part, error)


def read_rows(store: ts.TensorStore, start: int, stop: int) -> np.ndarray:
    """Reads rows [start, stop).

    Raises:
        ArtifactError: A shard is missing, truncated or damaged; the message names it.
    """
    try:
        return np.asarray(store[start:stop].read().result())
    except (ValueError, RuntimeError, OSError) as error:
        raise read_failure(store, error) from None


def array_path(store: ts.TensorStore) -> str:
    """Returns the directory of an open array."""
    if not store.kvstore:
        return "array"
    spec = store.kvstore.spec().to_json()
    schemes = {driver: scheme for scheme, driver in _DRIVERS.items()}
    scheme = schemes.get(spec["driver"], spec["driver"])
    root = f"{scheme}://{spec['bucket']}/" if "bucket" in spec else ""
    return f"{root}{spec['path']}".rstrip("/")


def write_rows(store: ts.TensorStore, start: int, array: np.ndarray) -> "PendingWrite":
    """Begins to write rows from `start` on; whole shards only (the last may be short)."""
    return PendingWrite(store, store[start : start + len(array)].write(array))


class PendingWrite:
    """A write under way."""

    def __init__(self, store: ts.TensorStore, futures: ts.WriteFutures):
        self._store = store
        self._futures = futures

    def result(self) -> None:
        """Waits until the rows are on disk.

        Raises:
            OSError: The disk is full, or may not be written.
        """
        try:
            self._futures.result()
        except (ValueError, RuntimeError, OSError) as error:
            raise storage_error(array_path(self._store), error) from None


def finished_shards(store: ts.TensorStore) -> frozenset[int]:
    """Returns the numbers of the shards that are on disk; other files are no shards."""
    assert store.kvstore is not None
    keys = (key.decode(errors="replace") for key in store.kvstore.list().result())
    shard = re.compile(r"c/([0-9]+)" + "/0" * (len(store.shape) - 1))
    return frozenset(int(found[1]) for key in keys if (found := shard.fullmatch(key)))


def chunking(store: ts.TensorStore) -> tuple[int, int]:
    """Returns the rows of a shard and those of a chunk."""
    shapes = store.chunk_layout.write_chunk.shape, store.chunk_layout.read_chunk.shape
    shard_rows, chunk_rows = (int((shape or (0,))[0] or 0) for shape in shapes)
    return shard_rows, chunk_rows


def describe(store: ts.TensorStore) -> dict[str, Any]:
    """Returns shape, dtype and chunking, as manifests record them."""
    shard_rows, chunk_rows = chunking(store)
    return {
        "shape": list(store.shape),
        "dtype": store.dtype.name,
        "shard_rows": shard_rows,
        "chunk_rows": chunk_rows,
    }
