"""Exact nearest neighbours on accelerators: products, two-level top-k, distances once more.

Runs on every device of a mesh for its own keys; the lists are merged on the devices too.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from mlpmem_jax.parallel.sharding import AXES, replicated

LARGEST_GROUP, SMALL_GROUP = 64, 8
# More rows than asked are scored again by differences, so that rounding in the product
# and equal distances cannot push out a neighbour.
SPARE = 32


@functools.partial(jax.jit, static_argnames="mesh")
def mean_and_norms(
    key_ND: jax.Array, count_P: jax.Array, *, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """Returns the mean of each device's keys, [P, D], and ‖key − mean‖² of all, [N]."""

    def local(key_ND: jax.Array, count_1: jax.Array) -> tuple[jax.Array, jax.Array]:
        key_ND = key_ND.astype(jnp.float32)
        is_real_N = jnp.arange(len(key_ND), dtype=jnp.int32) < count_1
        mean_D = key_ND.sum(axis=0) / jnp.maximum(1, count_1).astype(jnp.float32)
        norm_N = jnp.square(key_ND - mean_D[None, :]).sum(axis=1)
        return mean_D[None], jnp.where(is_real_N, norm_N, jnp.inf)

    by_device = PartitionSpec(AXES)
    return jax.shard_map(  # type: ignore[no-any-return]
        local, mesh=mesh, in_specs=(by_device, by_device), out_specs=(by_device, by_device)
    )(key_ND, count_P)


@functools.partial(
    jax.jit, static_argnames=("mesh", "wanted", "kept", "chunk", "query_block", "rescored")
)
def search_all(
    key_ND: jax.Array,
    mean_PD: jax.Array,
    norm_N: jax.Array,
    query_QD: jax.Array,
    skipped_PQ2: jax.Array | None = None,
    *,
    mesh: Mesh,
    wanted: int,
    kept: int,
    chunk: int,
    query_block: int,
    rescored: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns distances, devices, and rows on these devices, [Q, kept], on every device.

    `skipped_PQ2` has for each query the rows [start, stop) of each device that are no neighbours.
    """
    # Each device merges the lists of its share of the queries, or all lists if they are few.
    shared = query_block % mesh.size == 0

    def local(*arrays: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        lists = _search_device(*arrays, wanted=wanted, chunk=chunk, rescored=rescored)
        # [R, P · K], in the order of devices: of equal distances the smaller row stays.
        distance, row = (
            lax.all_to_all(one, AXES, 0, 1, tiled=True)
            if shared
            else lax.all_gather(one, AXES, axis=1, tiled=True)
            for one in lists
        )
        smallest, place = lax.top_k(-distance, kept)
        return -smallest, place // wanted, jnp.take_along_axis(row, place, axis=1)

    by_query = PartitionSpec(AXES) if shared else PartitionSpec()
    search = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(*(PartitionSpec(AXES),) * 3, PartitionSpec(), PartitionSpec(AXES)),
        out_specs=(by_query,) * 3,
        check_vma=shared,
    )

    def block(
        some: tuple[jax.Array, jax.Array | None],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        query_RD, skipped_RP2 = some
        skipped_PR2 = None if skipped_RP2 is None else skipped_RP2.swapaxes(0, 1)
        return search(key_ND, mean_PD, norm_N, query_RD, skipped_PR2)  # type: ignore[no-any-return]

    in_blocks = query_QD.reshape(-1, query_block, query_QD.shape[1])
    skipped = skipped_PQ2
    if skipped is not None:
        skipped = skipped.swapaxes(0, 1).reshape(-1, query_block, len(skipped), 2)
    blocks = lax.map(block, (in_blocks, skipped))
    everywhere = replicated(mesh)
    return tuple(  # type: ignore[return-value]
        lax.with_sharding_constraint(one.reshape(-1, kept), everywhere) for one in blocks
    )


def _search_device(
    key_ND: jax.Array,
    mean_1D: jax.Array,
    norm_N: jax.Array,
    query_RD: jax.Array,
    skipped_1R2: jax.Array | None,
    *,
    wanted: int,
    chunk: int,
    rescored: int,
) -> tuple[jax.Array, jax.Array]:
    """Finds the nearest of one device's rows: float32 distances, int32 rows, both [R, K]."""
    key_MCD = key_ND.reshape(-1, chunk, key_ND.shape[1])
    base_M = jnp.arange(len(key_MCD), dtype=jnp.int32) * chunk
    kept = wanted + SPARE
    group = group_size(chunk, kept)
    multiply = _multiplier(query_RD - mean_1D, key_ND.dtype)

    def scan(best: Any, part: Any) -> tuple[Any, None]:
        key_CD, norm_C, base = part
        # Scores ‖k − m‖² − 2 k·(q − m): as small as distances allow, so they round little.
        score_RC = norm_C[None, :] - 2 * multiply(key_CD)
        if skipped_1R2 is not None:
            row_C = base + jnp.arange(chunk, dtype=jnp.int32)
            start_R1, stop_R1 = skipped_1R2[0, :, :1], skipped_1R2[0, :, 1:]
            score_RC = jnp.where((row_C >= start_R1) & (row_C < stop_R1), jnp.inf, score_RC)
        return _nearer(best, score_RC, base, group), None

    def score_again(one: Any) -> tuple[jax.Array, jax.Array]:
        query_D, score_K, row_K = one
        difference_KD = key_ND[row_K].astype(jnp.float32) - query_D
        distance_K = jnp.where(jnp.isinf(score_K), jnp.inf, jnp.square(difference_KD).sum(axis=1))
        distance_K, row_K = lax.sort((distance_K, row_K), num_keys=2)
        return distance_K[:wanted], row_K[:wanted]

    num_queries = len(query_RD)
    empty = jnp.full((num_queries, kept), jnp.inf), jnp.zeros((num_queries, kept), jnp.int32)
    empty = jax.tree.map(lambda x: lax.pcast(x, AXES, to="varying"), empty)
    best, _ = lax.scan(scan, empty, (key_MCD, norm_N.reshape(-1, chunk), base_M))
    queries = lax.pcast(query_RD, AXES, to="varying")
    return lax.map(score_again, (queries, *best), batch_size=rescored)


def _multiplier(query_RD: jax.Array, dtype: Any) -> Callable[[jax.Array], jax.Array]:
    """Returns a function from keys [C, D] of this dtype to float32 products [R, C].

    Beside half-precision keys a query is the sum of two halves, which hold its 22 (float16) or
    16 bits (bfloat16), so that a key's product is as good as if the query were not rounded.
    """
    if dtype == jnp.float32:
        return lambda key_CD: jnp.einsum(
            "rd,cd->rc", query_RD, key_CD, precision=lax.Precision.HIGHEST
        )
    _, exponent_R1 = jnp.frexp(jnp.abs(query_RD).max(axis=1, keepdims=True))
    scaled_RD = jnp.ldexp(query_RD, -exponent_R1)  # Within ±1: no overflow, nearly no underflow.
    high_RD = scaled_RD.astype(dtype)
    low_RD = (scaled_RD - high_RD.astype(jnp.float32)).astype(dtype)
    half_SD = jnp.concatenate([high_RD, low_RD])

    def multiply(key_CD: jax.Array) -> jax.Array:
        product_SC = jnp.einsum("sd,cd->sc", half_SD, key_CD, preferred_element_type=jnp.float32)
        return jnp.ldexp(product_SC[: len(high_RD)] + product_SC[len(high_RD) :], exponent_R1)

    return multiply


def group_size(num_columns: int, count: int) -> int:
    """Returns how many columns share a minimum, W: from √(C / count) on a power of two.

    Ranked are C / W minima and `count` · W members of the groups that are opened: there both
    are as many. Measured on a CPU, C 65,536: within a tenth of the best W for 128 to 1,024.
    """
    group = 1
    while group < LARGEST_GROUP and group * group * count < num_columns:
        group *= 2
    return group


def _nearer(
    best: tuple[jax.Array, jax.Array], score_RC: jax.Array, base: jax.Array, group: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the smallest scores and their rows among the best of earlier rows and a chunk.

    The `count` groups with the smallest minima hold the `count` smallest scores, so only
    their members are ranked; of many members once more by smaller groups.
    """
    count = best[0].shape[1]
    score_RC, row_RC = _members(score_RC, count, group)
    if group > SMALL_GROUP:
        score_RC, place_RC = _members(score_RC, count, SMALL_GROUP)
        row_RC = jnp.take_along_axis(row_RC, place_RC, axis=1)
    score = jnp.concatenate([best[0], score_RC], axis=1)
    row = jnp.concatenate([best[1], base + row_RC], axis=1)
    # Stable, and earlier rows stand first: equal scores keep the smaller row.
    smallest, place = lax.top_k(-score, count)
    return -smallest, jnp.take_along_axis(row, place, axis=1)


def _members(score_RC: jax.Array, count: int, group: int) -> tuple[jax.Array, jax.Array]:
    """Returns the members of the `count` groups with the smallest minima, and their columns."""
    score_RGW = score_RC.reshape(len(score_RC), -1, group)
    _, group_RK = lax.top_k(-score_RGW.min(axis=2), min(count, score_RGW.shape[1]))
    group_RK = jnp.sort(group_RK, axis=1)  # Columns in order again.
    member_RKW = jnp.take_along_axis(score_RGW, group_RK[:, :, None], axis=1)
    column_RKW = group_RK[:, :, None] * group + jnp.arange(group, dtype=jnp.int32)
    return member_RKW.reshape(len(score_RC), -1), column_RKW.reshape(len(score_RC), -1)
