"""Log-probabilities of continuations, in batches of rows of about one length.

A row is read whole, without a cache; distributions are made at the scored places alone. Functions
are compiled once for each bucket of lengths, with a fixed number of rows, so that a row has the
same bits in any company.

Suffixes: B rows, L tokens, C scored places, K neighbours, D width, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlpmem_jax.console import progress
from mlpmem_jax.generation.engine import buckets
from mlpmem_jax.generation.interpolated import InterpolatedModel
from mlpmem_jax.generation.prediction import Alternatives, alternatives
from mlpmem_jax.models.decoder import Site
from mlpmem_jax.models.interpolation import neighbor_mixture
from mlpmem_jax.training.chunked import from_chunks, into_chunks

# Places whose whole distributions exist at once.
_CHUNK_PLACES = 64
_FEW_PLACES = (8, 64)


class Row(NamedTuple):
    """Tokens, of which the last `num_scored` are scored; the first begins the window."""

    tokens: tuple[int, ...]
    num_scored: int


class Score(NamedTuple):
    """Of the scored tokens of a row: their log-probability, and whether each is the likeliest."""

    logprob: float
    is_greedy: bool


@dataclasses.dataclass(frozen=True)
class KnnMixture:
    """How a kNN-LM joins the decoder (Eq. 7).

    Attributes:
        search: Maps keys [Q, D] to shares [Q, K] that sum to λ, and labels [Q, K].
        site: The state that is searched for.
        weight: λ.
    """

    search: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    site: Site
    weight: float

    def mix(self, logprob_CV: jax.Array, share_CK: jax.Array, label_CK: jax.Array) -> jax.Array:
        """Returns log((1 - λ) p + λ p_kNN), [C, V]."""
        return jnp.log(neighbor_mixture(logprob_CV, share_CK, label_CK, self.weight))


class RowScorer:
    """Scores rows with a model, alone or with a kNN-LM."""

    def __init__(self, model: InterpolatedModel, batch_size: int, knn: KnnMixture | None = None):
        """Takes a model.

        Args:
            model: Decoder and memory.
            batch_size: Rows that are read at once, B.
            knn: The kNN-LM; None: the model alone.
        """
        self._model, self._batch, self._knn = model, batch_size, knn
        self._keys = jax.jit(self._read_keys)
        self._score = jax.jit(self._scored)

    def score(self, rows: Sequence[Row]) -> list[Score]:
        """Scores rows of at most one token more than the context.

        Rows that occur several times are read once.
        """
        known: dict[Row, Score] = {row: Score(0.0, True) for row in rows if not row.num_scored}
        pending = sorted({*rows} - {*known}, key=lambda row: (*self._shape(row), row.tokens))
        with progress(len(pending), "row", "scoring") as bar:
            for batch in _batches(pending, self._shape, self._batch):
                known |= zip(batch, self._batch_scores(batch), strict=True)
                bar.update(len(batch))
        return [known[row] for row in rows]

    def _shape(self, row: Row) -> tuple[int, int]:
        """Returns L and C that a row is padded to."""
        length = len(row.tokens) - 1
        size = next(size for size in buckets(self._model.context_tokens) if size >= length)
        places = next(count for count in (*_FEW_PLACES, size) if count >= row.num_scored)
        return size, min(size, places)

    def _batch_scores(self, rows: Sequence[Row]) -> list[Score]:
        size, places = self._shape(rows[0])
        token_BL = np.full((self._batch, size), self._model.separator, np.int32)
        place_BC = np.zeros((self._batch, places), np.int32)
        label_BC = np.zeros((self._batch, places), np.int32)
        for number, (tokens, num_scored) in enumerate(rows):
            token_BL[number, : len(tokens) - 1] = tokens[:-1]
            first = len(tokens) - 1 - num_scored
            place_BC[number, :num_scored] = first + np.arange(num_scored)
            label_BC[number, :num_scored] = tokens[-num_scored:]
        found = self._found(token_BL, place_BC, label_BC)
        greedy_BC = found.logprob == found.top_logprob[..., 0]
        return [
            Score(
                float(found.logprob[number, : row.num_scored].sum(dtype=np.float64)),
                bool(greedy_BC[number, : row.num_scored].all()),
            )
            for number, row in enumerate(rows)
        ]

    def _found(
        self, token_BL: np.ndarray, place_BC: np.ndarray, label_BC: np.ndarray
    ) -> Alternatives:
        model, neighbors = self._model, None
        with jax.set_mesh(model.mesh):
            if self._knn is not None:
                key_BCD = np.asarray(self._keys(model.parameters, token_BL, place_BC))
                shares = self._knn.search(key_BCD.reshape(-1, key_BCD.shape[-1]))
                neighbors = tuple(each.reshape(*label_BC.shape, -1) for each in shares)
            scored = self._score(model.parameters, token_BL, place_BC, label_BC, neighbors)
            return Alternatives(*jax.device_get(scored))

    def _read_keys(self, parameters: Any, token_BL: jax.Array, place_BC: jax.Array) -> jax.Array:
        assert self._knn is not None
        site = self._knn.site
        _, states = self._model.at_places(parameters, token_BL, place_BC, (site,))
        return states[site].astype(jnp.float32)

    def _scored(
        self,
        parameters: Any,
        token_BL: jax.Array,
        place_BC: jax.Array,
        label_BC: jax.Array,
        neighbors: Any,
    ) -> Alternatives:
        inputs, _ = self._model.at_places(parameters, token_BL, place_BC)

        def of_chunk(chunk: Any) -> Alternatives:
            at_places, label_C, near = chunk
            logprob_CV = self._model.predicted(parameters, *at_places).mixture()
            if self._knn is not None:
                logprob_CV = self._knn.mix(logprob_CV, *near)
            return alternatives(logprob_CV, label_C, 1)

        chunks = into_chunks((inputs, label_BC, neighbors), 2, _CHUNK_PLACES)
        found = jax.lax.map(of_chunk, chunks)
        return jax.tree.map(lambda array: from_chunks(array, label_BC.shape), found)


def _batches(
    rows: Iterable[Row], shape: Callable[[Row], tuple[int, int]], size: int
) -> Iterator[list[Row]]:
    """Yields up to `size` rows of one shape at a time."""
    batch: list[Row] = []
    for row in rows:
        if batch and (len(batch) == size or shape(row) != shape(batch[0])):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def rows_of(stream: Sequence[int], num_scored: int, context: int) -> list[Row]:
    """Cuts a text into rows, each with as much text before it as the context holds.

    Args:
        stream: Separator, text, and its continuation.
        num_scored: Tokens of the continuation; nothing is before it where it is all but the first.
        context: Tokens that a row may read.

    Returns:
        One row, where all of it or the end of the text fits; else rows that score up to half of
        the context each.
    """
    if num_scored <= context:
        return [Row(tuple(stream[-(context + 1) :]), num_scored)]
    step, rows = max(1, context // 2), []
    start = len(stream) - num_scored
    while start < len(stream):
        stop = min(start + step, len(stream))
        rows.append(Row(tuple(stream[max(0, stop - context - 1) : stop]), stop - start))
        start = stop
    return rows
