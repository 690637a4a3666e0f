"""From a next-token distribution to a token: greedy, temperature, top-k, top-p, min-p.

Each prompt has a random key of its own, and each of its tokens one derived from it by
position: what a prompt yields depends on neither its batch nor how decoding is chunked.

Suffixes: B prompts, V vocabulary.
"""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Of temperatures: as float32 neither it nor its reciprocal, by which XLA multiplies, is 0 or inf.
_HUGE = 1e37
_ALL = 2**31 - 1  # more tokens than any vocabulary has


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        method: greedy takes the most probable token, random draws one.
        temperature: Divides the log-probabilities before anything is cut off.
        top_k: Keep so many most probable tokens.
        top_p: Then keep the fewest, in falling order, whose mass reaches this share.
        min_p: And those whose probability is at least this share of the highest.
    """

    method: Literal["greedy", "random"] = "random"
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    @property
    def divisor(self) -> float:
        """The temperature, within what float32 divides by."""
        return min(max(self.temperature, 1 / _HUGE), _HUGE)


class RowSampling(NamedTuple):
    """A `Sampling` for each row, as arrays [B]: one compiled function serves all of them."""

    greedy: Any
    divisor: Any
    top_k: Any
    top_p: Any
    log_min_p: Any

    @classmethod
    def of(cls, sampling: Sampling) -> "RowSampling":
        """Returns one row, of NumPy; what is not set cuts nothing off."""
        values = (
            sampling.divisor,
            np.inf if sampling.top_p is None or sampling.top_p >= 1 else sampling.top_p,
            np.log(sampling.min_p) if sampling.min_p else -np.inf,
        )
        divisor, top_p, log_min_p = (np.full(1, value, np.float32) for value in values)
        top_k = np.full(1, _ALL if sampling.top_k is None else sampling.top_k, np.int32)
        return cls(np.full(1, sampling.method == "greedy"), divisor, top_k, top_p, log_min_p)


def sorted_candidates(logprob_BV: jax.Array, sampling: Sampling) -> tuple[jax.Array, jax.Array]:
    """Orders tokens by probability and cuts off those that may not be drawn.

    Args:
        logprob_BV: float32 log-probabilities; -inf (padding of the vocabulary) stays out.
        sampling: What to cut off.

    Returns:
        Scaled log-probabilities up to a constant in falling order, -inf where cut off, and
        their token ids; both [B, C] with C = top_k, or V without one. Ties go to the lower id.
    """
    vocab = logprob_BV.shape[-1]
    num_kept = vocab if sampling.top_k is None else min(sampling.top_k, vocab)
    scaled_BC, id_BC = jax.lax.top_k(_scaled(logprob_BV, sampling.divisor), num_kept)
    if sampling.top_p is not None and sampling.top_p < 1:
        scaled_BC = _within_mass(scaled_BC, sampling.top_p)
    if sampling.min_p:
        scaled_BC = jnp.where(scaled_BC >= np.log(sampling.min_p), scaled_BC, -jnp.inf)
    return scaled_BC, id_BC


def _within_mass(scaled_BC: jax.Array, top_p: Any) -> jax.Array:
    """Cuts off sorted candidates once those before them have the mass `top_p`."""
    prob_BC = jax.nn.softmax(scaled_BC, axis=-1)
    before_BC = jnp.cumsum(prob_BC, axis=-1) - prob_BC
    # The most probable token always stays, whatever rounding does to a tiny top_p.
    keep_BC = (before_BC < top_p).at[:, 0].set(True)
    return jnp.where(keep_BC, scaled_BC, -jnp.inf)


def _scaled(logprob_BV: jax.Array, divisor: Any) -> jax.Array:
    """Divides by the temperature; as that goes to 0 only the most probable tokens stay.

    Returns float32 [B, V] with maximum 0, so that nothing but -inf overflows; any positive
    temperature is allowed.
    """
    highest_B1 = jnp.max(logprob_BV, axis=-1, keepdims=True)
    # Without a finite maximum there is nothing to hold the others against.
    highest_B1 = jnp.where(jnp.isfinite(highest_B1), highest_B1, 0.0)
    return (logprob_BV - highest_B1) / divisor


def most_probable(logprob_BV: jax.Array) -> jax.Array:
    """Returns the first of the most probable tokens, int32 [B].

    An argmax, in two passes: into a single one XLA on CPU draws all that the distribution is
    computed from, one entry after another.
    """
    highest_B1 = jnp.max(logprob_BV, axis=-1, keepdims=True)
    vocab = logprob_BV.shape[-1]
    index_BV = jnp.where(logprob_BV == highest_B1, jnp.arange(vocab, dtype=jnp.int32), vocab)
    return jnp.min(index_BV, axis=-1) % vocab  # Of NaN nothing is the highest: token 0, no padding.


def sample(logprob_BV: jax.Array, key_B: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws one token for each prompt.

    Args:
        logprob_BV: float32 log-probabilities of the interpolated distribution.
        key_B: Random keys, one a prompt; not read by greedy.
        sampling: How to draw.

    Returns:
        int32 [B].
    """
    if sampling.method == "greedy":
        return most_probable(logprob_BV)
    return _drawn(*sorted_candidates(logprob_BV, sampling), key_B)


def sample_rows(logprob_BV: jax.Array, key_B: jax.Array, rows: RowSampling) -> jax.Array:
    """Draws one token for each row by a rule of its own, as `sample` does by one for all.

    Args:
        logprob_BV: float32 log-probabilities.
        key_B: Random keys, one a row.
        rows: How to draw.

    Returns:
        int32 [B]; no row's token depends on the others.
    """

    def random() -> jax.Array:
        scaled_BV = _scaled(logprob_BV, rows.divisor[:, None])
        scaled_BV, id_BV = jax.lax.top_k(scaled_BV, scaled_BV.shape[-1])
        inside_BV = jnp.arange(scaled_BV.shape[-1]) < rows.top_k[:, None]
        scaled_BV = jnp.where(inside_BV, scaled_BV, -jnp.inf)
        scaled_BV = _within_mass(scaled_BV, rows.top_p[:, None])
        inside_BV = scaled_BV >= rows.log_min_p[:, None]
        return _drawn(jnp.where(inside_BV, scaled_BV, -jnp.inf), id_BV, key_B)

    greedy_B = most_probable(logprob_BV)
    # Sorting a vocabulary takes longer than a small network.
    random_B = jax.lax.cond(rows.greedy.all(), lambda: greedy_B, random)
    return jnp.where(rows.greedy, greedy_B, random_B)


def _drawn(scaled_BC: jax.Array, id_BC: jax.Array, key_B: jax.Array) -> jax.Array:
    rank_B = jax.vmap(jax.random.categorical)(key_B, scaled_BC)
    return jnp.take_along_axis(id_BC, rank_B[:, None], axis=-1)[:, 0].astype(jnp.int32)


def prompt_keys(seed: int, prompts: Sequence[str]) -> jax.Array:
    """Returns a random key for each prompt, from the seed and its text.

    A prompt that occurs several times gets another key each time, so asking for the same
    prompt three times gives three samples.
    """
    seen: dict[str, int] = {}
    keys = []
    base = jax.random.key(seed)
    for prompt in prompts:
        occurrence = seen.get(prompt, 0)
        seen[prompt] = occurrence + 1
        text = jax.random.fold_in(base, zlib.crc32(prompt.encode("utf-8", "surrogatepass")))
        keys.append(jax.random.fold_in(text, occurrence))
    return jnp.stack(keys)


def token_keys(key_B: jax.Array, position_B: jax.Array) -> jax.Array:
    """Returns the keys of the tokens to be drawn, from the prompts' keys.

    Args:
        key_B: The prompts' keys.
        position_B: int32, how many tokens each prompt has been given so far.
    """
    return jax.vmap(jax.random.fold_in)(key_B, position_B)
