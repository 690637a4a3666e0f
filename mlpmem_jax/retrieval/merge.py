"""Ordering, merging and filtering of neighbour lists. Rows are int64, NumPy only.

Every list is ordered by (distance, row), so equal distances have one answer, whatever
the number of shards or devices that found them.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

MISSING_ROW = -1
_NO_PLACE = 2**32 - 1


@dataclasses.dataclass(frozen=True)
class Neighbors:
    """Neighbours of Q queries.

    Attributes:
        distance_QK: float32 squared L2 distances, ascending; inf where there is none.
        row_QK: int64 rows of the datastore; -1 where there is none.
    """

    distance_QK: np.ndarray
    row_QK: np.ndarray

    def __len__(self) -> int:
        return len(self.row_QK)


def sortable(distance: np.ndarray, place: np.ndarray) -> np.ndarray:
    """Packs (distance, place) into uint64 whose order is lexicographic.

    Args:
        distance: float32, not negative and not NaN; inf is allowed.
        place: Integers in [0, 2**32) that break ties.

    Returns:
        uint64 of the same shape. Sorting them is several times faster than `lexsort`.
    """
    # The bits of non-negative floats are ordered as the floats; -0 becomes +0.
    bits = (distance.astype(np.float32, copy=False) + np.float32(0)).view(np.uint32)
    return (bits.astype(np.uint64) << np.uint64(32)) | place.astype(np.uint64)


def unpack(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Undoes :func:`sortable`: float32 distances and int64 places."""
    distance = (packed >> np.uint64(32)).astype(np.uint32).view(np.float32)
    return distance, (packed & np.uint64(0xFFFFFFFF)).astype(np.int64)


def sort_neighbors(distance_QK: np.ndarray, row_QK: np.ndarray) -> Neighbors:
    """Orders each list by (distance, row); NaN distances become missing.

    Args:
        distance_QK: float32, any order.
        row_QK: int64; the row of a missing neighbour is ignored.
    """
    missing = ~np.isfinite(distance_QK) | (row_QK < 0)
    distance_QK = np.where(missing, np.float32(np.inf), np.maximum(distance_QK, 0))
    row_QK = np.where(missing, MISSING_ROW, row_QK).astype(np.int64, copy=False)
    # Rows may exceed 32 bits: first by row, then by (distance, place in that order).
    by_row = np.argsort(row_QK, axis=1)
    place = np.broadcast_to(np.arange(row_QK.shape[1]), row_QK.shape)
    packed = sortable(np.take_along_axis(distance_QK, by_row, axis=1), place)
    packed.sort(axis=1)
    distance, order = unpack(packed)
    return Neighbors(
        distance, np.take_along_axis(np.take_along_axis(row_QK, by_row, axis=1), order, axis=1)
    )


def merge(parts: Sequence[Neighbors], num_neighbors: int) -> Neighbors:
    """Merges the lists that shards found for the same queries.

    Args:
        parts: One a shard; together they hold the nearest `num_neighbors` of each query.
        num_neighbors: K; lists are filled up with missing neighbours where fewer are known.
    """
    distance = np.concatenate([part.distance_QK for part in parts], axis=1)
    row = np.concatenate([part.row_QK for part in parts], axis=1)
    if len(parts) == 1:
        return fit(parts[0], num_neighbors)
    return nearest(distance, row, num_neighbors)


def nearest(distance_QK: np.ndarray, row_QK: np.ndarray, num_neighbors: int) -> Neighbors:
    """Returns the first of each list by (distance, row), in order, filled up with missing ones.

    Args:
        distance_QK: float32, any order; inf where there is no neighbour.
        row_QK: int64 rows, -1 or any where there is none.
        num_neighbors: K.
    """
    if row_QK.size and row_QK.max() >= _NO_PLACE:
        return fit(sort_neighbors(distance_QK, row_QK), num_neighbors)
    return fit(_nearest(distance_QK, row_QK, num_neighbors), num_neighbors)


def _nearest(distance_QK: np.ndarray, row_QK: np.ndarray, num_neighbors: int) -> Neighbors:
    """Returns the first of each list by (distance, row), in order; rows fit 32 bits.

    Only what stays is sorted: a quarter of the time of `sort_neighbors` for 16 lists of 1,025.
    """
    missing = ~np.isfinite(distance_QK) | (row_QK < 0)
    distance_QK = np.where(missing, np.float32(np.inf), np.maximum(distance_QK, 0))
    packed = sortable(distance_QK, np.where(missing, _NO_PLACE, row_QK))
    if num_neighbors < packed.shape[1]:
        packed = np.partition(packed, num_neighbors - 1, axis=1)[:, :num_neighbors]
    packed.sort(axis=1)
    distance, row = unpack(packed)
    return Neighbors(distance, np.where(np.isinf(distance), MISSING_ROW, row))


def of_processes(own: Neighbors) -> list[Neighbors]:
    """Returns what each process found for the same queries, on every process.

    All processes must call it, with as many queries and neighbours.
    """
    from jax.experimental import multihost_utils

    num_queries, num_neighbors = own.row_QK.shape
    # Few sizes: XLA compiles a program for each.
    padding = ((0, (1 << max(0, num_queries - 1).bit_length()) - num_queries), (0, 0))
    # JAX has no 64-bit integers here: a row travels as two of 32 bits.
    halves_QH = np.pad(np.ascontiguousarray(own.row_QK).view(np.int32), padding)
    distance_QK = np.pad(own.distance_QK, padding)
    distance_PQK, halves_PQH = (
        np.asarray(multihost_utils.process_allgather(part, tiled=False))
        for part in (distance_QK, halves_QH)
    )
    return [
        Neighbors(
            distance_QK[:num_queries],
            np.ascontiguousarray(halves_QH[:num_queries]).view(np.int64).reshape(-1, num_neighbors),
        )
        for distance_QK, halves_QH in zip(distance_PQK, halves_PQH, strict=True)
    ]


def concatenate(parts: Sequence[Neighbors]) -> Neighbors:
    """Joins the lists of consecutive queries."""
    return Neighbors(
        np.concatenate([part.distance_QK for part in parts]),
        np.concatenate([part.row_QK for part in parts]),
    )


def fit(neighbors: Neighbors, num_neighbors: int) -> Neighbors:
    """Cuts or fills lists so that each has `num_neighbors` entries."""
    extra = num_neighbors - neighbors.row_QK.shape[1]
    if extra <= 0:
        return Neighbors(
            neighbors.distance_QK[:, :num_neighbors], neighbors.row_QK[:, :num_neighbors]
        )
    widths = ((0, 0), (0, extra))
    return Neighbors(
        np.pad(neighbors.distance_QK, widths, constant_values=np.inf),
        np.pad(neighbors.row_QK, widths, constant_values=MISSING_ROW),
    )


def drop_own_row(neighbors: Neighbors, own_row_Q: np.ndarray) -> Neighbors:
    """Removes each query's own row, by number; where it is absent, the farthest entry.

    The own row may be absent: as many rows with the same key may precede it.

    Args:
        neighbors: K + 1 neighbours of each query.
        own_row_Q: int64 row number of each query.

    Returns:
        K neighbours of each query.
    """
    is_own = neighbors.row_QK == own_row_Q[:, None]
    last = neighbors.row_QK.shape[1] - 1
    dropped_Q = np.where(is_own.any(axis=1), is_own.argmax(axis=1), last)
    columns = np.arange(last)
    kept = columns + (columns >= dropped_Q[:, None])
    return Neighbors(
        np.take_along_axis(neighbors.distance_QK, kept, axis=1),
        np.take_along_axis(neighbors.row_QK, kept, axis=1),
    )


def drop(neighbors: Neighbors, is_dropped_QK: np.ndarray, num_neighbors: int) -> Neighbors:
    """Removes marked entries; the others move up.

    Args:
        neighbors: Neighbours of each query.
        is_dropped_QK: bool; which of them to remove.
        num_neighbors: Entries of each list that is returned, missing where fewer are left.
    """
    order = np.argsort(is_dropped_QK, axis=1, kind="stable")[:, :num_neighbors]
    is_gone = np.take_along_axis(is_dropped_QK, order, axis=1)
    distance = np.take_along_axis(neighbors.distance_QK, order, axis=1)
    row = np.take_along_axis(neighbors.row_QK, order, axis=1)
    kept = Neighbors(
        np.where(is_gone, np.float32(np.inf), distance), np.where(is_gone, MISSING_ROW, row)
    )
    return fit(kept, num_neighbors)


def no_neighbors(num_queries: int, num_neighbors: int) -> Neighbors:
    """Returns lists in which all neighbours are missing."""
    shape = (num_queries, num_neighbors)
    return Neighbors(np.full(shape, np.inf, np.float32), np.full(shape, MISSING_ROW, np.int64))
