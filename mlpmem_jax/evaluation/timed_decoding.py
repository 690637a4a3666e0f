"""A model that continues texts, with a clock: token by token, from a prompt, many at once.

It draws greedily, from its own distribution or from one made of it, and reads what it drew.

Suffixes: B texts, L tokens of a prompt, D decoder width, V vocabulary.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mlpmem_jax.generation.interpolated import InterpolatedModel
from mlpmem_jax.models.decoder import Site
from mlpmem_jax.parallel.sharding import replicated

# Maps log p [B, V] and the decoder's keys [B, D], on devices, to the tokens drawn [B, 1].
Draw = Callable[[jax.Array, jax.Array], Any]
Timed = TypeVar("Timed")
Spent = TypeVar("Spent")

_WARM_UP = 3
_IN_A_ROW = 8


class CompiledSteps:
    """A model compiled once for every shape of tokens that it reads.

    Args:
        model: Decoder, alone or with a memory.
        key: The decoder's state that is searched for.
    """

    def __init__(self, model: InterpolatedModel, key: Site):
        self.model = model
        self._key = key
        # By the number of texts. What is compiled holds the model and not this object, so
        # that weights are freed as soon as nobody needs them.
        self._empty: dict[int, Any] = {}
        self._extend: dict[int, Any] = {}

    def empty(self, batch: int) -> Any:
        """Returns a function that makes an empty cache."""
        if batch not in self._empty:
            model = self.model
            shardings = model.cache_shardings(batch)
            self._empty[batch] = jax.jit(lambda: model.empty_cache(batch), out_shardings=shardings)
        return self._empty[batch]

    def extend(self, batch: int) -> Any:
        """Returns (parameters, cache, tokens [B, L]) → cache, token [B, 1], log p, key."""
        if batch not in self._extend:
            self._extend[batch] = _compiled_extend(self.model, self._key, batch)
        return self._extend[batch]


def _compiled_extend(model: InterpolatedModel, key: Site, batch: int) -> Any:
    def step(parameters: Any, cache: Any, token_BL: jax.Array) -> Any:
        length_B = jnp.full(batch, token_BL.shape[1], jnp.int32)
        logprob_BV, states, cache = model.extend_with_states(
            parameters, cache, token_BL, length_B, (key,)
        )
        token_B1 = jnp.argmax(logprob_BV, axis=-1).astype(jnp.int32)[:, None]
        return cache, token_B1, logprob_BV, states[key].astype(jnp.float32)

    everywhere = replicated(model.mesh)
    places = (model.cache_shardings(batch), everywhere, everywhere, everywhere)
    return jax.jit(step, donate_argnums=1, out_shardings=places)


class TimedWriter:
    """One system that continues B texts.

    Args:
        compiled: Its model.
        batch: B.
        draw: Draws the tokens; None: those that the model finds most probable.
    """

    def __init__(self, compiled: CompiledSteps, batch: int, draw: Draw | None = None):
        self._compiled = compiled
        self._batch = batch
        self._draw = draw
        self._clear()

    def _clear(self) -> None:
        self._empty()
        # Where a drawn token lies too: one shape and place, compiled once.
        zero_B1 = np.zeros((self._batch, 1), np.int32)
        self._token: Any = jax.device_put(zero_B1, replicated(self._compiled.model.mesh))

    def _empty(self) -> None:
        with jax.set_mesh(self._compiled.model.mesh):
            self._cache = jax.block_until_ready(self._compiled.empty(self._batch)())
        self._length = 0

    def read(self, token_BL: np.ndarray) -> float:
        """Reads prompts into empty caches and draws a token for each; returns the seconds."""
        self._clear()
        return self._step(token_BL)

    def write(self) -> float:
        """Draws one more token for each text and returns the seconds that it took."""
        if self._length == self._compiled.model.context_tokens:
            self._empty()  # A step costs the same however full the cache is.
        return self._step(self._token)

    def _step(self, token_BL: Any) -> float:
        model = self._compiled.model
        extend = self._compiled.extend(self._batch)
        started = time.perf_counter()
        with jax.set_mesh(model.mesh):
            self._cache, token, *seen = extend(model.parameters, self._cache, token_BL)
        if self._draw is not None:
            token = self._draw(*seen)
        self._token = jax.block_until_ready(token)
        self._length += token_BL.shape[1]
        return time.perf_counter() - started


def in_turns(
    writers: Mapping[str, Timed],
    work: Callable[[Timed], Spent],
    count: int,
    seed: Sequence[int] = (0,),
) -> Iterator[tuple[str, Spent]]:
    """Yields what each writer spends on a piece of work, `count` times each, in turns.

    A turn is several pieces in a row, of which the first is not counted: it finds the caches of
    the processor full of what the system before has read. With turns of one piece the decoder
    took 1.4 times as long beside exact search over a million rows as beside 16,000. Each round of
    turns has an order of its own: on a busy machine whoever follows exact search is slow for
    longer than a piece, and in a fixed order that was always the same system.

    Args:
        writers: By name.
        work: What is timed; returns what it spent.
        count: Pieces of each writer that count.
        seed: Of the orders.
    """
    order = np.random.default_rng(seed)
    for writer in writers.values():
        for _ in range(_WARM_UP):
            work(writer)
    for done in range(0, count, _IN_A_ROW):
        for name in order.permutation(list(writers)).tolist():
            writer = writers[name]
            work(writer)
            for _ in range(min(_IN_A_ROW, count - done)):
                yield name, work(writer)
