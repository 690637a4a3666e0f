"""Slots that continue texts independently of each other: read a prompt, step, make room.

A fixed number of slots share one cache and one compiled step. A prompt is read alone, by a function
compiled once for each bucket of lengths, and its keys and values are put into its slot: no row of
any computation reads another, so a text has the same bits whoever its neighbours are. When the row
of a slot is full, it starts again from the last half of the context, as in `decode.py`.

Suffixes: S slots, L tokens.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlpmem_jax.generation.interpolated import InterpolatedModel, ModelCache
from mlpmem_jax.generation.prediction import Alternatives
from mlpmem_jax.generation.slots import GREEDY, Drawn, Rows, Rule, Slots, next_tokens, rows_of
from mlpmem_jax.models.layers import padded_vocab_size
from mlpmem_jax.parallel.sharding import replicated

_SHORTEST_PREFILL = 16


@dataclasses.dataclass
class _Occupant:
    """The text in a slot, on the host.

    Attributes:
        rule: How it is drawn.
        tokens: Its prompt and what was drawn.
        drawn: Tokens drawn.
        in_cache: Tokens in the cache's row.
    """

    rule: Rule
    tokens: list[int]
    drawn: int = 0
    in_cache: int = 0


class Engine:
    """A model with slots. Not to be called from several threads at once."""

    def __init__(self, model: InterpolatedModel, num_slots: int, num_top: int = 5):
        """Makes empty slots.

        Args:
            model: Decoder and memory.
            num_slots: S.
            num_top: Alternatives to return with each token, K; at most the vocabulary.
        """
        self.model = model
        self.num_slots = num_slots
        self.num_top = min(num_top, model.vocab_size)
        self._padded_vocab = padded_vocab_size(model.vocab_size)
        self._occupants: dict[int, _Occupant] = {}
        everywhere: Any = replicated(model.mesh)
        places = Slots(model.cache_shardings(num_slots), everywhere)
        with jax.set_mesh(model.mesh):
            # Jitted, since donated buffers must be distinct and lie where they belong.
            self._slots = jax.jit(self._empty, out_shardings=places)()
        self._read = jax.jit(
            self._read_into, donate_argnums=1, out_shardings=(places, everywhere, everywhere)
        )
        self._advance = jax.jit(
            self._advanced, donate_argnums=1, out_shardings=(places, everywhere)
        )

    def free_slots(self) -> list[int]:
        """Returns the slots that hold no text."""
        return [slot for slot in range(self.num_slots) if slot not in self._occupants]

    def insert(
        self, slot: int, token_ids: Sequence[int], rule: Rule, *, scored: bool = False
    ) -> tuple[Drawn, list[Drawn]]:
        """Reads a prompt into a free slot and draws its first token.

        Args:
            slot: Where.
            token_ids: The prompt, with the separator that begins it. Of a longer one than the
                context the last tokens are read.
            rule: How its tokens are drawn.
            scored: Whether log-probabilities of the prompt are wanted.

        Returns:
            The first token; and the prompt's tokens but the first, if they are wanted.
        """
        assert slot not in self._occupants, slot
        context = self.model.context_tokens
        assert token_ids and (not scored or len(token_ids) <= context)
        occupant = _Occupant(rule, list(token_ids))
        drawn, scores = self._fill(slot, occupant, occupant.tokens[-context:], scored)
        self._occupants[slot] = occupant
        return drawn, scores

    def evict(self, slot: int) -> None:
        """Makes room; what the slot held is overwritten by the next text."""
        del self._occupants[slot]

    def step(self, *, scored: bool = False) -> dict[int, Drawn]:
        """Draws one token for every text.

        Args:
            scored: Whether log-probabilities are wanted.
        """
        context, found = self.model.context_tokens, {}
        full = [slot for slot, text in self._occupants.items() if text.in_cache == context]
        for slot in full:
            occupant = self._occupants[slot]
            window = occupant.tokens[-max(1, context // 2) :]
            found[slot], _ = self._fill(slot, occupant, window, scored=False)
        others = [slot for slot in self._occupants if slot not in full]
        if not others:
            return found
        active_S = np.isin(np.arange(self.num_slots), others)
        with jax.set_mesh(self.model.mesh):
            self._slots, result = self._advance(
                self.model.parameters, self._slots, active_S, np.bool_(scored)
            )
        token_S, told = jax.device_get(result)
        for slot in others:
            occupant = self._occupants[slot]
            occupant.in_cache += 1
            found[slot] = self._taken(occupant, Drawn.of(int(token_S[slot]), told, slot))
        return found

    def compile(self) -> None:
        """Compiles everything beforehand, by reading and stepping once."""
        for width in buckets(self.model.context_tokens):
            self.insert(0, [self.model.separator] * width, GREEDY)
            self.evict(0)
        self.insert(0, [self.model.separator], GREEDY)
        self.step()
        self.evict(0)

    def _taken(self, occupant: _Occupant, drawn: Drawn) -> Drawn:
        occupant.tokens.append(drawn.token)
        occupant.drawn += 1
        return drawn

    def _fill(
        self, slot: int, occupant: _Occupant, window: list[int], scored: bool
    ) -> tuple[Drawn, list[Drawn]]:
        """Reads a window into an empty row of the cache and draws the next token."""
        length, separator = len(window), self.model.separator
        width = next(size for size in buckets(self.model.context_tokens) if size >= length)
        token_1L = np.full((1, width), separator, np.int32)
        token_1L[0, :length] = window
        rows = rows_of(occupant.rule, occupant.tokens, occupant.drawn, self._padded_vocab)
        with jax.set_mesh(self.model.mesh):
            self._slots, result, scores = self._read(
                self.model.parameters, self._slots, np.int32(slot), token_1L,
                np.full(1, length, np.int32), rows, np.bool_(scored),
            )  # fmt: skip
        token_1, told = jax.device_get(result)
        occupant.in_cache = length
        drawn = self._taken(occupant, Drawn.of(int(token_1[0]), told, 0))
        if not scored:
            return drawn, []
        of_1L = jax.device_get(scores)
        of_L = Alternatives(*(array[0] for array in of_1L))
        return drawn, [Drawn.of(token, of_L, place) for place, token in enumerate(window[1:])]

    def _empty(self) -> Slots:
        rows = jax.tree.map(
            lambda array: jnp.repeat(jnp.asarray(array), self.num_slots, axis=0),
            rows_of(GREEDY, [], 0, self._padded_vocab),
        )
        return Slots(self.model.empty_cache(self.num_slots), rows)

    def _read_into(
        self,
        parameters: Any,
        slots: Slots,
        slot: jax.Array,
        token_1L: jax.Array,
        length_1: jax.Array,
        rows: Rows,
        scored: jax.Array,
    ) -> tuple[Slots, tuple[jax.Array, Alternatives], Alternatives]:
        """Reads a window, draws a token and puts both into a slot."""
        empty = self.model.empty_cache(1, token_1L.shape[1])
        logprob_1V, scores, read = self.model.extend_and_score(
            parameters, empty, token_1L, length_1, rows.weight, self.num_top, scored
        )
        # What follows a read prompt is wanted in any case: the prompt's cost hides it.
        rows, told = next_tokens(rows, logprob_1V, jnp.ones(1, bool), jnp.bool_(True), self.num_top)
        old = slots.cache

        def put(whole: jax.Array, one: jax.Array, axis: int = 0) -> jax.Array:
            start = [jnp.int32(0)] * whole.ndim
            start[axis] = slot
            return jax.lax.dynamic_update_slice(whole, one, start)

        decoder = old.decoder._replace(
            key=put(old.decoder.key, read.decoder.key, 1),
            value=put(old.decoder.value, read.decoder.value, 1),
            length_B=put(old.decoder.length_B, read.decoder.length_B),
            recent_BN=put(old.decoder.recent_BN, read.decoder.recent_BN),
        )
        cache = ModelCache(decoder, put(old.recent_BM, read.recent_BM))
        return Slots(cache, jax.tree.map(put, slots.rows, rows)), (rows.token, told), scores

    def _advanced(
        self, parameters: Any, slots: Slots, active_S: jax.Array, scored: jax.Array
    ) -> tuple[Slots, tuple[jax.Array, Alternatives]]:
        """Reads the token drawn last and draws the next, in every slot that is active.

        All of the cache is looked at: what the longest text needs would round the others otherwise.
        """
        rows = slots.rows
        logprob_SV, cache = self.model.extend(
            parameters, slots.cache, rows.token[:, None], active_S.astype(jnp.int32), rows.weight
        )
        rows, told = next_tokens(rows, logprob_SV, active_S, scored, self.num_top)
        return Slots(cache, rows), (rows.token, told)


def buckets(context: int) -> list[int]:
    """Returns the lengths that prompts are padded to: powers of two, and the context."""
    sizes, size = [], _SHORTEST_PREFILL
    while size < context:
        sizes.append(size)
        size *= 2
    return [*sizes, context]
