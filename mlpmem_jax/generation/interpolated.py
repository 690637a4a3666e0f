"""Decoder and memory as one next-token model with a key/value cache (paper, Eq. 7).

Suffixes: B prompts, L tokens, M recent tokens, D decoder width, V padded vocabulary.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from mlpmem_jax.corpus.recent import within_document
from mlpmem_jax.generation.prediction import (
    Alternatives,
    Prediction,
    alternatives,
    no_alternatives,
)
from mlpmem_jax.models.decoder import Cache, Decoder, Site
from mlpmem_jax.models.interpolation import interpolate
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.models.ngrams import appended, last_tokens
from mlpmem_jax.parallel.sharding import replicated, spec
from mlpmem_jax.training.chunked import from_chunks, into_chunks
from mlpmem_jax.training.losses import token_logprob

_SCORE_CHUNK_TOKENS = 1024
_LEAST_CACHE_TOKENS = 256  # One step is compiled for each power of two from here to the context.
_WHOLE_CHUNK_TOKENS = 64  # places whose whole distributions exist at once
_CACHE_NAMES = ("layers", "batch", "kv_heads", None, "head_width")


class ModelCache(NamedTuple):
    """What a model keeps of the tokens that it has read.

    Attributes:
        decoder: Keys and values, and how many tokens were read.
        recent_BM: int32, the last tokens of each row, the newest first; separators before its
            first. M is 0 without a memory that reads them.
    """

    decoder: Cache
    recent_BM: jax.Array

    def emptied(self, row_B: jax.Array, separator: int) -> "ModelCache":
        """Returns the cache with some rows empty: what they held is never seen again."""
        recent_BM = jnp.where(row_B[:, None], separator, self.recent_BM)
        return ModelCache(self.decoder.emptied(row_B), recent_BM)

    def with_entries_of(self, other: "ModelCache", row_B: jax.Array) -> "ModelCache":
        """Returns the cache with another's keys and values in some rows."""
        row_B111 = row_B[:, None, None, None]
        key, value = (
            jnp.where(row_B111, theirs, own)
            for theirs, own in zip(other.decoder[:2], self.decoder[:2], strict=True)
        )
        return self._replace(decoder=self.decoder._replace(key=key, value=value))

    def grown(self, num_tokens: int) -> "ModelCache":
        """Returns the cache with room for so many tokens a row."""
        more = num_tokens - self.decoder.key.shape[3]
        key, value = (jnp.pad(old, [(0, 0)] * 3 + [(0, more), (0, 0)]) for old in self.decoder[:2])
        return self._replace(decoder=self.decoder._replace(key=key, value=value))


class InterpolatedModel:
    """A decoder, alone or with a memory, that continues sequences.

    Attributes:
        parameters: Pytree of what the functions below read; pass it to them, so that
            compiled functions take it as an argument.
        context_tokens: Tokens that a row of the cache holds.
        separator: The token that starts each document.
        vocab_size: Real entries of the vocabulary; padding has probability 0.
    """

    def __init__(
        self,
        decoder: Decoder,
        memory: Memory | None,
        *,
        site: Site,
        weight: float | None,
        separator: int,
        mesh: jax.sharding.Mesh,
    ):
        """Takes restored networks; on a CPU each of their layers becomes arrays of its own.

        Args:
            decoder: The decoder; with shapes for arrays, what is made of it can be lowered.
            memory: The memory, likewise; None leaves the decoder alone.
            site: The decoder's state that the memory reads.
            weight: λ, the memory's weight, in [0, 1]; None: the memory's gate gives it.
            separator: The token that starts each document.
            mesh: Where the parameters lie.
        """
        self.context_tokens = decoder.config.context_tokens
        self.vocab_size = decoder.vocab_size
        for network in (decoder, memory):
            if network is not None:
                network.blocks.split_layers()
        self._decoder, decoder_state = nnx.split(decoder)
        self._memory: Any = None
        memory_state: Any = None
        self._num_recent = 0
        if memory is not None:
            self._memory, memory_state = nnx.split(memory)
            self._num_recent = memory.config.num_read_tokens
        fixed = None if weight is None else np.float32(weight)
        self.parameters = (decoder_state, memory_state, fixed)
        self._site = site
        self.separator = separator
        self.mesh = mesh

    @property
    def has_memory(self) -> bool:
        """Whether there is a memory."""
        return self._memory is not None

    def empty_cache(self, num_prompts: int, num_tokens: int | None = None) -> ModelCache:
        """Returns an empty cache for some prompts, of the whole context unless told otherwise."""
        decoder: Any = nnx.merge(self._decoder, self.parameters[0])
        recent_BM = jnp.full((num_prompts, self._num_recent), self.separator, jnp.int32)
        size = self.context_tokens if num_tokens is None else num_tokens
        return ModelCache(decoder.init_cache(num_prompts, size), recent_BM)

    def cache_tokens(self, num_tokens: int) -> int:
        """Returns how large a cache to make for rows of so many tokens: every step reads it all."""
        size = _LEAST_CACHE_TOKENS
        while size < num_tokens:
            size *= 2
        return min(size, self.context_tokens)

    def cache_shardings(self, num_prompts: int) -> Any:
        """Returns where a cache lies: heads over the devices that hold their weights."""
        shape = jax.eval_shape(lambda: self.empty_cache(num_prompts)).decoder.key.shape
        heads = NamedSharding(self.mesh, spec(_CACHE_NAMES, shape, self.mesh))
        everywhere: Any = replicated(self.mesh)
        places: Any = (heads, heads, everywhere, everywhere)
        return ModelCache(Cache(*places), everywhere)

    def extend(
        self,
        parameters: Any,
        cache: ModelCache,
        token_BL: jax.Array,
        length_B: jax.Array,
        weight_B: jax.Array | None = None,
    ) -> tuple[jax.Array, ModelCache]:
        """Reads tokens and predicts what follows the last of each row.

        Args:
            parameters: As in `parameters`.
            cache: What was read before.
            token_BL: int32 ids, left-aligned.
            length_B: int32, tokens to read of each row; a row that reads none keeps its
                length, and its prediction means nothing.
            weight_B: λ of each row; NaN, or None for all of them: the model's own.

        Returns:
            float32 log-probabilities of the interpolated distribution [B, V], -inf for
            padding of the vocabulary; and the cache.
        """
        prediction, _, cache = self.predict(parameters, cache, token_BL, length_B)
        return prediction.mixture(weight_B), cache

    def predict(
        self,
        parameters: Any,
        cache: ModelCache,
        token_BL: jax.Array,
        length_B: jax.Array,
        sites: Sequence[Site] = (),
    ) -> tuple[Prediction, dict[Site, jax.Array], ModelCache]:
        """As `extend`, with the distributions of both networks apart, and states [B, D]."""
        final_BLD, states, after = self._read(parameters, cache, token_BL, length_B, sites)
        last_B = jnp.maximum(length_B - 1, 0)
        final_BD, last = _at_last((final_BLD, states), last_B)
        state_BD = last.get(self._site)
        return self.predicted(parameters, final_BD, state_BD, after.recent_BM), last, after

    def extend_and_score(
        self,
        parameters: Any,
        cache: ModelCache,
        token_BL: jax.Array,
        length_B: jax.Array,
        weight_B: jax.Array,
        num_top: int,
        scored: jax.Array,
    ) -> tuple[jax.Array, Alternatives, ModelCache]:
        """As `extend`, and looks up each token of the rows in the distribution before it.

        Args:
            parameters: As in `parameters`.
            cache: What was read before.
            token_BL: int32 ids, left-aligned.
            length_B: int32, tokens to read of each row.
            weight_B: λ of each row; NaN: the model's own.
            num_top: Alternatives at each place.
            scored: bool, whether anybody asks for the second result.

        Returns:
            What `extend` returns, with the alternatives of tokens 1, 2, … of each row between:
            [B, L - 1], garbage from a row's length on; zeros unless `scored`.
        """
        final_BLD, states, after = self._read(parameters, cache, token_BL, length_B)
        recent_BLM = self._recent(token_BL, cache.recent_BM) if self._num_recent else None
        places = (final_BLD, states.get(self._site), recent_BLM)
        last_B = jnp.maximum(length_B - 1, 0)
        prediction = self.predicted(parameters, *_at_last(places, last_B))
        lead = (len(token_BL), token_BL.shape[1] - 1)

        def of_chunk(chunk: Any) -> Alternatives:
            at_places, label_C, weight_C = chunk
            mixture_CV = self.predicted(parameters, *at_places).mixture(weight_C)
            return alternatives(mixture_CV, label_C, num_top)

        def scores() -> Alternatives:
            before = jax.tree.map(lambda array: array[:, :-1], places)
            data = (before, token_BL[:, 1:], jnp.broadcast_to(weight_B[:, None], lead))
            found = jax.lax.map(of_chunk, into_chunks(data, 2, _WHOLE_CHUNK_TOKENS))
            return jax.tree.map(lambda array: from_chunks(array, lead), found)

        found = jax.lax.cond(scored, scores, lambda: no_alternatives(lead, num_top))
        return prediction.mixture(weight_B), found, after

    def _read(
        self,
        parameters: Any,
        cache: ModelCache,
        token_BL: jax.Array,
        length_B: jax.Array,
        sites: Sequence[Site] = (),
    ) -> tuple[jax.Array, dict[Site, jax.Array], ModelCache]:
        """Returns states of all places: the last ones, those at the sites and the memory's."""
        decoder: Any = nnx.merge(self._decoder, parameters[0])
        wanted = tuple(dict.fromkeys([*sites, *([self._site] if self._memory else [])]))
        final_BLD, states, read = decoder.extend(token_BL, cache.decoder, length_B, wanted)
        recent_BM = appended(cache.recent_BM, token_BL, length_B)
        return final_BLD, states, ModelCache(read, recent_BM)

    def _recent(self, token_BL: jax.Array, before_BM: jax.Array | None = None) -> jax.Array:
        """Returns the recent tokens of all places, [B, L, M]; without any before: of windows."""
        if before_BM is None:
            before_BM = jnp.full((len(token_BL), self._num_recent), self.separator, jnp.int32)
        before_BM = before_BM[:, : max(0, self._num_recent - 1)]
        return last_tokens(token_BL, before_BM)[..., : self._num_recent]

    def at_places(
        self,
        parameters: Any,
        token_BL: jax.Array,
        place_BC: jax.Array,
        sites: Sequence[Site] = (),
    ) -> tuple[Any, dict[Site, jax.Array]]:
        """Reads windows without a cache, and picks what predictions at some places need.

        Args:
            parameters: As in `parameters`.
            token_BL: int32 ids; the first of a window is read as the first of its document.
            place_BC: int32 places of each window.
            sites: States to return.

        Returns:
            Arguments of `predicted` behind the parameters, [B, C, ...]; and states [B, C, D].
        """
        decoder: Any = nnx.merge(self._decoder, parameters[0])
        wanted = tuple(dict.fromkeys([*sites, *([self._site] if self._memory else [])]))
        final_BLD, states = decoder.hidden(token_BL, sites=wanted)
        recent_BLM = self._recent(token_BL) if self._num_recent else None

        def picked(array_BLX: jax.Array) -> jax.Array:
            return jnp.take_along_axis(array_BLX, place_BC[..., None], axis=1)

        inputs = jax.tree.map(picked, (final_BLD, states.get(self._site), recent_BLM))
        return inputs, {site: picked(states[site]) for site in sites}

    def predicted(
        self,
        parameters: Any,
        final: jax.Array,
        state: jax.Array | None,
        recent: jax.Array | None,
    ) -> Prediction:
        """Returns the distributions [..., V] at some places, from states and recent tokens."""
        decoder_state, memory_state, weight = parameters
        decoder: Any = nnx.merge(self._decoder, decoder_state)
        logprob = jax.nn.log_softmax(decoder.logits(final), axis=-1)
        if self._memory is None:
            return Prediction(logprob)
        memory: Any = nnx.merge(self._memory, memory_state)
        inside = None if recent is None else within_document(recent, self.separator)
        inputs = memory.inputs(state, inside, decoder.embedding[...])
        logits = memory.logits(memory.hidden(inputs), decoder.head_VD())
        if weight is None:
            weight = memory.interpolation(inputs)
        return Prediction(logprob, jax.nn.log_softmax(logits, axis=-1), weight)

    def score(self, parameters: Any, token_BL: jax.Array, label_BL: jax.Array) -> jax.Array:
        """Returns log p(label) of every place of windows, without a cache.

        Args:
            parameters: As in `parameters`.
            token_BL: int32 ids; the first of a window is read as the first of its document.
            label_BL: int32, what follows each.

        Returns:
            float32 [B, L] log-probabilities of the interpolated distribution.
        """
        decoder_state, memory_state, weight = parameters
        decoder: Any = nnx.merge(self._decoder, decoder_state)
        sites = [self._site] if self._memory else []
        final_BLD, states = decoder.hidden(token_BL, sites=sites)
        label_logprob = functools.partial(
            token_logprob,
            label_BL=label_BL,
            vocab_size=self.vocab_size,
            chunk_tokens=_SCORE_CHUNK_TOKENS,
        )
        logprob_BL = label_logprob(final_BLD, decoder.head_VD())
        if self._memory is None:
            return logprob_BL
        memory: Any = nnx.merge(self._memory, memory_state)
        recent_BLM = within_document(self._recent(token_BL), self.separator)
        input_BLX = memory.inputs(states[self._site], recent_BLM, decoder.embedding[...])
        memory_BL = label_logprob(memory.hidden(input_BLX), memory.head_VE(decoder.head_VD()))
        if weight is None:
            weight = memory.interpolation(input_BLX)
        return interpolate(memory_BL, logprob_BL, weight)


def _at_last(arrays: Any, last_B: jax.Array) -> Any:
    """Picks from a pytree of arrays [B, L, ...] the last place of each row."""
    take = functools.partial(jnp.take_along_axis, indices=last_B[:, None, None], axis=1)
    return jax.tree.map(lambda array_BLX: take(array_BLX)[:, 0], arrays)
