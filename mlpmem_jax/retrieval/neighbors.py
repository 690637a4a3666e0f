"""Searching a whole split: batch by batch, written in whole shards, resumable.

While an engine searches a batch, a second thread turns the one before into what is stored
and writes finished shards; ScaNN, XLA and NumPy release the interpreter's lock.
"""

import concurrent.futures
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mlpmem_jax.console import progress
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.parallel.preemption import (
    Preempted,
    preempted,
    stop_if_alone,
    stopping_where_asked,
)
from mlpmem_jax.parallel.sharing import is_mine, most_shared, process_count, share_of
from mlpmem_jax.retrieval.engine import READ_ROWS, Engine, Keys, row_ranges
from mlpmem_jax.retrieval.merge import Neighbors, no_neighbors
from mlpmem_jax.retrieval.queries import Queries
from mlpmem_jax.retrieval.recall import recall
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.shards import ShardWriter
from mlpmem_jax.store.stored_array import StoredArray

# Rows of a batch (int64) and what was found for them, to arrays of the same rows.
Consume = Callable[[np.ndarray, Neighbors], Mapping[str, np.ndarray]]
Part = tuple[np.ndarray, concurrent.futures.Future[Mapping[str, np.ndarray]]]
_MAX_PENDING_BATCHES = 4
# Of keys that are read at once, and of what is found for them, which waits until shards are whole.
_READ_BYTES, _FOUND_BYTES = 256 << 20, 256 << 20


def check_enough_rows(num_neighbors: int, num_rows: int, name: str) -> None:
    """Refuses more neighbours than a row has, its own row excluded.

    Raises:
        ConfigError: Names the key and both numbers.
    """
    if num_neighbors > num_rows - 1:
        raise ConfigError(
            f"retrieval.num_neighbors={num_neighbors} is more than the {max(0, num_rows - 1)} "
            f"other rows of {name} ({num_rows} rows, a row's own excluded)"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitSearch:
    """A split whose neighbours are wanted.

    Attributes:
        keys: The queries: keys of the split.
        writer: Where results go; finished shards are skipped.
        consume: Turns rows and their neighbours into the arrays to write, in another thread.
        num_neighbors: K.
        query_batch: Queries searched at once.
        queries: Which rows are searched for; the others have no neighbours.
        description: What the progress bar says.
    """

    keys: Keys
    writer: ShardWriter
    consume: Consume
    num_neighbors: int
    query_batch: int
    queries: Queries
    description: str


def search_split(engine: Engine, split: SplitSearch) -> dict[str, float]:
    """Searches every row of a split that is not written yet.

    Each of several processes searches for its own shards, unless the engine spans them: then
    all of them search for all, together, and each writes its own.

    Returns:
        Numbers for the manifest: queries of this start, seconds, queries per second.

    Raises:
        Preempted: The machine is about to go; finished shards stay.
    """
    keys, writer, queries = split.keys, split.writer, split.queries
    num_neighbors, query_batch = split.num_neighbors, split.query_batch
    missing = writer.missing_shards()
    searched = missing if engine.spans_processes else share_of(missing)
    num_queries = sum(queries.count(writer.rows_of(shard)) for shard in missing)
    most_rows = rows_at_once(query_batch, keys.width, num_neighbors)
    together = [[shard] for shard in searched]
    # So often all processes ask whether to stop, however many shards are theirs.
    turns = len(missing) if engine.spans_processes else most_shared(missing)
    has_order = queries.are_keys and engine.visiting_order(slice(0, 0)) is not None
    if not has_order:
        most_rows = max(query_batch, most_rows // 4)
    elif process_count() == 1:
        together = _consecutive(searched, most_rows // writer.shard_rows)
        turns = len(together)
    done = writer.num_rows - writer.count_rows(missing)
    bar = progress(writer.num_rows, "row", split.description, initial=done)
    started = time.monotonic()

    def take(row_Q: np.ndarray, finish: Callable[[], Neighbors]) -> Mapping[str, np.ndarray]:
        return split.consume(row_Q, finish())

    with bar, stopping_where_asked(), concurrent.futures.ThreadPoolExecutor(1) as pool:
        tasks: list[concurrent.futures.Future[Any]] = []
        try:
            for turn in range(turns):
                parts: list[Part] = []
                shards = together[turn] if turn < len(together) else []
                is_written = len(shards) > 0 and is_mine(shards[0])
                for block in _blocks(writer, shards, most_rows):
                    row_N, rest_N = queries.split(block)
                    if len(rest_N) and is_written:
                        none = functools.partial(no_neighbors, len(rest_N), num_neighbors)
                        parts.append((rest_N, pool.submit(take, rest_N, none)))
                    bar.update(len(rest_N))
                    if not len(row_N):
                        continue
                    key_ND = keys.read(block.start, block.stop)
                    order = queries.visiting_order(engine, block)
                    if order is not None:
                        row_N, key_ND = order + block.start, key_ND[order]
                    for part in row_ranges(len(row_N), query_batch):
                        found = queries.search_later(
                            engine, key_ND[part], row_N[part], num_neighbors
                        )
                        bar.update(part.stop - part.start)
                        if is_written:
                            parts.append((row_N[part], pool.submit(take, row_N[part], found)))
                            tasks = drain([*tasks, parts[-1][1]], _MAX_PENDING_BATCHES)
                        stop_if_alone(f"{split.description}: finished shards are kept")
                if parts:
                    written = pool.submit(_write, writer, shards, parts)
                    tasks = drain([*tasks, written], _MAX_PENDING_BATCHES)
                if preempted():
                    raise Preempted(f"{split.description}: finished shards are kept")
        except Preempted:
            drain(tasks, 0)
            writer.flush()
            raise
        drain(tasks, 0)
        writer.close()
    return spent(num_queries, time.monotonic() - started)


def _consecutive(shards: Sequence[int], most: int) -> list[list[int]]:
    """Cuts shards into runs of consecutive ones: these are searched in one order."""
    found: list[list[int]] = []
    for shard in shards:
        if found and len(found[-1]) < most and shard == found[-1][-1] + 1:
            found[-1].append(shard)
        else:
            found.append([shard])
    return found


def _blocks(writer: ShardWriter, shards: Sequence[int], most_rows: int) -> Iterator[slice]:
    """Yields the rows of consecutive shards, cut into what is read at once."""
    if not shards:
        return
    first, last = writer.rows_of(shards[0]), writer.rows_of(shards[-1])
    num_rows = last.stop - first.start
    even = -(-num_rows // -(-num_rows // most_rows))
    yield from row_ranges(last.stop, even, first=first.start)


def rows_at_once(query_batch: int, width: int, num_neighbors: int) -> int:
    """Returns the rows that are read, and put in an engine's order, at once."""
    rows = min(_READ_BYTES // (4 * width), _FOUND_BYTES // (12 * num_neighbors))
    return max(query_batch, rows)


def spent(num_queries: int, seconds: float) -> dict[str, float]:
    """Returns what manifests record of a search."""
    return {
        "queries": num_queries,
        "search_secs": round(seconds, 3),
        "queries_per_sec": round(num_queries / seconds, 1) if num_queries else 0.0,
    }


def drain(
    tasks: Sequence[concurrent.futures.Future[Any]], allowed: int
) -> list[concurrent.futures.Future[Any]]:
    """Waits until at most so many tasks are left; lets their errors through."""
    count = max(0, len(tasks) - allowed)
    for task in tasks[:count]:
        task.result()
    return list(tasks[count:])


def _write(writer: ShardWriter, shards: Sequence[int], parts: Sequence[Part]) -> None:
    # Tasks run in order in one thread: the parts are done.
    first, last = writer.rows_of(shards[0]), writer.rows_of(shards[-1])
    arrays: dict[str, np.ndarray] = {}
    for row_Q, part in parts:
        for name, values in part.result().items():
            if name not in arrays:
                shape = (last.stop - first.start, *values.shape[1:])
                arrays[name] = np.empty(shape, values.dtype)
            arrays[name][row_Q - first.start] = values
    for shard in shards:
        rows = writer.rows_of(shard)
        inside = slice(rows.start - first.start, rows.stop - first.start)
        writer.put(rows.start, {name: values[inside] for name, values in arrays.items()})


class StoredNeighbors:
    """Reads the neighbours of a split."""

    def __init__(self, artifact: Artifact):
        self._row = StoredArray(artifact, "row")
        self._distance = StoredArray(artifact, "distance")
        self.num_rows, self.num_neighbors = self._row.shape

    def read(self, start: int, stop: int) -> Neighbors:
        """Returns the neighbours of rows [start, stop).

        Raises:
            ArtifactError: A shard is missing or damaged.
        """
        return Neighbors(self._distance.read(start, stop), self._row.read(start, stop))

    def take(self, row_Q: np.ndarray) -> Neighbors:
        """Returns the neighbours of single rows (int64)."""
        return Neighbors(self._distance.take(row_Q), self._row.take(row_Q))

    def recall(self, truth: "StoredNeighbors") -> float:
        """Returns recall@K over all rows of a split, against its true neighbours."""
        found = 0.0
        for rows in row_ranges(self.num_rows, READ_ROWS):
            part = recall(self.read(rows.start, rows.stop), truth.read(rows.start, rows.stop))
            found += part * (rows.stop - rows.start)
        return found / self.num_rows
