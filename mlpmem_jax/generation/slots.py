"""What slots hold on the devices, and how each of them draws its next token.

Suffixes: B rows, V padded vocabulary.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlpmem_jax.generation.interpolated import ModelCache
from mlpmem_jax.generation.prediction import Alternatives, alternatives, no_alternatives
from mlpmem_jax.generation.sampling import (
    RowSampling,
    Sampling,
    prompt_keys,
    sample_rows,
    token_keys,
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the tokens of one text are drawn.

    Attributes:
        sampling: Greedy or random, and what is cut off.
        key: Data of the text's random key (`text_keys`).
        repetition_penalty: Log-probabilities of tokens that the text or its prompt has are
            multiplied by this before a token is drawn; 1: no effect.
        weight: λ, the memory's share; None: the model's own.
    """

    sampling: Sampling
    key: np.ndarray
    repetition_penalty: float = 1.0
    weight: float | None = None


def text_keys(seed: int, prompts: Sequence[str]) -> np.ndarray:
    """Returns data of random keys, uint32 [B, 2], as `Generator` draws them for these prompts."""
    return np.asarray(jax.random.key_data(prompt_keys(seed, prompts)))


class Drawn(NamedTuple):
    """A token with its log-probability under the model.

    Attributes:
        token: Its id.
        logprob: log p, before temperature, penalty and cuts; None where there is none. It means
            nothing where nobody asked.
        top: The most probable tokens and their log-probabilities, in falling order.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]

    @classmethod
    def of(cls, token: int, told: Alternatives, place: int) -> "Drawn":
        """Takes a token's entry of arrays."""
        pairs = zip(told.top_id[place].tolist(), told.top_logprob[place].tolist(), strict=True)
        top = tuple((other, logprob) for other, logprob in pairs if math.isfinite(logprob))
        return cls(token, float(told.logprob[place]), top)


class Rows(NamedTuple):
    """What each row carries from token to token beside its cache, as arrays [B, ...].

    Attributes:
        token: int32, drawn last and not yet in the cache.
        drawn: int32, tokens drawn so far; numbers the random keys.
        key: uint32 [B, 2].
        rule: How to draw.
        penalty: float32.
        weight: float32, NaN: the model's own λ.
        seen: bool [B, V], the tokens that the text and its prompt have.
    """

    token: Any
    drawn: Any
    key: Any
    rule: RowSampling
    penalty: Any
    weight: Any
    seen: Any


class Slots(NamedTuple):
    """All slots, on the devices."""

    cache: ModelCache
    rows: Rows


GREEDY = Rule(Sampling("greedy"), np.zeros(2, np.uint32))


def rows_of(rule: Rule, tokens: Sequence[int], drawn: int, padded_vocab: int) -> Rows:
    """Returns the row of one text, of NumPy.

    Args:
        rule: How its tokens are drawn.
        tokens: Its prompt, and what was drawn.
        drawn: Tokens drawn.
        padded_vocab: V.
    """
    seen_1V = np.zeros((1, padded_vocab), bool)
    seen_1V[0, list(tokens)] = True
    return Rows(
        token=np.zeros(1, np.int32),
        drawn=np.full(1, drawn, np.int32),
        key=np.asarray(rule.key, np.uint32)[None],
        rule=RowSampling.of(rule.sampling),
        penalty=np.full(1, rule.repetition_penalty, np.float32),
        weight=np.full(1, math.nan if rule.weight is None else rule.weight, np.float32),
        seen=seen_1V,
    )


def next_tokens(
    rows: Rows, logprob_BV: jax.Array, chosen_B: jax.Array, scored: jax.Array, num_top: int
) -> tuple[Rows, Alternatives]:
    """Draws a token for the chosen rows, and looks it up among its alternatives.

    Args:
        rows: What they carry.
        logprob_BV: float32, of the interpolated distribution.
        chosen_B: bool; the others keep their token.
        scored: bool, whether anybody asks for the second result.
        num_top: Alternatives.

    Returns:
        The rows afterwards; the alternatives, zeros unless `scored`.
    """
    penalized_BV = jnp.where(rows.seen, logprob_BV * rows.penalty[:, None], logprob_BV)
    rule = rows.rule._replace(greedy=rows.rule.greedy | ~chosen_B)
    key_B = token_keys(jax.random.wrap_key_data(rows.key), rows.drawn)
    token_B = jnp.where(chosen_B, sample_rows(penalized_BV, key_B, rule), rows.token)
    told = jax.lax.cond(
        scored,
        lambda: alternatives(logprob_BV, token_B, num_top),
        lambda: no_alternatives(token_B.shape, num_top),
    )
    after = rows._replace(
        token=token_B,
        drawn=rows.drawn + chosen_B.astype(jnp.int32),
        seen=rows.seen.at[jnp.arange(len(token_B)), token_B].set(True),
    )
    return after, told
