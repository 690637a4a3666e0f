"""N-grams of the last tokens, looked up in hashed tables: what a decoder or a memory may read.

Suffixes: B sequences, L tokens, M last tokens (the newest first), O orders of n-grams, W width of
a table.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mlpmem_jax.config.networks import DecoderConfig, MemoryConfig
from mlpmem_jax.models import layers
from mlpmem_jax.parallel.sharding import Names, gather_for_use

TABLE_AXES: Names = ("vocab", "embed")
# Stands where a window has no token before its first; no token of a vocabulary.
NO_TOKEN = -1


# The sections of the networks that read n-grams.
NgramKeys = DecoderConfig | MemoryConfig


def make_tables(config: NgramKeys, rngs: nnx.Rngs | None, *, exact: bool) -> nnx.Param:
    """Returns a table for each order, one after another: one lookup, one scatter of gradients."""
    rows = len(config.ngram_orders) * layers.padded_vocab_size(config.ngram_rows)
    shape = (rows, config.ngram_width)
    return layers.parameter(shape, TABLE_AXES, config.init_scale, "embedding", rngs, exact=exact)


def table_rows(token_BLM: jax.Array, config: NgramKeys) -> jax.Array:
    """Returns the row of the n-gram of each order in `make_tables`.

    Args:
        token_BLM: int32 [..., M], M at least the highest order.
        config: Orders and rows.

    Returns:
        int32 [..., O].
    """
    rows = layers.padded_vocab_size(config.ngram_rows)
    found = [
        place * rows + hashed(token_BLM[..., :order], rows)
        for place, order in enumerate(config.ngram_orders)
    ]
    return jnp.stack(found, axis=-1)


def look_up(table_VW: jax.Array, row_BLO: jax.Array) -> jax.Array:
    """Returns rows of a table side by side, float32 [..., O W]."""
    table_VW = gather_for_use(table_VW, TABLE_AXES)
    found_BLOW = jnp.take(table_VW, row_BLO, axis=0, mode="clip").astype(jnp.float32)
    return found_BLOW.reshape(*row_BLO.shape[:-1], -1)


def hashed(token_BLM: jax.Array, num_rows: int) -> jax.Array:
    """Hashes n-grams to rows of a table (FNV-1a over tokens, then mixed).

    Args:
        token_BLM: int32 [..., n], the newest token first.
        num_rows: Rows of the table.

    Returns:
        int32 [...] in [0, num_rows).
    """
    token_BLM = token_BLM.astype(jnp.uint32)
    hash_BL = jnp.full(token_BLM.shape[:-1], 2166136261, jnp.uint32)
    for place in range(token_BLM.shape[-1]):
        hash_BL = (hash_BL ^ token_BLM[..., place]) * jnp.uint32(16777619)
    hash_BL = (hash_BL ^ (hash_BL >> 15)) * jnp.uint32(2246822507)
    return ((hash_BL ^ (hash_BL >> 13)) % jnp.uint32(num_rows)).astype(jnp.int32)


def last_tokens(
    token_BL: jax.Array, before_BM: jax.Array, segment_BL: jax.Array | None = None
) -> jax.Array:
    """Returns the last tokens at every place of sequences.

    Args:
        token_BL: int32 ids.
        before_BM: int32 [B, M - 1], the tokens before them, the newest first.
        segment_BL: int32 document numbers; given, tokens of other documents, and those before
            the sequence, are replaced by `NO_TOKEN`.

    Returns:
        int32 [B, L, M], the place's own token first.
    """
    length = token_BL.shape[1]
    stream_BT = jnp.concatenate([before_BM[:, ::-1], token_BL], axis=1)
    num_before = before_BM.shape[1]

    def shifted(stream_BT: jax.Array) -> jax.Array:
        starts = range(num_before, -1, -1)
        return jnp.stack([stream_BT[:, start : start + length] for start in starts], axis=-1)

    token_BLM = shifted(stream_BT)
    if segment_BL is None:
        return token_BLM
    padding = ((0, 0), (num_before, 0))
    same_BLM = shifted(jnp.pad(segment_BL, padding, constant_values=-1)) == segment_BL[..., None]
    return jnp.where(same_BLM, token_BLM, NO_TOKEN)


def appended(recent_BM: jax.Array, token_BL: jax.Array, length_B: jax.Array) -> jax.Array:
    """Returns the last M tokens of each sequence, the newest first, after `length_B` more."""
    num_recent = recent_BM.shape[1]
    stream_BT = jnp.concatenate([recent_BM[:, ::-1], token_BL], axis=1)
    place_BM = num_recent - 1 + length_B[:, None] - jnp.arange(num_recent)
    return jnp.take_along_axis(stream_BT, place_BM, axis=1)
