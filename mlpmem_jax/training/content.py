"""A digest of a checkpoint's arrays: Orbax writes times and random names into its files."""

import hashlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mlpmem_jax.parallel.agreement import of_all

_BLOCK_ELEMENTS = 1 << 20
_ODD = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))  # The finalizer of SplitMix64.


def digest_of(items: Mapping[str, Mapping[str, jax.Array]]) -> str:
    """Returns 16 hexadecimal digits that identify arrays, bit for bit.

    They do not depend on the mesh: the bits of the elements are summed, each times a key of its
    place, modulo 2^64. Each process reads its own shards; all processes must call it.

    Args:
        items: Arrays by name, by item of a checkpoint.
    """
    arrays = {f"{item}/{name}": a for item, part in items.items() for name, a in part.items()}
    names = sorted(arrays)
    sums = of_all([_sum_of_shards(arrays[name]) for name in names])
    digest = hashlib.blake2b(digest_size=8)
    for name, *parts in zip(names, *sums, strict=True):
        about = (name, arrays[name].shape, str(arrays[name].dtype), sum(parts) % (1 << 64))
        digest.update(repr(about).encode())
    return digest.hexdigest()


def _sum_of_shards(array: jax.Array) -> int:
    shards = (shard for shard in array.addressable_shards if shard.replica_id == 0)
    return sum(_sum_of(shard, array.shape) for shard in shards) % (1 << 64)


def _sum_of(shard: Any, shape: tuple[int, ...]) -> int:
    """Returns the sum over a shard's elements: bits times keys of row and column."""
    data, shape = np.atleast_1d(np.asarray(shard.data)), shape or (1,)
    *above, columns = (
        np.arange(size, dtype=np.uint64)[part]
        for size, part in zip(shape, shard.index or (slice(None),), strict=True)
    )
    rows = np.zeros(1, np.uint64)  # Row-major numbers, of all dims but the last.
    for size, along in zip(shape[:-1], above, strict=True):
        rows = (rows[:, None] * np.uint64(size) + along).reshape(-1)
    bits = np.ascontiguousarray(data).view(f"uint{8 * data.dtype.itemsize}")
    bits = bits.reshape(len(rows), len(columns))
    row_keys, column_keys = _keys(2 * rows), _keys(2 * columns + np.uint64(1))
    step = max(1, _BLOCK_ELEMENTS // max(1, len(columns)))
    blocks = (slice(start, start + step) for start in range(0, len(rows), step))
    return sum(int((bits[b].astype(np.uint64) @ column_keys) @ row_keys[b]) for b in blocks)


def _keys(numbers: np.ndarray) -> np.ndarray:
    """Returns pseudorandom odd multipliers, uint64."""
    keys = (numbers + np.uint64(1)) * _ODD
    for shift, factor in _FACTORS:
        keys = (keys ^ (keys >> np.uint64(shift))) * np.uint64(factor)
    return (keys ^ (keys >> np.uint64(31))) | np.uint64(1)
