"""Distributions of decoder, kNN-LM, memory and their mixture at a sample of rows.

[rows, V] exists for `analyze.chunk_rows` rows at a time and never for a whole split.

Suffixes: N sampled rows, C rows of a chunk, D decoder width, K neighbours, V vocabulary.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx

from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.input.rows import RecentReader
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.models.interpolation import interpolate
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.parallel.sharding import replicated
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.settings import embedding_settings
from mlpmem_jax.retrieval.distributions import sparse_distributions
from mlpmem_jax.retrieval.knn_lm import read_labels
from mlpmem_jax.store.array_specs import Split, input_array
from mlpmem_jax.store.stored_array import StoredArray
from mlpmem_jax.studies.analyze import sharpness
from mlpmem_jax.studies.analyze.sharpness import Sharpness
from mlpmem_jax.studies.analyze.states import final_states

# What is measured, in this order; the mixture is decoder and memory at λ.
DISTRIBUTIONS = ("decoder", "knn", "memory", "mixture")
_DENSE = ("decoder", "memory", "mixture")


@dataclasses.dataclass(frozen=True)
class Sample:
    """Distributions at N rows of a split.

    Attributes:
        row_N: int64, ascending.
        label_N: int32 labels.
        steps: Numbers of tokens of `mass_CJ`.
        of: For each distribution its numbers.
        decoder_label_N: float32 log p of the label by the decoder, computed here anew.
    """

    row_N: np.ndarray
    label_N: np.ndarray
    steps: list[int]
    of: dict[str, Sharpness]
    decoder_label_N: np.ndarray


def measure_sample(
    run: Artifacts,
    decoder: Decoder,
    memory: Memory,
    split: Split,
    row_N: np.ndarray,
    *,
    temperature: float,
    weight: float,
    mesh: jax.sharding.Mesh,
) -> Sample:
    """Measures the distributions at some rows of a split.

    Args:
        decoder: On the mesh.
        memory: On the mesh.
        split: Whose rows; its exact neighbours are stored.
        row_N: Rows, ascending.
        temperature: τ of the kNN distribution, which is over all K neighbours.
        weight: λ of the memory in the mixture.
    """
    settings = run.config.analyze
    tokens = TokenSplit.open(run.tokens, split)
    steps = sharpness.steps_up_to(decoder.vocab_size)
    label_N = np.empty(len(row_N), np.int32)
    step = _compiled(decoder, memory, weight, settings.masses, steps, mesh)
    num_recent = memory.config.num_read_tokens
    reader = _Reader(run, split, num_recent, tokens.separator_id)
    parts: dict[str, list[Sharpness]] = {name: [] for name in DISTRIBUTIONS}
    label_logprob: list[np.ndarray] = []
    done = 0
    states = final_states(embedding_settings(run.config), decoder, tokens, row_N, mesh)
    for row_C, final_CD in _chunks(states, settings.chunk_rows):
        label_C = reader.labels(row_C)
        knn = sparse_distributions(*reader.neighbors(row_C), temperature, reader.num_neighbors)
        recent_CM = reader.recent(row_C)
        rows = (final_CD, reader.inputs(row_C), recent_CM, knn.id_QS, knn.prob_QS, label_C)
        short = settings.chunk_rows - len(row_C)
        padded = (np.pad(a, ((0, short),) + ((0, 0),) * (a.ndim - 1)) for a in rows)
        dense, label_logprob_C = jax.device_get(step(*padded))
        for name, numbers in dense.items():
            parts[name].append(Sharpness(*(array[: len(row_C)] for array in numbers)))
        parts["knn"].append(sharpness.knn_sharpness(knn, settings.masses, steps))
        label_logprob.append(label_logprob_C[: len(row_C)])
        label_N[done : done + len(row_C)] = label_C
        done += len(row_C)
    of = {name: sharpness.concatenate(each) for name, each in parts.items()}
    return Sample(row_N, label_N, steps, of, np.concatenate(label_logprob))


def _compiled(
    decoder: Decoder,
    memory: Memory,
    weight: float,
    masses: Sequence[float],
    steps: list[int],
    mesh: jax.sharding.Mesh,
) -> Any:
    """Returns a function of a chunk: numbers of each dense distribution, and log p(label)."""
    decoder_graph, decoder_state = nnx.split(decoder)
    memory_graph, memory_state = nnx.split(memory)

    def measure(
        states: Any,
        final_CD: Any,
        state_CD: Any,
        recent_CM: Any,
        id_CK: Any,
        prob_CK: Any,
        label_C: Any,
    ) -> Any:
        network: Any = nnx.merge(decoder_graph, states[0])
        remembering: Any = nnx.merge(memory_graph, states[1])
        logits_CV = network.logits(final_CD)
        decoder_CV = jax.nn.log_softmax(logits_CV, axis=-1)
        input_CX = remembering.inputs(state_CD, recent_CM, network.embedding[...])
        hidden_CE = remembering.hidden(input_CX)
        memory_CV = jax.nn.log_softmax(remembering.logits(hidden_CE, network.head_VD()), axis=-1)
        whole = (decoder_CV, memory_CV, interpolate(memory_CV, decoder_CV, weight))
        found = {
            name: sharpness.dense_sharpness(logprob_CV, id_CK, prob_CK, masses, steps)
            for name, logprob_CV in zip(_DENSE, whole, strict=True)
        }
        return found, jax.numpy.take_along_axis(decoder_CV, label_C[:, None], axis=1)[:, 0]

    jitted = jax.jit(measure, out_shardings=replicated(mesh))

    def step(*rows: np.ndarray) -> Any:
        with jax.set_mesh(mesh):
            return jitted((decoder_state, memory_state), *rows)

    return step


def _chunks(
    parts: Iterator[tuple[np.ndarray, np.ndarray]], size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts rows that arrive in uneven parts into chunks of `size`; the last may be short."""
    row = np.empty(0, np.int64)
    state = np.empty((0, 0), np.float32)
    for more_row, more_state in parts:
        row = np.concatenate([row, more_row])
        state = np.concatenate([state, more_state]) if state.size else more_state
        while len(row) >= size:
            yield row[:size], state[:size]
            row, state = row[size:], state[size:]
    if len(row):
        yield row, state


class _Reader:
    """Reads what was stored of single rows."""

    def __init__(self, run: Artifacts, split: Split, num_recent: int, separator_id: int):
        neighbors, datastore = run.neighbors(split), run.datastore(split)
        self._num_recent = num_recent
        self._recent = RecentReader(datastore, num_recent, separator_id)
        self._row = StoredArray(neighbors, "row")
        self._distance = StoredArray(neighbors, "distance")
        self._input = StoredArray(datastore, input_array(datastore.load().arrays))
        self._label = StoredArray(datastore, "label")
        self._train_label = read_labels(run.datastore("train"))
        self.num_neighbors = int(self._row.shape[1])

    def _take(self, stored: StoredArray, row_C: np.ndarray) -> np.ndarray:
        """Reads the range that holds ascending rows; they are dense in small splits."""
        first, last = int(row_C[0]), int(row_C[-1]) + 1
        if last - first <= 8 * len(row_C):
            return stored.read(first, last)[row_C - first]
        return stored.take(row_C)

    def labels(self, row_C: np.ndarray) -> np.ndarray:
        return self._take(self._label, row_C)

    def inputs(self, row_C: np.ndarray) -> np.ndarray:
        return self._take(self._input, row_C).astype(np.float32)

    def recent(self, row_C: np.ndarray) -> np.ndarray:
        """Returns recent tokens, int32 [C, M]; M may be 0."""
        if not self._num_recent:
            return np.empty((len(row_C), 0), np.int32)
        first, length = int(row_C[0]), int(row_C[-1]) - int(row_C[0]) + 1
        if length <= 8 * len(row_C):  # Dense rows: one read.
            found = self._recent.start(np.array([first]), length).result()["recent"]
            return found[0, row_C - first]
        return self._recent.start(row_C, 1).result()["recent"][:, 0]

    def neighbors(self, row_C: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns distances [C, K] and labels of the neighbours [C, K]."""
        row_CK = self._take(self._row, row_C)
        return self._take(self._distance, row_C), self._train_label[np.maximum(row_CK, 0)]
