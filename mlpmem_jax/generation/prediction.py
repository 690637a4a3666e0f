"""Next-token distributions: of both networks, mixed, and what they give to single tokens.

Suffixes: X any leading dims, V vocabulary, K alternatives.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mlpmem_jax.models.interpolation import interpolate


class Prediction(NamedTuple):
    """Next-token distributions of both networks.

    Attributes:
        decoder: float32 log p_LM [..., V], -inf for padding of the vocabulary.
        memory: log p_MEM, the same; None without a memory.
        weight: λ as the model has it, [...] or one number; None without a memory.
    """

    decoder: jax.Array
    memory: jax.Array | None = None
    weight: Any = None

    def mixture(self, weight: jax.Array | None = None) -> jax.Array:
        """Returns the interpolated log-probabilities.

        Args:
            weight: λ of each place, [...]; NaN, or None for all of them: the model's own.
        """
        if self.memory is None:
            return self.decoder
        chosen = jnp.asarray(self.weight, jnp.float32)
        if weight is not None:
            chosen = jnp.where(jnp.isnan(weight), chosen, weight)
        return interpolate(self.memory, self.decoder, chosen[..., None])


class Alternatives(NamedTuple):
    """What a distribution gives to one token and to the most probable ones.

    Attributes:
        logprob: float32 [X], of the token itself.
        top_id: int32 [X, K], the most probable tokens in falling order; ties go to the lower id.
        top_logprob: float32 [X, K], theirs.
    """

    logprob: jax.Array
    top_id: jax.Array
    top_logprob: jax.Array


def alternatives(logprob_XV: jax.Array, token_X: jax.Array, num_top: int) -> Alternatives:
    """Looks up a token and the `num_top` most probable tokens.

    Args:
        logprob_XV: float32 log-probabilities.
        token_X: int32 ids.
        num_top: K, at least 1.

    Returns:
        As described; a token that is among the alternatives has their bits, so that clients may
        compare the two to see whether it is the most probable one.
    """
    top_logprob, top_id = jax.lax.top_k(logprob_XV, num_top)
    own_X = jnp.take_along_axis(logprob_XV, token_X[..., None], axis=-1)[..., 0]
    same_XK = top_id == token_X[..., None]
    listed_X = jnp.sum(jnp.where(same_XK, top_logprob, 0.0), axis=-1)
    return Alternatives(jnp.where(same_XK.any(axis=-1), listed_X, own_X), top_id, top_logprob)


def no_alternatives(lead: tuple[int, ...], num_top: int) -> Alternatives:
    """Returns zeros of the same shapes, where nobody asks."""
    zero_XK = jnp.zeros((*lead, num_top))
    return Alternatives(jnp.zeros(lead), zero_XK.astype(jnp.int32), zero_XK)
