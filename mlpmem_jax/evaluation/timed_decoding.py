"""Systems that continue texts, with a clock: token by token, from a prompt, many at once.

Each draws greedily from its own distribution and reads what it drew. A kNN-LM runs in three parts:
the decoder on the device, the search, and on the device again the mixture with the K neighbours
(Eq. 7), so that the vocabulary never travels. `evaluate` and `cost` time the same steps.

Suffixes: B texts, L tokens of a prompt, K neighbours, D decoder width, V vocabulary.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mlpmem_jax.generation.interpolated import InterpolatedModel
from mlpmem_jax.generation.sampling import most_probable
from mlpmem_jax.models.decoder import Site
from mlpmem_jax.models.interpolation import neighbor_mixture
from mlpmem_jax.parallel.sharding import replicated
from mlpmem_jax.retrieval.distributions import neighbor_weights
from mlpmem_jax.retrieval.engine import Engine

# Maps keys [B, D] to shares [B, K] that sum to λ and labels [B, K] of the neighbours.
Search = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
Timed = TypeVar("Timed")
Piece = TypeVar("Piece")

_WARM_UP = 3
_IN_A_ROW = 8


def make_search(
    engine: Engine, train_label: np.ndarray, num_neighbors: int, temperature: float, weight: float
) -> Search:
    """Returns the search of a kNN-LM: K neighbours, then Eq. 3 with τ and its weight λ."""

    def search(key_BD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = engine.search(key_BD, num_neighbors)
        weight_BK = neighbor_weights(found.distance_QK, temperature)
        weight_BK *= np.float32(weight) / weight_BK.sum(axis=1, keepdims=True)
        return weight_BK, train_label[np.maximum(found.row_QK, 0)]

    return search


class CompiledModel:
    """A model compiled once for every number of texts and shape of tokens that it reads.

    Args:
        model: Decoder, alone or with a memory.
        key: The decoder's state that is searched for.
        weight: λ of the neighbours, for the mixture.
    """

    def __init__(self, model: InterpolatedModel, key: Site, weight: float):
        self.model = model
        self._key = key
        self._weight = weight
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

    @functools.cached_property
    def mix(self) -> Any:
        """Returns (log p_LM [B, V], shares [B, K], labels [B, K]) → token [B, 1]."""

        def mix(logprob_BV: jax.Array, share_BK: jax.Array, label_BK: jax.Array) -> jax.Array:
            prob_BV = neighbor_mixture(logprob_BV, share_BK, label_BK, self._weight)
            return most_probable(prob_BV)[:, None]

        return jax.jit(mix, out_shardings=replicated(self.model.mesh))


def _compiled_extend(model: InterpolatedModel, key: Site, batch: int) -> Any:
    def step(parameters: Any, cache: Any, token_BL: jax.Array) -> Any:
        length_B = jnp.full(batch, token_BL.shape[1], jnp.int32)
        prediction, states, cache = model.predict(parameters, cache, token_BL, length_B, (key,))
        logprob_BV = prediction.mixture()
        token_B1 = most_probable(logprob_BV)[:, None]
        return cache, token_B1, logprob_BV, states[key].astype(jnp.float32)

    everywhere = replicated(model.mesh)
    places = (model.cache_shardings(batch), everywhere, everywhere, everywhere)
    return jax.jit(step, donate_argnums=1, out_shardings=places)


@dataclasses.dataclass(frozen=True)
class System:
    """What draws tokens: a model, and its search (None: nothing is searched)."""

    compiled: CompiledModel
    search: Search | None = None


@dataclasses.dataclass(frozen=True)
class Spent:
    """Seconds of one step: all of it, and of the search alone (0 without one)."""

    total: float
    search: float


class Writer:
    """One system that continues B texts."""

    def __init__(self, system: System, batch: int):
        self._compiled, self._search = system.compiled, system.search
        self._batch = batch
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

    def read(self, token_BL: np.ndarray) -> Spent:
        """Reads prompts into empty caches and draws a token for each: time to the first."""
        self._clear()
        return self._step(token_BL)

    def write(self) -> Spent:
        """Draws one more token for each text."""
        if self._length == self._compiled.model.context_tokens:
            self._empty()  # A step costs the same however full the cache is.
        return self._step(self._token)

    def _step(self, token_BL: Any) -> Spent:
        model = self._compiled.model
        extend = self._compiled.extend(self._batch)
        search_secs = 0.0
        started = time.perf_counter()
        with jax.set_mesh(model.mesh):
            self._cache, token, logprob_BV, key_BD = extend(model.parameters, self._cache, token_BL)
            if self._search is not None:
                key = np.asarray(key_BD)  # Waits for the device.
                searched = time.perf_counter()
                shares = self._search(key)
                search_secs = time.perf_counter() - searched
                token = self._compiled.mix(logprob_BV, *shares)
        self._token = jax.block_until_ready(token)
        self._length += token_BL.shape[1]
        return Spent(time.perf_counter() - started, search_secs)


def in_turns(
    writers: Mapping[str, Timed],
    work: Callable[[Timed], Piece],
    count: int,
    seed: Sequence[int] = (0,),
) -> Iterator[tuple[str, Piece]]:
    """Yields what each writer spends on a piece of work, `count` times each, in turns.

    A turn is several pieces in a row, of which the first is not counted: it finds the caches of
    the processor full of what the system before has read. With turns of one piece the decoder
    took 1.4 times as long beside exact search over a million rows as beside 16,000. Each round of
    turns has an order of its own: on a busy machine whoever follows exact search is slow for
    longer than a piece, and in a fixed order that was always the same system.

    Args:
        work: What is timed; returns what it spent.
        count: Pieces of each writer that count.
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


def time_tokens(systems: Mapping[str, System], num_tokens: int) -> dict[str, dict[str, float]]:
    """Measures every system, in turns.

    Returns:
        Milliseconds per token: median, and the quartiles.
    """
    writers = {name: Writer(system, 1) for name, system in systems.items()}
    secs: dict[str, list[float]] = {name: [] for name in writers}
    for name, spent in in_turns(writers, Writer.write, num_tokens):
        secs[name].append(spent.total)
    return {
        name: {
            f"p{percent}": float(np.percentile(each, percent)) * 1000 for percent in (25, 50, 75)
        }
        for name, each in secs.items()
    }
