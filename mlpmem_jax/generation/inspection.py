"""What decoder and memory would each write next: candidates for a person to look at.

Suffixes: L tokens, V padded vocabulary, K candidates of each network.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlpmem_jax.generation.engine import buckets
from mlpmem_jax.generation.interpolated import InterpolatedModel


class Candidate(NamedTuple):
    """A token that may come next, with its log-probabilities; of the memory if there is one."""

    token: int
    decoder: float
    memory: float | None


class Inspector:
    """Looks at the next token of a prompt, without a slot."""

    def __init__(self, model: InterpolatedModel, num_top: int = 10):
        """Takes a model.

        Args:
            model: Decoder and memory.
            num_top: Most probable tokens of each network that are returned, K.
        """
        self._model = model
        self._num_top = min(num_top, model.vocab_size)
        self._look = jax.jit(self._looked)

    def candidates(self, token_ids: Sequence[int]) -> tuple[float | None, list[Candidate]]:
        """Returns the model's own λ (None without a memory), and what may come next.

        Args:
            token_ids: The prompt, with the separator that begins it; its last tokens are read.
        """
        context = self._model.context_tokens
        window = list(token_ids)[-context:]
        width = next(size for size in buckets(context) if size >= len(window))
        token_1L = np.full((1, width), self._model.separator, np.int32)
        token_1L[0, : len(window)] = window
        length_1 = np.full(1, len(window), np.int32)
        with jax.set_mesh(self._model.mesh):
            found = self._look(self._model.parameters, token_1L, length_1)
        weight, id_X, decoder_X, memory_X = jax.device_get(found)
        memory = [None] * len(id_X) if memory_X is None else memory_X.tolist()
        # A token that both networks propose comes once.
        listed = {
            token: Candidate(token, *logprobs)
            for token, *logprobs in zip(id_X.tolist(), decoder_X.tolist(), memory, strict=True)
        }
        return None if weight is None else float(weight), list(listed.values())

    def _looked(self, parameters: Any, token_1L: jax.Array, length_1: jax.Array) -> Any:
        empty = self._model.empty_cache(1, token_1L.shape[1])
        prediction, _, _ = self._model.predict(parameters, empty, token_1L, length_1)
        decoder_V = prediction.decoder[0]
        id_X = jax.lax.top_k(decoder_V, self._num_top)[1]
        if prediction.memory is None:
            return None, id_X, decoder_V[id_X], None
        memory_V = prediction.memory[0]
        id_X = jnp.concatenate([id_X, jax.lax.top_k(memory_V, self._num_top)[1]])
        weight = jnp.ravel(jnp.asarray(prediction.weight))[0]
        return weight, id_X, decoder_V[id_X], memory_V[id_X]
