"""Centroids with groups above them: cells stay small however many rows there are.

A key is compared with the groups, and then with the centroids around the nearest one.

Suffixes: C centroids, G groups, M centroids around a group, S sampled rows, B keys of a block, Q
queries, V centroids that are wanted.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jax.sharding import Mesh

from mlpmem_jax.config.networks import MeshConfig
from mlpmem_jax.parallel.agreement import array_of_first
from mlpmem_jax.parallel.mesh import make_mesh
from mlpmem_jax.retrieval.cells import Assigner, train_centroids
from mlpmem_jax.retrieval.distances import squared_distances
from mlpmem_jax.retrieval.engine import row_ranges
from mlpmem_jax.retrieval.merge import nearest

# A query is compared with so many centroids; up to so many there is one group, and it is compared
# with all.
_AROUND = 2048
# A key with fewer, to find the cell that it belongs to.
_AROUND_TO_ASSIGN = 512
_FINENESS = 4  # Groups are so many times √C.
_SAMPLED_PER_GROUP = 64
_SCORES = 1 << 23  # Of queries and centroids at once.
_SPARE = 8  # Compared again by differences, so that rounding decides nothing.


def num_groups(cells: int) -> int:
    """Returns the groups of so many centroids."""
    return 1 if cells <= _AROUND else _FINENESS * math.isqrt(cells)


def compared(cells: int, *, is_query: bool = True) -> int:
    """Returns the products that choosing among so many centroids takes, of a query or a key."""
    if num_groups(cells) == 1:
        return cells
    return num_groups(cells) + (_AROUND if is_query else _AROUND_TO_ASSIGN)


@dataclasses.dataclass(frozen=True)
class Centroids:
    """Centroids of cells, and of groups of these.

    Attributes:
        centroid_CD: float32.
        group_GD: float32; a single one: all centroids are compared.
        around_GM: The centroids nearest to each group, nearest first, int32; none if it is one.
    """

    centroid_CD: np.ndarray
    group_GD: np.ndarray
    around_GM: np.ndarray

    @classmethod
    def of(cls, centroid_CD: np.ndarray, group_GD: np.ndarray) -> "Centroids":
        """Returns centroids with what is around each group."""
        count = min(_AROUND, len(centroid_CD)) if len(group_GD) > 1 else 0
        around_GM = np.empty((len(group_GD), count), np.int32)
        if count:
            scorer = _Scorer(centroid_CD)
            for part in _parts(len(group_GD), len(centroid_CD)):
                score_GC = scorer(group_GD[part])
                number_GM = np.argpartition(score_GC, count - 1, axis=1)[:, :count]
                score_GM = np.take_along_axis(score_GC, number_GM, axis=1)
                order_GM = np.lexsort((number_GM, score_GM), axis=1)
                around_GM[part] = np.take_along_axis(number_GM, order_GM, axis=1)
        return cls(centroid_CD, group_GD, around_GM)

    def nearest(self, query_QD: np.ndarray, count: int) -> np.ndarray:
        """Returns the nearest centroids in order of distance, int64 [Q, V].

        With several groups, the nearest of those around the group that is nearest to a query;
        if more than a quarter of these are wanted, of all.
        """
        if len(self.group_GD) == 1 or 4 * count > _AROUND:
            return _nearest(query_QD, self.centroid_CD, count)
        number_QV = np.empty((len(query_QD), count), np.int64)
        group_Q = _nearest(query_QD, self.group_GD, 1)[:, 0]
        for group, place_Q in members(group_Q):
            around_M = np.sort(self.around_GM[group])
            found_QV = _nearest(query_QD[place_Q], self.centroid_CD[around_M], count)
            number_QV[place_Q] = around_M[found_QV]
        return number_QV

    def assigned(self, key_BD: np.ndarray, group_B: np.ndarray) -> np.ndarray:
        """Returns the nearest of few centroids around the group of each key, int32 [B]."""
        number_B = np.empty(len(key_BD), np.int32)
        for group, place_B in members(group_B):
            around_M = np.sort(self.around_GM[group, :_AROUND_TO_ASSIGN])
            score_BM = _Scorer(self.centroid_CD[around_M])(key_BD[place_B])
            number_B[place_B] = around_M[score_BM.argmin(axis=1)]
        return number_B


def one_group(centroid_CD: np.ndarray) -> Centroids:
    """Returns centroids that are all compared."""
    return Centroids.of(centroid_CD, centroid_CD.mean(axis=0, keepdims=True))


def train(sample_SD: np.ndarray, cells: int, mesh: Mesh) -> Centroids:
    """Trains centroids by k-means: of groups on a part of the sample, then inside each group.

    Args:
        sample_SD: float32 keys in a random order, the same in all processes.
        cells: C; of several groups each has a power of two, and C is met on average.
        mesh: Devices of all processes, each with its share of the sample.
    """
    if num_groups(cells) == 1:
        return one_group(train_centroids(sample_SD, cells, mesh))
    groups = min(num_groups(cells), len(sample_SD))
    group_GD = train_centroids(sample_SD[: _SAMPLED_PER_GROUP * groups], groups, mesh)
    # The groups decide what all processes train together: they must not differ by a rounding.
    group_S = array_of_first(Assigner(group_GD, local_mesh())(sample_SD))
    inside = []
    for _, row_S in members(group_S):  # Still in a random order.
        count = _power_of_two(cells * len(row_S), len(sample_SD))
        inside.append(train_centroids(sample_SD[row_S], min(count, len(row_S)), mesh))
    return Centroids.of(np.concatenate(inside), group_GD)


def _power_of_two(number: int, divisor: int) -> int:
    """Returns the power of two that is nearest to a quotient, and at least one."""
    return 1 << max(0, round(math.log2(number / divisor)))


def local_mesh() -> Mesh:
    """Returns a mesh of the devices of this process."""
    local = jax.local_devices()
    return make_mesh(MeshConfig(data=len(local)), local)


def assigner(centroids: Centroids, mesh: Mesh) -> Callable[[np.ndarray], np.ndarray]:
    """Returns a function from float32 keys [B, D] to the centroid of each, int32 [B].

    Args:
        centroids: With one group the nearest is found on the mesh, otherwise the nearest group.
        mesh: Devices of one process.
    """
    if len(centroids.group_GD) == 1:
        return Assigner(centroids.centroid_CD, mesh)
    group_of = Assigner(centroids.group_GD, mesh)
    return lambda key_BD: centroids.assigned(key_BD, group_of(key_BD))


def members(group_N: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields each number that occurs, and its places in order."""
    order_N = np.argsort(group_N, kind="stable")
    found, first = np.unique(group_N[order_N], return_index=True)
    return zip(found.tolist(), np.split(order_N, first)[1:], strict=True)


class _Scorer:
    """Gives squared distances from some centroids, up to a constant of the query."""

    def __init__(self, centroid_CD: np.ndarray):
        self._mean_D = centroid_CD.mean(axis=0)  # Centred: products round less.
        self._centred_CD = centroid_CD - self._mean_D
        self._norm_C = np.einsum("cd,cd->c", self._centred_CD, self._centred_CD)

    def __call__(self, query_QD: np.ndarray) -> np.ndarray:
        """Returns float32 [Q, C]."""
        score_QC = (-2 * (query_QD - self._mean_D)) @ self._centred_CD.T
        score_QC += self._norm_C
        return score_QC


def _nearest(query_QD: np.ndarray, centroid_CD: np.ndarray, count: int) -> np.ndarray:
    """Returns the nearest of some centroids in order of distance, int64 [Q, V]."""
    kept, scorer = min(count + _SPARE, len(centroid_CD)), _Scorer(centroid_CD)
    number_QV = np.empty((len(query_QD), kept), np.int64)
    for part in _parts(len(query_QD), len(centroid_CD)):
        number_QV[part] = np.argpartition(scorer(query_QD[part]), kept - 1, axis=1)[:, :kept]
    distance_QV = squared_distances(query_QD, centroid_CD, number_QV)
    return nearest(distance_QV, number_QV, count).row_QK


def _parts(num_queries: int, cells: int) -> Iterator[slice]:
    return row_ranges(num_queries, max(1, _SCORES // cells))
