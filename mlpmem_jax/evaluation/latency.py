"""Milliseconds per token: one prompt, one token at a time, with a key/value cache.

The systems take turns token by token, so that whatever else the machine does falls on all
of them alike. Each draws greedily from its own distribution and reads what it drew.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlpmem_jax.evaluation.compare import SYSTEMS
from mlpmem_jax.generation.interpolated import InterpolatedModel
from mlpmem_jax.models.decoder import Site
from mlpmem_jax.parallel.sharding import replicated
from mlpmem_jax.retrieval.distributions import neighbor_weights
from mlpmem_jax.retrieval.engine import Engine

_WARM_UP = 3

# Maps log p_LM [V] and the decoder's key [D] to the probabilities of the kNN-LM [V].
Retrieve = Callable[[np.ndarray, np.ndarray], np.ndarray]


def retriever(
    engine: Engine, train_label: np.ndarray, num_neighbors: int, temperature: float, weight: float
) -> Retrieve:
    """Returns one step of the kNN-LM: search, Eq. 3, interpolation.

    Args:
        engine: Searches the training rows.
        train_label: Their labels.
        num_neighbors: K.
        temperature: τ.
        weight: λ.
    """

    def retrieve(logprob_V: np.ndarray, key_D: np.ndarray) -> np.ndarray:
        found = engine.search(key_D[None], num_neighbors)
        weight_K = neighbor_weights(found.distance_QK, temperature)[0]
        label_K = train_label[found.row_QK[0]]  # A missing neighbour's weight is 0.
        knn_V = np.bincount(label_K, weight_K, minlength=len(logprob_V)) / weight_K.sum()
        return (1 - weight) * np.exp(logprob_V) + weight * knn_V

    return retrieve


class _Writer:
    """One system that continues one text."""

    def __init__(self, model: InterpolatedModel, step: Any, retrieve: Retrieve | None):
        self._model = model
        self._step = step
        self._retrieve = retrieve
        self._cache: Any = jax.jit(
            lambda: model.empty_cache(1), out_shardings=model.cache_shardings(1)
        )()
        self._token: Any = jnp.zeros((1, 1), jnp.int32)
        self._length = 0

    def write(self) -> float:
        """Draws one token and returns the seconds that it took."""
        if self._length == self._model.context_tokens:
            # Start over: a step costs the same however full the cache is.
            self._cache = self._cache._replace(length_B=self._cache.length_B * 0)
            self._length = 0
        started = time.perf_counter()
        with jax.set_mesh(self._model.mesh):
            self._cache, self._token, *seen = self._step(
                self._model.parameters, self._cache, self._token
            )
        if self._retrieve is not None:
            probability_V = self._retrieve(*map(np.asarray, seen))
            self._token = np.asarray(probability_V.argmax(), np.int32).reshape(1, 1)
        jax.block_until_ready(self._token)
        self._length += 1
        return time.perf_counter() - started


def _compiled_step(model: InterpolatedModel, key: Site) -> Any:
    """Returns (parameters, cache, token) → cache, token drawn, log p [V], key [D]."""

    def step(parameters: Any, cache: Any, token_BL: jax.Array) -> Any:
        logprob_BV, states, cache = model.extend_with_states(
            parameters, cache, token_BL, jnp.ones(1, jnp.int32), (key,)
        )
        token_BL = jnp.argmax(logprob_BV, axis=-1).astype(jnp.int32)[:, None]
        return cache, token_BL, logprob_BV[0], states[key][0].astype(jnp.float32)

    everywhere = replicated(model.mesh)
    shardings = (model.cache_shardings(1), everywhere, everywhere, everywhere)
    return jax.jit(step, donate_argnums=1, out_shardings=shardings)


def time_tokens(
    models: dict[str, InterpolatedModel], key: Site, retrieve: Retrieve, num_tokens: int
) -> dict[str, dict[str, float]]:
    """Measures every system, in turns.

    Args:
        models: For each system its networks; the kNN-LM's are the decoder alone, and where
            both are the same object they are compiled once.
        key: The decoder's state that is searched for.
        retrieve: Searches and mixes, for the kNN-LM.
        num_tokens: Tokens that each system draws.

    Returns:
        Milliseconds per token: median, and the quartiles.
    """
    steps = {id(model): _compiled_step(model, key) for model in models.values()}
    writers = {
        name: _Writer(model, steps[id(model)], retrieve if name == "knn" else None)
        for name, model in models.items()
    }
    secs: dict[str, list[float]] = {name: [] for name in writers}
    for turn in range(_WARM_UP + num_tokens):
        for name, writer in writers.items():
            spent = writer.write()
            if turn >= _WARM_UP:
                secs[name].append(spent)
    assert list(secs) == list(SYSTEMS)
    return {
        name: {
            f"p{percent}": float(np.percentile(spent, percent)) * 1000 for percent in (25, 50, 75)
        }
        for name, spent in secs.items()
    }
