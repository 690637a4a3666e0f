"""Causal attention by a fused kernel: scores never reach memory (arXiv 2205.14135).

The kernel is JAX's own for TPUs (splash attention, in Pallas). A kernel is opaque to the
partitioner, so each device runs it on its own windows and heads. It is imported where it is
used: most runs, on CPU and GPU, never do.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from mlpmem_jax.models.layers import ATTENDED
from mlpmem_jax.parallel.sharding import current_mesh, spec, target_platform

# Windows are cut into tiles of one of these sizes; a tile is at least a row of the unit's lanes.
TILES = (512, 256, 128)
# Set by tests alone: off TPUs the kernel is interpreted, which is right and far too slow.
INTERPRETED = False
_QUERY = ("batch", "length", "heads", "head_width")
_KEY = ("batch", "length", "kv_heads", "head_width")


def fits(num_tokens: int) -> bool:
    """Returns whether windows of this length can be cut into tiles."""
    return num_tokens % TILES[-1] == 0


def flash_attention(
    query_BLHA: jax.Array,
    key_BLGA: jax.Array,
    value_BLGA: jax.Array,
    segment_BL: jax.Array | None,
    window: int | None = None,
) -> jax.Array:
    """Attends to earlier positions of the same window and, if given, the same segment.

    Elsewhere than on TPUs it does not run (`attention.unusable`), unless it is interpreted.

    Args:
        query_BLHA: Queries; H is a multiple of G (grouped-query attention), and L of 128.
        segment_BL: int32 document numbers; None: everything before a position is seen.
        window: Positions that a query sees, its own included; None: all before it.

    Returns:
        [B, L, H, A] in the queries' dtype; scores and softmax are float32.
    """
    mesh = current_mesh()
    interpret = INTERPRETED and target_platform() != "tpu"
    local = functools.partial(_local, window=window, interpret=interpret)
    if mesh is None:
        return local(query_BLHA, key_BLGA, value_BLGA, segment_BL)
    queries = spec(_QUERY, query_BLHA.shape, mesh)
    keys = spec(_KEY, key_BLGA.shape, mesh)
    if queries[2] != keys[2]:  # Too few groups for the axis that cuts the heads: one each.
        repeats = query_BLHA.shape[2] // key_BLGA.shape[2]
        key_BLGA, value_BLGA = (jnp.repeat(x, repeats, axis=2) for x in (key_BLGA, value_BLGA))
        keys = queries
    segments = None if segment_BL is None else spec(_QUERY[:2], segment_BL.shape, mesh)
    return jax.shard_map(
        local, in_specs=(queries, keys, keys, segments), out_specs=queries, check_vma=False
    )(query_BLHA, key_BLGA, value_BLGA, segment_BL)


def _local(
    query_BLHA: jax.Array,
    key_BLGA: jax.Array,
    value_BLGA: jax.Array,
    segment_BL: jax.Array | None,
    *,
    window: int | None,
    interpret: bool,
) -> jax.Array:
    """Attends on one device."""
    _, length, heads, width = query_BLHA.shape
    attend = _kernel(length, heads, window, interpret)
    scaled = (query_BLHA * width**-0.5).astype(query_BLHA.dtype)
    query_BHLA, key_BGLA, value_BGLA = (
        x.transpose(0, 2, 1, 3) for x in (scaled, key_BLGA, value_BLGA)
    )
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    arrays: tuple[Any, ...] = (query_BHLA, key_BGLA, value_BGLA)
    if segment_BL is not None:
        arrays += (splash.SegmentIds(q=segment_BL, kv=segment_BL),)
    out_BHLA: Any = jax.vmap(attend)(*arrays)  # the kernel may also return residuals
    return out_BHLA.transpose(0, 2, 1, 3).astype(query_BLHA.dtype)  # type: ignore[no-any-return]


def _kernel(length: int, heads: int, window: int | None, interpret: bool) -> Any:
    """Returns the kernel, for one window."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    tile = next(size for size in TILES if length % size == 0)
    sizes = splash.BlockSizes(
        block_q=tile,
        block_kv=tile,
        block_kv_compute=tile,
        block_q_dkv=tile,
        block_kv_dkv=tile,
        block_kv_dkv_compute=tile,
        block_q_dq=tile,
        block_kv_dq=tile,
    )
    shape = (length, length)
    causal: Any = (
        splash.CausalMask(shape)
        if window is None
        else splash.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    )
    mask = splash.MultiHeadMask([causal] * heads)
    return splash.make_splash_mha(
        mask,
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=ATTENDED,
        interpret=interpret,
    )
