"""Searching a whole split in keys that do not fit in memory, at any size with the same memory.

Key shards are loaded once for all queries, some at a time. The nearest so far of each query lie
on disk in between (running lists). It stops and goes on at (key shard, block of queries).
"""

import concurrent.futures
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mlpmem_jax.console import Progress, progress, say
from mlpmem_jax.parallel.agreement import of_first
from mlpmem_jax.parallel.hardware import bytes_under
from mlpmem_jax.parallel.multihost import barrier, is_writer
from mlpmem_jax.parallel.preemption import (
    Preempted,
    preempted,
    stop_if_alone,
    stopping_where_asked,
)
from mlpmem_jax.parallel.sharing import is_mine
from mlpmem_jax.retrieval.engine import Engine, row_ranges
from mlpmem_jax.retrieval.estimates import LIST_BYTES, spilled_rows
from mlpmem_jax.retrieval.key_shards import KeyShards
from mlpmem_jax.retrieval.merge import Neighbors, concatenate, merge, no_neighbors
from mlpmem_jax.retrieval.neighbors import SplitSearch, drain, spent
from mlpmem_jax.retrieval.queries import first_list
from mlpmem_jax.retrieval.running_lists import RunningLists
from mlpmem_jax.store.contents import RUNNING
from mlpmem_jax.store.files import check_free_space

_MAX_PENDING_BLOCKS = 2
# Lists in memory at a time where those that are short are searched for again.
_WIDENED_BYTES = 1 << 30
# Rows of queries, and the shard of the output that they belong to.
Block = tuple[int, slice]


def search_by_shards(engine: KeyShards, split: SplitSearch) -> dict[str, float]:
    """Searches every row of a split that is not written yet, as `neighbors.search_split` does.

    Several processes load shards at the same time and go through the same blocks; each keeps the
    lists of its own rows.

    Raises:
        Preempted: The machine is about to go; what is on disk stays.
        UserError: Running lists and results do not fit on the disk.
    """
    writer, queries, description = split.writer, split.queries, split.description
    num_neighbors, query_batch = split.num_neighbors, split.query_batch
    wide = None if queries.exclusion is None else engine.visiting(first_list(num_neighbors))
    lists = RunningLists(writer.path, num_neighbors)
    missing = writer.missing_shards()
    counts = {shard: queries.count(writer.rows_of(shard)) for shard in missing}
    num_queries = sum(counts.values())
    waves = _waves(counts, spilled_rows(num_neighbors))
    most = max((sum(counts[shard] for shard in wave) for wave in waves), default=0)
    spilled = most * num_neighbors * LIST_BYTES
    held = bytes_under(writer.path / RUNNING)  # By an interrupted start.
    needed = max(0, spilled - held) + writer.missing_bytes()
    check_free_space(writer.path, needed, f"search in parts ({description})")
    done = writer.num_rows - writer.count_rows(missing)
    bar = progress(writer.num_rows, "row", description, initial=done)
    started = time.monotonic()
    with bar, stopping_where_asked(), concurrent.futures.ThreadPoolExecutor(1) as pool:
        search = functools.partial(_Wave, wide or engine, split, lists)
        for shards in [*waves, []]:  # Last none: what earlier waves left is removed.
            blocks = [
                (shard, rows)
                for shard in shards
                for rows in row_ranges(
                    writer.rows_of(shard).stop, query_batch, first=writer.rows_of(shard).start
                )
            ]
            barrier(f"{description}: wave")  # What finished shards needed is removed next.
            covered = lists.prepare([rows for _, rows in blocks]) if is_writer() else None
            wave = search(blocks, of_first(covered), pool, bar)
            wave.run(widens=wide is not None)
        engine.release()
        writer.close()
    plan = {"key_shards": engine.plan.num_shards, "key_shards_at_once": engine.plan.at_once}
    return spent(num_queries, time.monotonic() - started) | plan


def _waves(counts: Mapping[int, int], most: int) -> list[list[int]]:
    """Cuts output shards into groups whose running lists lie on disk at the same time.

    Args:
        counts: Queries of each missing shard.
        most: Queries of a group, unless one shard has more.
    """
    waves: list[list[int]] = []
    held = 0
    for shard, count in counts.items():
        if not waves or held + count > most:
            waves.append([])
            held = 0
        waves[-1].append(shard)
        held += count
    return waves


class _Wave:
    """One set of queries against all key shards.

    Args:
        engine: What is searched.
        split: The split that the queries are of.
        lists: Where running lists go.
        blocks: The queries, in order.
        covered: How many key shards each block has been searched in.
        pool: One thread, which finishes blocks in order.
        bar: Progress in rows, each counted in parts of key shards.
    """

    def __init__(
        self,
        engine: KeyShards,
        split: SplitSearch,
        lists: RunningLists,
        blocks: Sequence[Block],
        covered: Sequence[int],
        pool: concurrent.futures.ThreadPoolExecutor,
        bar: Progress,
    ):
        self._engine, self._lists = engine, lists
        self._keys, self._writer = split.keys, split.writer
        self._consume, self._num_neighbors = split.consume, split.num_neighbors
        self._queries, self._description = split.queries, split.description
        self._blocks, self._covered = list(blocks), list(covered)
        self._pool, self._bar = pool, bar
        self._tasks: list[concurrent.futures.Future[Any]] = []
        self._widens = False

    def run(self, widens: bool) -> None:
        """Searches until all blocks are written.

        Args:
            widens: Whether lists that all key shards leave short are searched for again: then
                only these lists say which.
        """
        self._widens = widens
        total = self._engine.plan.num_shards
        try:
            while min(self._covered, default=total) < total:
                shards = self._next_shards()
                self._search(shards)
                self._covered = [
                    shards.stop if done == shards.start else done for done in self._covered
                ]
        except Preempted:
            drain(self._tasks, 0)
            self._writer.flush()
            raise
        if widens:
            self._engine.release()
            self._write_widened()
        self._writer.flush()

    def _next_shards(self) -> range:
        """Returns the next shards to load: those that some blocks lack and no block has."""
        plan, first = self._engine.plan, min(self._covered)
        others = [done for done in self._covered if done > first]
        return range(first, min([first + plan.at_once, plan.num_shards, *others]))

    def _search(self, shards: range) -> None:
        total = self._engine.plan.num_shards
        started = time.monotonic()
        loaded = self._engine.load(shards)
        say(
            f"{self._description}: key shards {shards.start + 1} to {shards.stop} of {total} "
            f"loaded in {time.monotonic() - started:.1f} s"
        )
        stop_text = f"{self._description}: what has been searched is kept"
        shard = -1
        for (shard_of_block, rows), done in zip(self._blocks, self._covered, strict=True):
            if done != shards.start:
                continue
            if shard_of_block != shard:
                # As often in all processes, whichever blocks are theirs.
                if preempted():
                    raise Preempted(stop_text)
                shard = shard_of_block
            mine = is_mine(shard)
            if mine or self._engine.spans_processes:
                finish = self._found(loaded, rows)
                if mine:
                    self._tasks.append(self._pool.submit(self._keep, rows, shards, finish))
                    self._tasks = drain(self._tasks, _MAX_PENDING_BLOCKS)
            self._bar.update((rows.stop - rows.start) * len(shards) // total)
            stop_if_alone(stop_text)
        # The keys are freed before the next are loaded, so nothing may still search in them.
        self._tasks = drain(self._tasks, 0)

    def _found(self, loaded: Engine, rows: slice) -> Callable[[], Neighbors]:
        queries, num_neighbors = self._queries, self._num_neighbors
        row_Q = queries.rows(rows)
        if not len(row_Q):
            return functools.partial(no_neighbors, 0, num_neighbors)
        query_QD = self._keys.read(rows.start, rows.stop)
        order = queries.visiting_order(self._engine, rows)
        if order is None:
            return queries.search_later(loaded, query_QD, row_Q, num_neighbors, is_part=True)
        visited_Q = order + rows.start
        finish = queries.search_later(
            loaded, query_QD[order], visited_Q, num_neighbors, is_part=True
        )
        place = np.argsort(order)

        def in_row_order() -> Neighbors:
            found = finish()
            return Neighbors(found.distance_QK[place], found.row_QK[place])

        return in_row_order

    def _keep(self, rows: slice, shards: range, finish: Callable[[], Neighbors]) -> None:
        """Merges what was found with the running lists; the last time they become results."""
        found = finish()
        if shards.start:
            found = merge([self._lists.read(rows, len(found)), found], self._num_neighbors)
        if shards.stop < self._engine.plan.num_shards or self._widens:
            self._lists.write(rows, shards.stop, found)
            return
        self._put(rows, found)

    def _put(self, rows: slice, found: Neighbors) -> None:
        row_N = np.arange(rows.start, rows.stop, dtype=np.int64)
        self._writer.put(rows.start, self._consume(row_N, self._queries.in_all_rows(rows, found)))

    def _write_widened(self) -> None:
        """Writes the blocks of this process, some in memory at a time, none of them left short."""
        own = [rows for shard, rows in self._blocks if is_mine(shard)]
        most = max(1, _WIDENED_BYTES // (LIST_BYTES * self._num_neighbors))
        rest = 0
        groups: list[list[slice]] = []
        for rows in own:
            rest -= rows.stop - rows.start
            if rest < 0:
                groups.append([])
                rest = most - (rows.stop - rows.start)
            groups[-1].append(rows)
        for blocks in groups:
            stop_if_alone(f"{self._description}: what has been searched is kept")
            row_B = [self._queries.rows(rows) for rows in blocks]
            lists = [
                self._lists.read(rows, len(row_Q))
                for rows, row_Q in zip(blocks, row_B, strict=True)
            ]
            found = self._widened(concatenate(lists), np.concatenate(row_B))
            first = 0
            for rows, row_Q in zip(blocks, row_B, strict=True):
                part = slice(first, first + len(row_Q))
                self._put(rows, Neighbors(found.distance_QK[part], found.row_QK[part]))
                first = part.stop

    def _widened(self, found: Neighbors, row_Q: np.ndarray) -> Neighbors:
        """Returns lists of rows, those that are short searched for in more cells."""
        exclusion = self._queries.exclusion
        assert exclusion is not None
        short = exclusion.short(found, row_Q, self._engine.num_rows)
        if len(short):
            say(f"{self._description}: {len(short):,} short lists are searched for in more cells")
            some = Neighbors(found.distance_QK[short], found.row_QK[short])
            query_QD = self._keys.take(row_Q[short])
            exclusion.search_wider(self._engine, some, query_QD, row_Q[short])
            found.distance_QK[short], found.row_QK[short] = some.distance_QK, some.row_QK
        return found
