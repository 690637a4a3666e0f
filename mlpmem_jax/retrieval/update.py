"""Neighbours after training rows came or went, from those that are kept.

A list is searched again only if a neighbour of it is gone; others are merged with what a search
among the new rows alone finds. With the exact engine that is what a search among all rows finds.
"""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlpmem_jax.config.data import DatastoreConfig, RetrievalConfig
from mlpmem_jax.console import progress, say
from mlpmem_jax.parallel.preemption import stop_if_alone
from mlpmem_jax.retrieval.engine import Engine, StoredKeys, row_ranges
from mlpmem_jax.retrieval.exact import ExactEngine
from mlpmem_jax.retrieval.index_builder import ExactCache
from mlpmem_jax.retrieval.merge import MISSING_ROW, Neighbors, drop_own_row, fit, merge
from mlpmem_jax.retrieval.neighbors import StoredNeighbors, check_enough_rows
from mlpmem_jax.store.array_specs import Split, neighbors_arrays
from mlpmem_jax.store.joined import Rows
from mlpmem_jax.store.manifest import Artifact, Completion
from mlpmem_jax.store.shards import ShardWriter


@dataclasses.dataclass(frozen=True)
class UpdateInputs:
    """What neighbours are updated from.

    Attributes:
        before: The training rows that the kept neighbours are among.
        after: The training rows as they are now.
        all: Exact search among all of these.
        new: Exact search among those that are new, which are the last; None: there are none.
        kept: Neighbours of the split before the change.
        chunking: How arrays are cut: as those of the datastore.
    """

    before: Artifact
    after: Artifact
    all: ExactCache
    new: ExactCache | None
    kept: Artifact
    retrieval: RetrievalConfig
    chunking: DatastoreConfig


def update_neighbors(
    artifact: Artifact, queries: Artifact, split: Split, inputs: UpdateInputs
) -> Completion:
    """Updates the neighbours of a split; finished shards of an interrupted start are kept.

    Args:
        artifact: Where they go.
        queries: The datastore of the split; of train, `inputs.after`.
        split: Which it is; a training row is never its own neighbour.
        inputs: What they are updated from.

    Raises:
        ConfigError: More neighbours are asked for than there are rows.
    """
    keys, num_neighbors = StoredKeys(queries), inputs.retrieval.num_neighbors
    update = _Update(keys, split, inputs)
    check_enough_rows(num_neighbors, update.num_rows, str(inputs.after.path))
    specs = neighbors_arrays(inputs.chunking, num_neighbors)
    writer = ShardWriter(artifact.path, specs, keys.num_rows, refuse_non_finite=False)
    missing = writer.own_rows()
    done = keys.num_rows - sum(rows.stop - rows.start for rows in missing)
    started = time.monotonic()
    with progress(keys.num_rows, "row", f"update {split}", initial=done) as bar:
        for rows in missing:
            for part in row_ranges(rows.stop, inputs.retrieval.query_batch, first=rows.start):
                found = update.of_rows(part)
                writer.put(part.start, {"row": found.row_QK, "distance": found.distance_QK})
                bar.update(part.stop - part.start)
                stop_if_alone(f"update {split}: finished shards are kept")
    arrays = writer.close()
    seconds = time.monotonic() - started
    say(
        f"neighbors/{split}: {update.among_all:,} rows searched among all "
        f"{update.num_rows:,} training rows, {update.among_new:,} among {update.num_new:,} new ones"
    )
    return Completion({"rows": keys.num_rows}, arrays, measured=update.measured(seconds))


class _Update:
    """Lists of a split's rows; counts what is searched."""

    def __init__(self, keys: StoredKeys, split: Split, inputs: UpdateInputs):
        before, after = Rows.of(inputs.before), Rows.of(inputs.after)
        self.num_rows = after.num_rows
        self.among_all = self.among_new = 0
        # Numbers now of the rows before, -1: gone; and of the queries now their numbers before.
        self._now_N = before.numbers_in(after)
        self.num_new = after.num_rows - int(np.count_nonzero(self._now_N >= 0))
        self._excludes_own = is_train = split == "train"
        self._before_Q = after.numbers_in(before) if is_train else np.arange(keys.num_rows)
        self._keys, self._inputs = keys, inputs
        self._kept = StoredNeighbors(inputs.kept)
        self._num_neighbors = inputs.retrieval.num_neighbors

    def of_rows(self, rows: slice) -> Neighbors:
        """Returns the neighbours of queries [start, stop)."""
        found, is_whole_Q = self._kept_lists(self._before_Q[rows])
        query_QD = self._keys.read(rows.start, rows.stop)
        if not is_whole_Q.all():
            place_Q = np.flatnonzero(~is_whole_Q)
            self._put(found, place_Q, self._among_all(query_QD[place_Q], place_Q + rows.start))
        if self._inputs.new is not None and is_whole_Q.any():
            self._merge_new(found, query_QD, np.flatnonzero(is_whole_Q))
        return found

    def _kept_lists(self, before_Q: np.ndarray) -> tuple[Neighbors, np.ndarray]:
        """Returns lists under the numbers of now, and whether each lacks nothing but new rows."""
        shape = (len(before_Q), self._num_neighbors)
        found = Neighbors(np.full(shape, np.inf, np.float32), np.full(shape, MISSING_ROW, np.int64))
        is_whole_Q = before_Q >= 0
        if is_whole_Q.any():
            known_Q = before_Q[is_whole_Q]
            first = int(known_Q[0])
            kept = _taken(self._kept.read(first, int(known_Q[-1]) + 1), known_Q - first)
            is_there = kept.row_QK >= 0
            row_QK = np.where(is_there, self._now_N[np.maximum(kept.row_QK, 0)], MISSING_ROW)
            self._put(found, np.flatnonzero(is_whole_Q), Neighbors(kept.distance_QK, row_QK))
            is_whole_Q[is_whole_Q] = ~(is_there & (row_QK < 0)).any(axis=1)
        return found, is_whole_Q

    def _among_all(self, query_QD: np.ndarray, row_Q: np.ndarray) -> Neighbors:
        self.among_all += len(row_Q)
        wanted = self._num_neighbors + self._excludes_own
        found = self._inputs.all().search(query_QD, wanted)
        return drop_own_row(found, row_Q) if self._excludes_own else found

    def _merge_new(self, lists: Neighbors, query_QD: np.ndarray, place_Q: np.ndarray) -> None:
        """Puts into each list the new rows that are no farther than its last."""
        self.among_new += len(place_Q)
        farthest_Q = lists.distance_QK[place_Q, -1]
        found = self._near_new(query_QD[place_Q], farthest_Q)
        if found.row_QK.shape[1]:
            near_Q = np.flatnonzero(found.row_QK[:, 0] >= 0)
            some = [_taken(lists, place_Q[near_Q]), _taken(found, near_Q)]
            self._put(lists, place_Q[near_Q], merge(some, self._num_neighbors))

    def _near_new(self, query_QD: np.ndarray, distance_Q: np.ndarray) -> Neighbors:
        """Returns the new rows that are no farther than a distance."""
        assert self._inputs.new is not None
        engine, wanted = self._inputs.new(), self._num_neighbors

        def search(part: Engine) -> Neighbors:
            assert isinstance(part, ExactEngine)
            return part.search_within(query_QD, distance_Q, wanted)

        if isinstance(engine, ExactEngine):
            found = search(engine)
        else:
            found = engine.search_with(search, wanted)
        first = self.num_rows - self.num_new
        row_QK = np.where(found.row_QK < 0, MISSING_ROW, found.row_QK + first)
        return Neighbors(found.distance_QK, row_QK)

    def _put(self, into: Neighbors, place_Q: np.ndarray, found: Neighbors) -> None:
        found = fit(found, self._num_neighbors)
        into.row_QK[place_Q], into.distance_QK[place_Q] = found.row_QK, found.distance_QK

    def measured(self, seconds: float) -> Mapping[str, Any]:
        """Returns what was searched; distances are counted in pairs of query and key."""
        return {
            "engine": "exact",
            "search_secs": round(seconds, 3),
            "searched_among_all": self.among_all,
            "searched_among_new": self.among_new,
            "pairs": self.among_all * self.num_rows + self.among_new * self.num_new,
            "pairs_of_a_rebuild": self._keys.num_rows * self.num_rows,
        }


def _taken(lists: Neighbors, place_Q: np.ndarray) -> Neighbors:
    return Neighbors(lists.distance_QK[place_Q], lists.row_QK[place_Q])
