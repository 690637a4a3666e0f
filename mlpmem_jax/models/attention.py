"""Causal attention: over a window, and over a key/value cache."""

import math
from typing import Literal

import jax
import jax.numpy as jnp

from mlpmem_jax.errors import ConfigError
from mlpmem_jax.models import flash
from mlpmem_jax.parallel.sharding import target_platform

Implementation = Literal["auto", "xla", "cudnn", "blocked", "flash"]

# Masked scores: finite, since -inf - -inf in a row's maximum would be nan.
MASKED = -1e30
# Blocked attention cuts the queries in at most so many pieces, none shorter than this.
MAX_QUERY_BLOCKS = 8
MIN_QUERY_BLOCK = 64


def unusable(name: Implementation, platform: str, head_width: int, *, half: bool) -> str | None:
    """Says why an implementation that is asked for by name cannot run; None: it can.

    Args:
        name: The configured implementation.
        platform: Of the devices.
        head_width: Width of a head.
        half: Whether queries, keys and values are bfloat16 or float16.
    """
    if name == "flash" and platform != "tpu" and not flash.INTERPRETED:
        return f"needs a TPU, and the devices are {platform}"
    if name == "cudnn" and platform != "gpu":
        return f"needs a GPU, and the devices are {platform}"
    if name == "cudnn" and not half:
        return "needs decoder.compute_dtype=bfloat16, not float32"
    if name == "cudnn" and not _fits_cudnn(head_width):
        return f"needs heads whose width is a multiple of 8 up to 128, not {head_width}"
    return None


def _fits_cudnn(head_width: int) -> bool:
    return head_width <= 128 and head_width % 8 == 0


def resolve_implementation(
    name: Implementation, num_tokens: int, masked: bool, dtype: jnp.dtype, head_width: int
) -> str:
    """Chooses how attention is computed: measured on CPU, a guess on GPU, by roofline on TPU.

    Args:
        name: The configured implementation.
        masked: Whether there are segment ids.
        dtype: Of queries, keys and values.
        head_width: Width of a head.

    Returns:
        "xla", "cudnn", "blocked" or "flash".

    Raises:
        ConfigError: The configured implementation cannot run on these devices.
    """
    platform, half = target_platform(), dtype in (jnp.bfloat16, jnp.float16)
    reason = unusable(name, platform, head_width, half=half)
    if reason is not None:
        raise ConfigError(f"decoder.attention={name} {reason}; use auto")
    if name == "flash" and not flash.fits(num_tokens):
        return "blocked"
    if name != "auto":
        return name
    if platform == "cpu":
        return "blocked"
    if platform == "tpu":
        return "flash" if flash.fits(num_tokens) else "blocked"
    suits_cudnn = half and not masked and _fits_cudnn(head_width)
    return "cudnn" if platform == "gpu" and suits_cudnn else "xla"


def causal_attention(
    query_BLHA: jax.Array,
    key_BLGA: jax.Array,
    value_BLGA: jax.Array,
    segment_BL: jax.Array | None,
    implementation: Implementation,
    window: int | None = None,
) -> jax.Array:
    """Attends to earlier positions of the same window and, if given, the same segment.

    Args:
        query_BLHA: Queries; H is a multiple of G (grouped-query attention).
        segment_BL: int32 document numbers; positions of different numbers do not see each
            other. None: everything before a position is seen.
        implementation: Which computation; all give the same result up to rounding.
        window: Positions that a query sees, its own included; None: all before it.

    Returns:
        [B, L, H, A] in the queries' dtype; scores and softmax are float32.
    """
    masked = segment_BL is not None
    _, length, _, head_width = query_BLHA.shape
    chosen = resolve_implementation(implementation, length, masked, query_BLHA.dtype, head_width)
    if window is not None and window >= length:
        window = None
    if chosen == "flash":
        return flash.flash_attention(query_BLHA, key_BLGA, value_BLGA, segment_BL, window)
    if chosen == "blocked":
        return _blocked(query_BLHA, key_BLGA, value_BLGA, segment_BL, window)
    mask = None
    if segment_BL is not None:
        mask = (segment_BL[:, :, None] == segment_BL[:, None, :])[:, None]
    return jax.nn.dot_product_attention(
        query_BLHA,
        key_BLGA,
        value_BLGA,
        mask=mask,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation="cudnn" if chosen == "cudnn" else "xla",
    )


def cached_attention(
    query_BLHA: jax.Array,
    key_BGMA: jax.Array,
    value_BGMA: jax.Array,
    position_BL: jax.Array,
    window: int | None = None,
) -> jax.Array:
    """Attends to the entries of a cache up to each query's own position.

    Args:
        key_BGMA: Cached keys of M positions, those of the queries included.
        value_BGMA: Cached values.
        position_BL: int32 position of each query.
        window: As in :func:`causal_attention`.

    Returns:
        [B, L, H, A] in the queries' dtype.
    """
    batch, length, heads, width = query_BLHA.shape
    groups, size = key_BGMA.shape[1:3]
    query = query_BLHA.reshape(batch, length, groups, heads // groups, width)
    score = jnp.einsum(
        "blgra,bgma->bgrlm", query, key_BGMA, preferred_element_type=jnp.float32
    ) / math.sqrt(width)
    entry_M = jnp.arange(size)
    seen_BLM = entry_M <= position_BL[:, :, None]
    if window is not None:
        seen_BLM = seen_BLM & (entry_M > position_BL[:, :, None] - window)
    weight = jax.nn.softmax(jnp.where(seen_BLM[:, None, None], score, MASKED), axis=-1)
    out = jnp.einsum("bgrlm,bgma->blgra", weight.astype(value_BGMA.dtype), value_BGMA)
    return out.reshape(query_BLHA.shape).astype(query_BLHA.dtype)


def _blocked(
    query_BLHA: jax.Array,
    key_BLGA: jax.Array,
    value_BLGA: jax.Array,
    segment_BL: jax.Array | None,
    window: int | None,
) -> jax.Array:
    """Cuts the queries into blocks that read only the keys before their end, in their window.

    Nearly half of the scores are never computed, and what is divided by the softmax's sum
    is the output, which is narrower than the scores.
    """
    batch, length, heads, width = query_BLHA.shape
    groups = key_BLGA.shape[2]
    repeats = heads // groups
    query = (query_BLHA * width**-0.5).reshape(batch, length, groups, repeats, width)
    query_BGRLA = query.transpose(0, 2, 3, 1, 4)
    key_BGLA, value_BGLA = (x.transpose(0, 2, 1, 3) for x in (key_BLGA, value_BLGA))
    size = max(MIN_QUERY_BLOCK, -(-length // MAX_QUERY_BLOCKS))
    position_L = jnp.arange(length)
    blocks = []
    for start in range(0, length, size):
        stop = min(start + size, length)
        first = 0 if window is None else max(0, start + 1 - window)
        # Queries of one group are rows of one product: keys are read once.
        query_BGXA = query_BGRLA[:, :, :, start:stop].reshape(batch, groups, -1, width)
        seen = position_L[start:stop, None] >= position_L[None, first:stop]
        if window is not None:
            seen &= position_L[start:stop, None] < position_L[None, first:stop] + window
        if segment_BL is None:
            seen_XM = jnp.tile(seen, (repeats, 1))
        else:
            seen = seen & (segment_BL[:, start:stop, None] == segment_BL[:, None, first:stop])
            seen_XM = jnp.tile(seen, (1, repeats, 1))[:, None]
        seen_keys, seen_values = (x[:, :, first:stop] for x in (key_BGLA, value_BGLA))
        out_BGXA = _attend_block(query_BGXA, seen_keys, seen_values, seen_XM)
        blocks.append(out_BGXA.reshape(batch, groups, repeats, stop - start, width))
    out_BGRLA = jnp.concatenate(blocks, axis=3) if len(blocks) > 1 else blocks[0]
    return out_BGRLA.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, width)


@jax.checkpoint
def _attend_block(
    query_BGXA: jax.Array, key_BGMA: jax.Array, value_BGMA: jax.Array, seen_XM: jax.Array
) -> jax.Array:
    """Attends with queries that are scaled already.

    The backward pass of a scanned stack recomputes the scores. (In unrolled blocks XLA on
    CPU finds the scores of the forward pass again and keeps them.)
    """
    score_BGXM = jnp.einsum(
        "bgxa,bgma->bgxm", query_BGXA, key_BGMA, preferred_element_type=jnp.float32
    )
    score_BGXM = jnp.where(seen_XM, score_BGXM, MASKED)
    highest = jax.lax.stop_gradient(jnp.max(score_BGXM, axis=-1, keepdims=True))
    weight_BGXM = jnp.exp(score_BGXM - highest)
    total_BGX1 = jnp.sum(weight_BGXM, axis=-1, keepdims=True)
    out_BGXA = jnp.einsum(
        "bgxm,bgma->bgxa",
        weight_BGXM.astype(value_BGMA.dtype),
        value_BGMA,
        preferred_element_type=jnp.float32,
    )
    return (out_BGXA / total_BGX1).astype(query_BGXA.dtype)
