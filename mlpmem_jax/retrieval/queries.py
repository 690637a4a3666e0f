"""Rows of a split as queries: which are searched for, and which rows are no neighbours of theirs.

NumPy only. Suffixes: N rows, Q queries, K neighbours, D documents, M pairs that are compared.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from mlpmem_jax.config.data import RetrievalConfig
from mlpmem_jax.retrieval.engine import Engine, row_ranges
from mlpmem_jax.retrieval.key_shards import KeyShards
from mlpmem_jax.retrieval.merge import Neighbors, drop, drop_own_row, no_neighbors
from mlpmem_jax.retrieval.shares import Share
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.stored_array import StoredArray

# Of K, how many more are searched for where more than the own row is excluded. Queries that
# need more are searched again.
_SPARE = 0.25
_LEAST_HELD = 1 << 22  # Neighbours of queries that are searched again; fewer cost more calls.


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
        start_Q, stop_Q = self._documents(row_Q).T
        excluded_QK = row_QK == row_Q[:, None]
        if self.by_document:
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
        """Returns the nearest rows that are not excluded, of those that the engine visits.

        An exact engine's answer is exact. All processes of an engine that spans them receive the
        same lists, and so search equally often.
        """
        wide = engine.visiting(first_list(num_neighbors)) or engine
        found = self._search_all(wide, query_QD, row_Q, num_neighbors)
        self.search_wider(engine, found, query_QD, row_Q)
        return found

    def search_wider(
        self, engine: Engine, found: Neighbors, query_QD: np.ndarray, row_Q: np.ndarray
    ) -> None:
        """Fills lists that hold fewer than K rows although others are left.

        These queries visit twice as many rows, and again, until nothing is short or all has been
        visited.

        Args:
            engine: All rows, in memory or in key shards.
            found: What visits to `first_list` rows find.
            query_QD: float32 queries.
            row_Q: Their rows.
        """
        num_neighbors = found.row_QK.shape[1]
        visited, short = first_list(num_neighbors), self.short(found, row_Q, engine.num_rows)
        while len(short) and visited < engine.num_rows:
            visited = min(2 * visited, engine.num_rows)
            wide = engine.visiting(visited)
            if wide is None:
                return
            # Of half as many rows nearly all were excluded.
            again = self._search_all(wide, query_QD[short], row_Q[short], num_neighbors, visited)
            found.distance_QK[short], found.row_QK[short] = again.distance_QK, again.row_QK
            short = short[self.short(again, row_Q[short], engine.num_rows)]

    def short(self, found: Neighbors, row_Q: np.ndarray, num_rows: int) -> np.ndarray:
        """Returns the queries whose list may lack a row, of so many in all: int64."""
        count_Q, most_Q = (found.row_QK >= 0).sum(axis=1), found.row_QK.shape[1]
        if self.by_document:
            most_Q = np.minimum(most_Q, num_rows - np.diff(self._documents(row_Q))[:, 0])
        return np.flatnonzero(count_Q < most_Q)

    def _search_all(
        self,
        engine: Engine,
        query_QD: np.ndarray,
        row_Q: np.ndarray,
        num_neighbors: int,
        first: int | None = None,
    ) -> Neighbors:
        if isinstance(engine, KeyShards):
            return engine.search_with(
                lambda part: self.search_in(part, query_QD, row_Q, num_neighbors, first),
                num_neighbors,
            )
        return self.search_in(engine, query_QD, row_Q, num_neighbors, first)

    def search_in(
        self,
        engine: Engine,
        query_QD: np.ndarray,
        row_Q: np.ndarray,
        num_neighbors: int,
        first: int | None = None,
    ) -> Neighbors:
        """Returns the nearest rows that are not excluded, of those that some keys in memory hold.

        Queries whose list is full and holds fewer than K such rows are searched again for twice as
        many, until it holds K or no more are found.

        Args:
            engine: What is searched.
            query_QD: float32 queries.
            row_Q: Their rows.
            num_neighbors: K.
            first: How many are searched for at first; None: a few more than K.
        """
        found = no_neighbors(len(row_Q), num_neighbors)
        short, skipped_Q2 = np.arange(len(row_Q)), None
        if self.by_document:
            document_Q2 = self._documents(row_Q)
            is_inside_Q = document_Q2[:, 0] <= engine.rows.start
            is_inside_Q &= document_Q2[:, 1] >= engine.rows.stop
            short = np.flatnonzero(~is_inside_Q)  # Others have no neighbour here.
            skipped_Q2 = document_Q2 if engine.skips_rows else None
        is_all_skipped = skipped_Q2 is not None and not self.repeat_tokens
        wanted = num_neighbors if is_all_skipped else first or first_list(num_neighbors)
        most = max(_LEAST_HELD, len(query_QD) * first_list(num_neighbors))  # Held at a time.
        while len(short):
            is_short_Q = np.empty(len(short), bool)
            for part in row_ranges(len(short), max(1, most // wanted)):
                query = short[part]
                skipped = None if skipped_Q2 is None else skipped_Q2[query]
                one = engine.search_later(query_QD[query], wanted, skipped)()
                kept = drop(one, self.excluded(row_Q[query], one.row_QK), num_neighbors)
                found.distance_QK[query], found.row_QK[query] = kept.distance_QK, kept.row_QK
                is_short_Q[part] = (one.row_QK[:, -1] >= 0) & (kept.row_QK[:, -1] < 0)
            short = short[is_short_Q]
            if wanted >= engine.num_rows:
                break
            wanted = min(2 * wanted, engine.num_rows)
        return found

    def _documents(self, row_Q: np.ndarray) -> np.ndarray:
        """Returns the first row of the document of each row, and of the next: int64 [Q, 2]."""
        document_Q = np.searchsorted(self.document_offset, row_Q, side="right")
        return np.stack([self.document_offset[document_Q - 1], self.document_offset[document_Q]], 1)


def first_list(num_neighbors: int) -> int:
    """Returns how many are searched for at first where more than the own row is excluded."""
    return num_neighbors + 1 + int(_SPARE * num_neighbors)


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
        self,
        engine: Engine,
        query_QD: np.ndarray,
        row_Q: np.ndarray,
        num_neighbors: int,
        *,
        is_part: bool = False,
    ) -> Callable[[], Neighbors]:
        """Searches as `Engine.search_later` does, without rows that are no neighbours.

        Args:
            engine: What is searched.
            query_QD: float32 queries.
            row_Q: Their rows.
            num_neighbors: K.
            is_part: Whether the engine holds some key shards, so that others may fill a list.
        """
        if not len(row_Q):
            return lambda: no_neighbors(0, num_neighbors)
        if not self.are_keys:
            return engine.search_later(query_QD, num_neighbors)
        if self.exclusion is not None:
            search = self.exclusion.search_in if is_part else self.exclusion.search
            found = search(engine, query_QD, row_Q, num_neighbors)
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
