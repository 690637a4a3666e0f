"""Rows of a split as queries: which are searched for, and which rows are no neighbours of theirs.

NumPy only. Suffixes: N rows, Q queries, K neighbours, D documents, M pairs that are compared.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from mlpmem_jax.config.data import RetrievalConfig
from mlpmem_jax.retrieval.engine import Engine, row_ranges
from mlpmem_jax.retrieval.merge import Neighbors, drop, drop_own_row, no_neighbors
from mlpmem_jax.retrieval.shares import Share
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.stored_array import StoredArray

# Of K, how many more are searched for where more than the own row is excluded. Queries that
# need more are searched again.
_SPARE = 0.25


@dataclasses.dataclass(frozen=True)
class Exclusion:
    """Training rows that are no neighbours of a training row.

    Attributes:
        document_offset: First row of each document, and the end of the last, int64 [D + 1].
        by_document: Whether all rows of a row's own document are excluded, not only itself.
        label_N: Labels of all rows; None: `repeat_tokens` is 0.
        repeat_tokens: A row with the same label after the same so many tokens is a repetition,
            and excluded; 0: repetitions are neighbours.
    """

    document_offset: np.ndarray
    by_document: bool
    label_N: np.ndarray | None = None
    repeat_tokens: int = 0

    def excluded(self, row_Q: np.ndarray, row_QK: np.ndarray) -> np.ndarray:
        """Returns which of the rows found for each query are excluded, bool [Q, K]."""
        document_Q = np.searchsorted(self.document_offset, row_Q, side="right")
        start_Q = self.document_offset[document_Q - 1]
        excluded_QK = row_QK == row_Q[:, None]
        if self.by_document:
            stop_Q = self.document_offset[document_Q]
            excluded_QK |= (row_QK >= start_Q[:, None]) & (row_QK < stop_Q[:, None])
        if self.repeat_tokens:
            # Nearer to the beginning of its document a row has too few tokens to be repeated.
            is_whole_Q = row_Q - self.repeat_tokens >= start_Q
            excluded_QK |= self._repeats(row_Q, np.where(is_whole_Q[:, None], row_QK, -1))
        return excluded_QK

    def _repeats(self, row_Q: np.ndarray, row_QK: np.ndarray) -> np.ndarray:
        """Compares labels backwards: token n is the label of row n − 1.

        Pairs are compared as long as they are equal: exact, and without memory for a hash of each
        row. A query's tokens hold no separator, so that equal ones lie within one document too.
        """
        label_N = self.label_N
        assert label_N is not None
        repeats_QK = row_QK >= self.repeat_tokens
        repeats_QK &= label_N[np.maximum(row_QK, 0)] == label_N[row_Q][:, None]
        query_M, place_M = np.nonzero(repeats_QK)
        for back in range(1, self.repeat_tokens + 1):
            is_same_M = label_N[row_QK[query_M, place_M] - back] == label_N[row_Q[query_M] - back]
            query_M, place_M = query_M[is_same_M], place_M[is_same_M]
        repeats_QK[:] = False
        repeats_QK[query_M, place_M] = True
        return repeats_QK

    def search(
        self, engine: Engine, query_QD: np.ndarray, row_Q: np.ndarray, num_neighbors: int
    ) -> Neighbors:
        """Returns the nearest rows that are not excluded, for K more are searched than K.

        Queries whose list is full and holds fewer than K such rows are searched again for twice as
        many, until it holds K or the engine finds no more. So an exact engine's answer is
        exact. All processes of an engine that spans them receive the same lists, and so search
        equally often.
        """
        wanted = num_neighbors + 1 + int(_SPARE * num_neighbors)
        most = len(query_QD) * wanted  # Neighbours held at a time.
        found, is_short_Q = self._search(engine, query_QD, row_Q, num_neighbors, wanted)
        short = np.flatnonzero(is_short_Q)
        while len(short) and wanted < engine.num_rows:
            wanted = min(2 * wanted, engine.num_rows)
            for part in row_ranges(len(short), max(1, most // wanted)):
                query = short[part]
                again, is_short_Q[query] = self._search(
                    engine, query_QD[query], row_Q[query], num_neighbors, wanted
                )
                found.distance_QK[query] = again.distance_QK
                found.row_QK[query] = again.row_QK
            short = short[is_short_Q[short]]
        return found

    def _search(
        self,
        engine: Engine,
        query_QD: np.ndarray,
        row_Q: np.ndarray,
        num_neighbors: int,
        wanted: int,
    ) -> tuple[Neighbors, np.ndarray]:
        """Returns lists without excluded rows, and which a longer list may have more of."""
        found = engine.search_later(query_QD, wanted)()
        kept = drop(found, self.excluded(row_Q, found.row_QK), num_neighbors)
        is_full_Q = found.row_QK[:, -1] >= 0
        return kept, is_full_Q & (kept.row_QK[:, -1] < 0)


@dataclasses.dataclass(frozen=True)
class Queries:
    """Rows of a split whose neighbours are wanted.

    Attributes:
        are_keys: Whether they are rows of the datastore that is searched: then none is its own
            neighbour.
        exclusion: What else is no neighbour; None: nothing.
        share: Rows that are searched for; None: all.
    """

    are_keys: bool
    exclusion: Exclusion | None = None
    share: Share | None = None

    def rows(self, rows: slice) -> np.ndarray:
        """Returns those of some rows that are searched for, int64 ascending."""
        return self.split(rows)[0]

    def split(self, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Returns those of some rows that are searched for, and the others: int64 ascending."""
        row_N = np.arange(rows.start, rows.stop, dtype=np.int64)
        if self.share is None:
            return row_N, row_N[:0]
        is_held_N = self.share.holds(row_N)
        return row_N[is_held_N], row_N[~is_held_N]

    def count(self, rows: slice) -> int:
        """Returns how many of some rows are searched for."""
        return rows.stop - rows.start if self.share is None else len(self.rows(rows))

    def visiting_order(self, engine: Engine, rows: slice) -> np.ndarray | None:
        """Returns places within a range of rows, those to search for in the engine's order.

        None: all rows, one after the other.
        """
        order = engine.visiting_order(rows) if self.are_keys else None
        if self.share is None:
            return order
        place_N = self.rows(rows) - rows.start
        return place_N if order is None else order[np.isin(order, place_N)]

    def search_later(
        self, engine: Engine, query_QD: np.ndarray, row_Q: np.ndarray, num_neighbors: int
    ) -> Callable[[], Neighbors]:
        """Searches as `Engine.search_later` does, without rows that are no neighbours.

        Args:
            engine: What is searched.
            query_QD: float32 queries.
            row_Q: Their rows.
            num_neighbors: K.
        """
        if not len(row_Q):
            return lambda: no_neighbors(0, num_neighbors)
        if not self.are_keys:
            return engine.search_later(query_QD, num_neighbors)
        if self.exclusion is not None:
            found = self.exclusion.search(engine, query_QD, row_Q, num_neighbors)
            return lambda: found
        finish = engine.search_later(query_QD, num_neighbors + 1)
        return lambda: drop_own_row(finish(), row_Q)

    def in_all_rows(self, rows: slice, found: Neighbors) -> Neighbors:
        """Returns lists of all rows, from those of the rows that are searched for."""
        if self.share is None:
            return found
        every = no_neighbors(rows.stop - rows.start, found.row_QK.shape[1])
        place_Q = self.rows(rows) - rows.start
        every.distance_QK[place_Q], every.row_QK[place_Q] = found.distance_QK, found.row_QK
        return every


def exclusion_of(config: RetrievalConfig, tokens: Artifact, train: Artifact) -> Exclusion | None:
    """Returns what the section excludes besides each row itself; None: nothing.

    Args:
        train: The datastore of the training rows.
    """
    if not config.excludes_more:
        return None
    repeats = config.exclude_repeats_tokens
    return Exclusion(
        document_offset=train_documents(tokens),
        by_document=config.exclude == "document",
        label_N=StoredArray(train, "label").read_all() if repeats else None,
        repeat_tokens=repeats,
    )


def train_documents(tokens: Artifact) -> np.ndarray:
    """Returns the first token of each training document, then their number: int64 [D + 1]."""
    return StoredArray(tokens, "train/document_offset").read_all()
