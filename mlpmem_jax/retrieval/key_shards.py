"""Search in keys that do not fit in memory: some key shards at a time, each loaded in turn."""

import copy
import gc
from collections.abc import Callable

import numpy as np

from mlpmem_jax.retrieval.engine import Engine, EngineName
from mlpmem_jax.retrieval.estimates import KeyShardPlan
from mlpmem_jax.retrieval.merge import Neighbors, merge


class KeyShards:
    """An engine whose keys are loaded while it searches.

    For many queries see `key_major.search_by_shards`, which loads each shard once for all of
    them; `search` loads all shards for the queries of one call.

    Args:
        name: Of the engine that searches what is loaded.
        num_rows: Rows of all shards.
        plan: How many shards are in memory at a time.
        load: Opens an engine over consecutive shards.
        spans_processes: Whether all processes search together.
        order: As `Engine.visiting_order`.
    """

    def __init__(
        self,
        name: EngineName,
        num_rows: int,
        plan: KeyShardPlan,
        load: Callable[[range], Engine],
        *,
        spans_processes: bool,
        order: Callable[[slice], np.ndarray | None] = lambda rows: None,
    ):
        self.name: EngineName = name
        self.num_rows = num_rows
        self.plan = plan
        self.spans_processes = spans_processes
        self._load = load
        self._order = order
        self._loaded: tuple[range, Engine] | None = None
        self._visited_rows: int | None = None

    def load(self, shards: range) -> Engine:
        """Returns an engine over consecutive shards; what was loaded before is freed first."""
        if self._loaded is None or self._loaded[0] != shards:
            self.release()
            engine = self._load(shards)
            if self._visited_rows is not None:
                engine = engine.visiting(self._visited_rows) or engine
            self._loaded = shards, engine
        return self._loaded[1]

    def release(self) -> None:
        """Frees the memory of what is loaded."""
        if self._loaded is not None:
            self._loaded = None
            gc.collect()  # Compiled functions and arrays may refer to each other.

    def search(self, query_QD: np.ndarray, num_neighbors: int) -> Neighbors:
        """Returns neighbours as the protocol says, of queries that are in memory."""
        return self.search_with(lambda part: part.search(query_QD, num_neighbors), num_neighbors)

    def search_with(self, search: Callable[[Engine], Neighbors], num_neighbors: int) -> Neighbors:
        """Returns what a search finds in all shards, each loaded once."""
        found: list[Neighbors] = []
        for start in range(0, self.plan.num_shards, self.plan.at_once):
            shards = range(start, min(start + self.plan.at_once, self.plan.num_shards))
            found.append(search(self.load(shards)))
            found = [merge(found, num_neighbors)]
        self.release()
        return found[0]

    @property
    def rows(self) -> range:
        """All rows."""
        return range(self.num_rows)

    skips_rows = False  # What is loaded may.

    def visiting(self, num_rows: int) -> "KeyShards | None":
        """Returns this engine, whose cells to visit hold at least so many rows in all shards."""
        if self.name != "routed":
            return None
        self.release()
        other = copy.copy(self)
        other._visited_rows = num_rows
        return other

    def search_later(
        self, query_QD: np.ndarray, num_neighbors: int, skipped_Q2: np.ndarray | None = None
    ) -> Callable[[], Neighbors]:
        """Searches now: nothing is left for later."""
        assert skipped_Q2 is None
        found = self.search(query_QD, num_neighbors)
        return lambda: found

    def visiting_order(self, rows: slice) -> np.ndarray | None:
        """Returns in which order to search rows of the datastore itself; none: any."""
        return self._order(rows)
