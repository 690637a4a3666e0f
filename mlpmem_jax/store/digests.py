"""What identifies a shard, at the price of a few bytes of it.

A shard file (zarr v3, `sharding_indexed`) holds its chunks, each followed by four bytes of
crc32c, then an index of 16 bytes a chunk (offset, size) and the index's own crc32c. The sizes
and the chunks' checksums together say what the shard holds: two shards that differ in one value
differ in them. Whether a chunk matches its checksum is what TensorStore looks at when it reads
the chunk; that it is the right shard, with the right chunks, is said by the digest.
"""

import functools
import hashlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorstore as ts

from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.store.arrays import array_path, chunking, read_failure
from mlpmem_jax.store.files import is_local

_CHECKSUM_BYTES = 4
_ENTRY_BYTES = 16
_NO_CHUNK = np.iinfo(np.uint64).max

# So small a shard is read at once: many small reads take longer, above all in buckets.
_WHOLE_BYTES = 4 << 20

# Ranges [start, stop) of a file to their bytes; a negative start counts from its end.
_Ranges = Sequence[tuple[int, int | None]]
_Read = Callable[[_Ranges], list[bytes]]


def shard_key(store: ts.TensorStore, shard: int) -> str:
    """Returns the file of a shard, in the directory of its array."""
    return "/".join(["c", str(shard), *["0"] * (len(store.shape) - 1)])


def shard_digest(store: ts.TensorStore, shard: int) -> str:
    """Returns 16 hexadecimal digits that identify the content of a shard.

    Raises:
        ArtifactError: It is missing, or too damaged to have a digest; it is named.
    """
    key = shard_key(store, shard)
    path = f"{array_path(store)}/{key}"
    try:
        if is_local(path):
            with open(path, "rb", buffering=0) as file:
                return _digest(store, lambda ranges: _read_local(file.fileno(), ranges))
        return _digest(store, lambda ranges: _read_remote(store.kvstore, key, ranges))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: missing, though its manifest lists it") from None
    except (ValueError, RuntimeError) as error:
        raise read_failure(store, error, f"/{key}") from None


def _digest(store: ts.TensorStore, read: _Read) -> str:
    shard_rows, chunk_rows = chunking(store)
    num_chunks = shard_rows // chunk_rows
    row_bytes = int(np.prod(store.shape[1:], dtype=np.int64)) * store.dtype.numpy_dtype.itemsize
    if shard_rows * row_bytes <= _WHOLE_BYTES:
        (content,) = read([(0, None)])
        read = functools.partial(_slices, content)
    index_bytes = num_chunks * _ENTRY_BYTES
    (tail,) = read([(-index_bytes - _CHECKSUM_BYTES, None)])
    if len(tail) != index_bytes + _CHECKSUM_BYTES:
        raise ValueError(f"{len(tail)} bytes are too few for its index")
    index = np.frombuffer(tail, "<u8", count=2 * num_chunks).reshape(num_chunks, 2)
    ends = index.sum(axis=1, dtype=np.uint64)[index[:, 0] != _NO_CHUNK].tolist()
    checksums = [b""]
    if min(ends, default=0) >= _CHECKSUM_BYTES:
        checksums = read([(end - _CHECKSUM_BYTES, end) for end in ends])
    if any(len(each) != _CHECKSUM_BYTES for each in checksums):
        raise ValueError("its index points beyond its ends")
    digest = hashlib.blake2b(index[:, 1].tobytes(), digest_size=8)
    digest.update(b"".join(checksums))
    return digest.hexdigest()


def _slices(content: bytes, ranges: _Ranges) -> list[bytes]:
    return [content[slice(*each)] for each in ranges]


def _read_local(descriptor: int, ranges: _Ranges) -> list[bytes]:
    size = os.fstat(descriptor).st_size
    found = []
    for start, stop in ranges:
        first = max(0, size + start if start < 0 else start)
        last = size if stop is None else min(stop, size)
        found.append(os.pread(descriptor, max(0, last - first), first) if first < size else b"")
    return found


def _read_remote(kvstore: Any, key: str, ranges: _Ranges) -> list[bytes]:
    # All at once: each is a request of its own.
    reads = [kvstore.read(key, byte_range=slice(*each)) for each in ranges]
    results = [read.result() for read in reads]
    if any(result.state == "missing" for result in results):
        raise FileNotFoundError(key)
    return [result.value for result in results]
