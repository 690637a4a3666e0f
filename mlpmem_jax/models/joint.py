"""Decoder and memory as one network, for training them together."""

from collections.abc import Callable

import jax
from flax import nnx

from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.models.memory import Memory


class Joint(nnx.Module):
    """A decoder and the memory that reads its states."""

    def __init__(
        self,
        decoder: Callable[[nnx.Rngs], Decoder],
        memory: Callable[[nnx.Rngs], Memory],
        *,
        rngs: nnx.Rngs,
    ):
        """Makes both; a fresh decoder is the one that `pretrain` begins with."""
        self.decoder = decoder(rngs)
        self.memory = memory(rngs)


def scale_gradient(array: jax.Array, factor: float) -> jax.Array:
    """Returns the array itself; the gradient that comes back is multiplied by a factor."""
    if factor == 1.0:
        return array
    if factor == 0.0:
        return jax.lax.stop_gradient(array)
    return _scaled(array, factor)


def _scaled(array: jax.Array, factor: float) -> jax.Array:
    @jax.custom_vjp
    def identity(x: jax.Array) -> jax.Array:
        return x

    identity.defvjp(lambda x: (x, None), lambda _, g: ((g * factor).astype(g.dtype),))
    return identity(array)
