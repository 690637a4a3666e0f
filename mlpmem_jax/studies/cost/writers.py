"""Systems that continue texts, with a clock, and how much of it is search.

A kNN-LM runs in three parts: the decoder on the device, the search, and on the device
again the mixture with the K neighbours (Eq. 7), so that the vocabulary never travels.

Suffixes: B texts, L tokens of a prompt, K neighbours, D decoder width, V vocabulary.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlpmem_jax.evaluation.timed_decoding import CompiledSteps, TimedWriter
from mlpmem_jax.generation.interpolated import InterpolatedModel
from mlpmem_jax.models.decoder import Site
from mlpmem_jax.parallel.sharding import replicated
from mlpmem_jax.retrieval.distributions import neighbor_weights
from mlpmem_jax.retrieval.engine import Engine

# Maps keys [B, D] to shares [B, K] that sum to λ and labels [B, K] of the neighbours.
Search = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def make_search(
    engine: Engine, train_label: np.ndarray, num_neighbors: int, temperature: float, weight: float
) -> Search:
    """Returns the search of a kNN-LM: neighbours, Eq. 3.

    Args:
        engine: Searches rows of the datastore.
        train_label: Labels of these rows.
        num_neighbors: K.
        temperature: τ.
        weight: λ.
    """

    def search(key_BD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        found = engine.search(key_BD, num_neighbors)
        weight_BK = neighbor_weights(found.distance_QK, temperature)
        weight_BK *= np.float32(weight) / weight_BK.sum(axis=1, keepdims=True)
        return weight_BK, train_label[np.maximum(found.row_QK, 0)]

    return search


class CompiledModel(CompiledSteps):
    """A compiled model, and the mixture with neighbours.

    Args:
        model: Decoder, alone or with a memory.
        key: The decoder's state that is searched for.
        weight: λ of the neighbours, for the mixture.
    """

    def __init__(self, model: InterpolatedModel, key: Site, weight: float):
        super().__init__(model, key)
        self._weight = weight

    @functools.cached_property
    def mix(self) -> Any:
        """Returns (log p_LM [B, V], shares [B, K], labels [B, K]) → token [B, 1]."""

        def mix(logprob_BV: jax.Array, share_BK: jax.Array, label_BK: jax.Array) -> jax.Array:
            row_B1 = jnp.arange(len(logprob_BV))[:, None]
            prob_BV = (1 - self._weight) * jnp.exp(logprob_BV)
            prob_BV = prob_BV.at[row_B1, label_BK].add(share_BK)
            return jnp.argmax(prob_BV, axis=-1).astype(jnp.int32)[:, None]

        return jax.jit(mix, out_shardings=replicated(self.model.mesh))


@dataclasses.dataclass(frozen=True)
class System:
    """What draws tokens: a model, and its search (None: nothing is searched)."""

    compiled: CompiledModel
    search: Search | None


@dataclasses.dataclass(frozen=True)
class Spent:
    """Seconds of one step: all of it, and of the search alone (0 without one)."""

    total: float
    search: float


class _NeighborsDraw:
    """Draws the tokens of a kNN-LM.

    Attributes:
        search_secs: How long the last search took.
    """

    def __init__(self, compiled: CompiledModel, search: Search):
        self._compiled = compiled
        self._search = search
        self.search_secs = 0.0

    def __call__(self, logprob_BV: jax.Array, key_BD: jax.Array) -> Any:
        with jax.set_mesh(self._compiled.model.mesh):
            key = np.asarray(key_BD)  # Waits for the device.
            started = time.perf_counter()
            shares = self._search(key)
            self.search_secs = time.perf_counter() - started
            return self._compiled.mix(logprob_BV, *shares)


class Writer:
    """One system that continues B texts.

    Args:
        system: Which.
        batch: B.
    """

    def __init__(self, system: System, batch: int):
        self._draw: _NeighborsDraw | None = None
        if system.search is not None:
            self._draw = _NeighborsDraw(system.compiled, system.search)
        self._writer = TimedWriter(system.compiled, batch, self._draw)

    def read(self, token_BL: np.ndarray) -> Spent:
        """Reads prompts into empty caches and draws a token for each: time to the first."""
        return self._spent(self._writer.read(token_BL))

    def write(self) -> Spent:
        """Draws one more token for each text."""
        return self._spent(self._writer.write())

    def _spent(self, total: float) -> Spent:
        return Spent(total, 0.0 if self._draw is None else self._draw.search_secs)
