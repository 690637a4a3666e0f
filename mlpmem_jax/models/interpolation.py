"""Mixing two next-token distributions (paper, Eq. 7)."""

import jax
import jax.numpy as jnp


def interpolate(
    memory_logprob: jax.Array, decoder_logprob: jax.Array, weight: jax.Array | float
) -> jax.Array:
    """Returns log(λ·p_MEM + (1-λ)·p_LM).

    Exact at λ = 0 and λ = 1, in value and in all gradients; log-probabilities may be -inf
    (padding of the vocabulary).

    Args:
        memory_logprob: log p_MEM, any float dtype and shape.
        decoder_logprob: log p_LM, same shape.
        weight: λ in [0, 1], broadcast against both.

    Returns:
        The mixture's log-probabilities, float32.
    """
    memory = memory_logprob.astype(jnp.float32)
    decoder = decoder_logprob.astype(jnp.float32)
    weight = jnp.asarray(weight, jnp.float32)
    shape = jnp.broadcast_shapes(memory.shape, decoder.shape, weight.shape)
    return _interpolate(*(jnp.broadcast_to(array, shape) for array in (memory, decoder, weight)))


@jax.custom_jvp
def _interpolate(memory: jax.Array, decoder: jax.Array, weight: jax.Array) -> jax.Array:
    inside = jnp.clip(weight, jnp.finfo(jnp.float32).tiny, 1 - jnp.finfo(jnp.float32).epsneg)
    mixed = jnp.logaddexp(jnp.log(inside) + memory, jnp.log1p(-inside) + decoder)
    return jnp.where(weight <= 0, decoder, jnp.where(weight >= 1, memory, mixed))


@_interpolate.defjvp
def _interpolate_jvp(
    primals: tuple[jax.Array, ...], tangents: tuple[jax.Array, ...]
) -> tuple[jax.Array, jax.Array]:
    memory, decoder, weight = primals
    memory_dot, decoder_dot, weight_dot = tangents
    mixed = _interpolate(*primals)
    # p_MEM / p and p_LM / p: 0 where the part is impossible, finite where the mixture is.
    largest = jnp.finfo(jnp.float32).max
    memory_ratio, decoder_ratio = (
        jnp.where(jnp.isneginf(part), 0.0, jnp.minimum(jnp.exp(part - mixed), largest))
        for part in (memory, decoder)
    )
    # A part without weight has no gradient, however large its ratio.
    memory_share = jnp.where(weight > 0, weight * memory_ratio, 0.0)
    decoder_share = jnp.where(weight < 1, (1 - weight) * decoder_ratio, 0.0)
    tangent = (
        memory_share * memory_dot
        + decoder_share * decoder_dot
        + (memory_ratio - decoder_ratio) * weight_dot
    )
    return mixed, tangent


def neighbor_mixture(
    logprob_BV: jax.Array, share_BK: jax.Array, label_BK: jax.Array, weight: float
) -> jax.Array:
    """Returns (1 − λ)·p_LM + λ·p_kNN [B, V] (Eq. 7); shares of the K neighbours sum to λ."""
    row_B1 = jnp.arange(len(logprob_BV))[:, None]
    return ((1 - weight) * jnp.exp(logprob_BV)).at[row_B1, label_BK].add(share_BK)
