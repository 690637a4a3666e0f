"""Rotary positions (arXiv 2104.09864)."""

import jax
import jax.numpy as jnp
import numpy as np

from mlpmem_jax.config.rope import RopeScaling


def rotary_angles(
    position_BL: jax.Array, head_width: int, theta: float, scaling: RopeScaling | None = None
) -> jax.Array:
    """Returns the angles of rotary positions, [..., L, A/2] float32.

    Args:
        position_BL: int32 positions.
        head_width: Width of a head, A.
        theta: Base of the frequencies.
        scaling: Of the frequencies; None: they stay.
    """
    half = head_width // 2
    frequency_A = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if scaling is not None and scaling.kind != "none":
        frequency_A = frequency_A * np.asarray(scaling.factors(half, theta), np.float32)
    return position_BL[..., None].astype(jnp.float32) * frequency_A


def rotate(x_BLHA: jax.Array, angle_BLA: jax.Array, factor: float = 1.0) -> jax.Array:
    """Rotates pairs (i, i + A/2) of every head, the pairing of Hugging Face's Llama.

    Args:
        x_BLHA: Queries or keys.
        angle_BLA: [L, A/2] or [B, L, A/2] from :func:`rotary_angles`.
        factor: What the result is multiplied by.

    Returns:
        The same shape and dtype.
    """
    cos, sin = (f(angle_BLA)[..., None, :] for f in (jnp.cos, jnp.sin))
    first, second = jnp.split(x_BLHA.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return (rotated if factor == 1 else rotated * factor).astype(x_BLHA.dtype)
