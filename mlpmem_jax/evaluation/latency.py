"""Milliseconds per token: one prompt, one token at a time, with a key/value cache.

The systems take turns, so that whatever else the machine does falls on all of them alike. Each
draws greedily from its own distribution and reads what it drew.
"""

from collections.abc import Callable

import jax
import numpy as np

from mlpmem_jax.evaluation.timed_decoding import CompiledSteps, Draw, TimedWriter, in_turns
from mlpmem_jax.generation.interpolated import InterpolatedModel
from mlpmem_jax.models.decoder import Site
from mlpmem_jax.retrieval.distributions import neighbor_weights
from mlpmem_jax.retrieval.engine import Engine

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


def _drawing_from(retrieve: Retrieve) -> Draw:
    """Returns what draws the kNN-LM's token: all of it in NumPy, for one text."""

    def draw(logprob_BV: jax.Array, key_BD: jax.Array) -> np.ndarray:
        probability_V = retrieve(np.asarray(logprob_BV)[0], np.asarray(key_BD)[0])
        return np.asarray(probability_V.argmax(), np.int32).reshape(1, 1)

    return draw


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
    compiled = {id(model): CompiledSteps(model, key) for model in models.values()}
    draw = _drawing_from(retrieve)
    writers = {
        name: TimedWriter(compiled[id(model)], 1, draw if name == "knn" else None)
        for name, model in models.items()
    }
    secs: dict[str, list[float]] = {name: [] for name in writers}
    for name, spent in in_turns(writers, TimedWriter.write, num_tokens):
        secs[name].append(spent)
    return {
        name: {
            f"p{percent}": float(np.percentile(each, percent)) * 1000 for percent in (25, 50, 75)
        }
        for name, each in secs.items()
    }
