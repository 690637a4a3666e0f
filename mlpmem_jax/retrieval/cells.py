"""Cells of keys: centroids by k-means on a mesh, the nearest cell of each key, balanced cells.

Suffixes: C centroids, then cells; B keys of a block.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mlpmem_jax.config.data import RetrievalConfig
from mlpmem_jax.parallel.sharding import AXES, replicated
from mlpmem_jax.retrieval.engine import READ_ROWS, Keys, row_ranges

ITERATIONS = 8
_SAMPLED_PER_CELL = 32
# Where the sample would take more than this, a cell has fewer rows in it.
_SAMPLE_BYTES = 1 << 30
# Fewer sampled rows than this say little of a cell.
_LEAST_SAMPLED = 8
_ROWS = 256  # Of a cell, on average: smaller ones cost more to choose than to search.
_MOST_CENTROID_BYTES = 1 << 30  # Every process holds them.
# A cell has at most so many times the mean of rows: what a query visits is bounded.
_LARGEST = 2
_CHUNK_ROWS = 1024  # Keys that a device compares with all centroids at once.
_SAMPLE_SEED = 4


def num_cells(config: RetrievalConfig, num_rows: int, width: int) -> int:
    """Returns how many cells there are, about: those that are too large are split.

    Auto: one for 256 rows, or for K + 1 if these are more, as long as centroids take a gigabyte at
    most. What a query visits does not grow with the rows then.

    Args:
        num_rows: N.
        width: D.
    """
    if config.cells != "auto":
        return min(config.cells, num_rows)
    rows = max(_ROWS, config.num_neighbors + 1)
    return max(1, min(num_rows // rows, _MOST_CENTROID_BYTES // (4 * width)))


def largest_cell(num_rows: int, cells: int) -> int:
    """Returns the rows that a cell holds at most; larger ones are split."""
    return _LARGEST * -(-num_rows // max(1, cells))


def sample_rows(num_rows: int, width: int, cells: int) -> int:
    """Returns the rows on which so many cells are trained."""
    most = max(_SAMPLE_BYTES // (4 * width), _LEAST_SAMPLED * cells)
    return min(num_rows, most, _SAMPLED_PER_CELL * cells)


def draw_sample(keys: Keys, cells: int, seed: int) -> np.ndarray:
    """Returns float32 keys of random rows, in a random order: what k-means is trained on.

    Raises:
        ArtifactError: A key is not finite.
    """
    count = sample_rows(keys.num_rows, keys.width, cells)
    generator = np.random.default_rng((seed, _SAMPLE_SEED))
    row_S = np.sort(generator.choice(keys.num_rows, size=count, replace=False))
    sample_SD = np.empty((count, keys.width), np.float32)
    for part in row_ranges(keys.num_rows, READ_ROWS):
        first, stop = np.searchsorted(row_S, (part.start, part.stop))
        if first < stop:
            key_BD = keys.read(part.start, part.stop)
            sample_SD[first:stop] = key_BD[row_S[first:stop] - part.start]
    return sample_SD[generator.permutation(count)]


def train_centroids(sample_SD: np.ndarray, cells: int, mesh: Mesh) -> np.ndarray:
    """Returns float32 [C, D]: centroids of a sample whose rows are in random order.

    Lloyd's iterations over all devices of the mesh. The first are rows of the sample; a centroid
    that no row is nearest to moves to one of the rows that are farthest from theirs.

    Args:
        cells: C, at most as many as rows.
        mesh: Devices, each with its share of the sample.
    """
    count, width = sample_SD.shape
    # A power of two: small samples of many sizes share few programs.
    chunk = min(_CHUNK_ROWS, 1 << (-(-count // mesh.size) - 1).bit_length())
    padded = np.zeros((_round_up(count, mesh.size * chunk), width), np.float32)
    # Centred: products round less.
    mean_D = sample_SD.mean(axis=0, dtype=np.float64).astype(np.float32)
    padded[:count] = sample_SD - mean_D
    weight_S = (np.arange(len(padded)) < count).astype(np.float32)
    split = NamedSharding(mesh, PartitionSpec(AXES))
    sample, weight = (
        jax.make_array_from_callback(one.shape, split, functools.partial(_at, one))
        for one in (padded, weight_S)
    )
    first = padded[:cells]
    centroid = jax.make_array_from_callback(
        first.shape, replicated(mesh), functools.partial(_at, first)
    )
    for _ in range(ITERATIONS):
        centroid = _iteration(sample, weight, centroid, mesh=mesh, chunk=chunk)
    return np.asarray(centroid.addressable_data(0)) + mean_D


def _at(array: np.ndarray, index: Any) -> np.ndarray:
    return array[index]


@functools.partial(jax.jit, static_argnames=("mesh", "chunk"))
def _iteration(
    sample_SD: jax.Array, weight_S: jax.Array, centroid_CD: jax.Array, *, mesh: Mesh, chunk: int
) -> jax.Array:
    cells, width = centroid_CD.shape

    def local(sample_SD: jax.Array, weight_S: jax.Array, centroid_CD: jax.Array) -> Any:
        def part(sums: Any, one: Any) -> tuple[Any, jax.Array]:
            key_BD, weight_B = one
            cell_B, distance_B = _nearest(key_BD, centroid_CD)
            # A product, not a scatter: its order of summation is the same each time.
            member_BC = jax.nn.one_hot(cell_B, cells) * weight_B[:, None]
            sum_CD = jnp.einsum("bc,bd->cd", member_BC, key_BD, precision=lax.Precision.HIGHEST)
            return (sums[0] + sum_CD, sums[1] + member_BC.sum(axis=0)), distance_B

        empty = jnp.zeros((cells, width)), jnp.zeros(cells)
        empty = jax.tree.map(lambda x: lax.pcast(x, AXES, to="varying"), empty)
        parts = sample_SD.reshape(-1, chunk, width), weight_S.reshape(-1, chunk)
        sums, distance = lax.scan(part, empty, parts)
        far_S = jnp.where(weight_S > 0, distance.reshape(-1), -jnp.inf)
        return *(lax.psum(one, AXES) for one in sums), far_S

    by_device = PartitionSpec(AXES)
    sum_CD, count_C, far_S = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(by_device, by_device, PartitionSpec()),
        out_specs=(PartitionSpec(), PartitionSpec(), by_device),
    )(sample_SD, weight_S, centroid_CD)
    mean_CD = sum_CD / jnp.maximum(1, count_C)[:, None]
    _, farthest_C = lax.top_k(lax.with_sharding_constraint(far_S, replicated(mesh)), cells)
    is_empty_C = count_C == 0
    rank_C = jnp.maximum(0, jnp.cumsum(is_empty_C) - 1)
    seed_CD = lax.with_sharding_constraint(sample_SD[farthest_C[rank_C]], replicated(mesh))
    return jnp.where(is_empty_C[:, None], seed_CD, mean_CD)


def _nearest(key_BD: jax.Array, centroid_CD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the nearest centroid of each key, int32 [B], and its squared distance."""
    product_BC = jnp.einsum("bd,cd->bc", key_BD, centroid_CD, precision=lax.Precision.HIGHEST)
    score_BC = jnp.square(centroid_CD).sum(axis=1)[None, :] - 2 * product_BC
    cell_B = jnp.argmin(score_BC, axis=1).astype(jnp.int32)
    distance_B = jnp.square(key_BD - centroid_CD[cell_B]).sum(axis=1)
    return cell_B, distance_B


class Assigner:
    """Finds the nearest centroid of keys, on all devices of a mesh.

    Args:
        centroid_CD: float32.
        mesh: Devices of one process.
    """

    def __init__(self, centroid_CD: np.ndarray, mesh: Mesh):
        self._mean_D = centroid_CD.mean(axis=0, dtype=np.float64).astype(np.float32)
        self._rows = mesh.size * _CHUNK_ROWS
        self._split = NamedSharding(mesh, PartitionSpec(AXES))
        self._centroid = jax.device_put(centroid_CD - self._mean_D, replicated(mesh))
        self._assign = jax.jit(
            lambda key_BD, centroid_CD: _nearest(key_BD, centroid_CD)[0], out_shardings=self._split
        )

    def __call__(self, key_BD: np.ndarray) -> np.ndarray:
        """Returns int32 [B]; of equally near centroids the first."""
        cell_B = np.empty(len(key_BD), np.int32)
        for part in row_ranges(len(key_BD), self._rows):
            padded = np.zeros((self._rows, key_BD.shape[1]), np.float32)
            padded[: part.stop - part.start] = key_BD[part] - self._mean_D
            found = self._assign(jax.device_put(padded, self._split), self._centroid)
            cell_B[part] = np.asarray(found)[: part.stop - part.start]
        return cell_B


def balanced(count_C: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits cells that are too large into parts of nearly equal size; drops empty ones.

    Args:
        count_C: Rows nearest to each centroid.
        most: Rows of a cell, at most.

    Returns:
        The centroid of each cell, int64 [C'], ascending, and the first place of each cell and the
        end of the last, int64 [C' + 1]: rows lie in the order of centroids.
    """
    parts_C = -(-count_C // most)
    centroid_C = np.repeat(np.arange(len(count_C)), parts_C)
    first_C = np.cumsum(parts_C) - parts_C
    number_C = np.arange(len(centroid_C)) - first_C[centroid_C]
    offset_C = np.cumsum(count_C) - count_C
    inside_C = count_C[centroid_C] * number_C // parts_C[centroid_C]
    return centroid_C, np.append(offset_C[centroid_C] + inside_C, count_C.sum())


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
