"""Search inside the cells that are nearest to each query, exact there.

Cost is rows times rows visited. Suffixes: C cells, Q queries, V cells that a query visits, N rows
in memory, W their scores side by side, K neighbours.
"""

import concurrent.futures
import copy
import dataclasses
import math
import os
from collections.abc import Callable, Iterator

import jax
import numpy as np

from mlpmem_jax.config.data import RetrievalConfig
from mlpmem_jax.retrieval.blocked import aligned_zeros, host_device
from mlpmem_jax.retrieval.distances import squared_distances
from mlpmem_jax.retrieval.engine import READ_ROWS, EngineName, row_ranges
from mlpmem_jax.retrieval.groups import Centroids
from mlpmem_jax.retrieval.merge import Neighbors, nearest, no_neighbors
from mlpmem_jax.retrieval.survivors import FINITE, Survivors, margins, sample_threshold
from mlpmem_jax.retrieval.tiles import augmented, padded_lengths, pair_scores

_MOST_THREADS = 8  # More would share a batch in pieces of too few queries a cell.
_PIECE_BYTES = 64 << 20  # Scores of the queries that a thread works on.
_SURVIVORS = 9  # Scores of one neighbour that take as much: room for three, and their places.
_GROWTH = 1.25


@dataclasses.dataclass(frozen=True)
class CellSettings:
    """How thoroughly cells are searched.

    Attributes:
        cells_to_search: Cells that a query visits; more where these hold fewer than K rows.
    """

    cells_to_search: int

    def raised(self, last: "CellSettings") -> list["CellSettings"]:
        """Returns the next larger settings, none of them above `last`."""
        more = min(last.cells_to_search, math.ceil(self.cells_to_search * _GROWTH))
        return [CellSettings(more)]

    def lowest(self, config: RetrievalConfig) -> "CellSettings":
        """Returns the least thorough search; what is given stays."""
        return CellSettings(1) if config.cells_to_search == "auto" else self

    @property
    def way_out(self) -> str:
        """The keys that bring more recall, with their values, and the engine that does."""
        return (
            f"retrieval.cells_to_search (now {self.cells_to_search}), or set retrieval.engine=exact"
        )


@dataclasses.dataclass(frozen=True)
class Cells:
    """What of an index of cells is always in memory, and how the rest is read.

    Attributes:
        centroids: Of the cells.
        start_C: Place of the first row of each cell, and the number of rows: int64 [C + 1].
        read_keys: Returns keys of places [start, stop).
        read_rows: Returns their rows, int64.
    """

    centroids: Centroids
    start_C: np.ndarray
    read_keys: Callable[[int, int], np.ndarray]
    read_rows: Callable[[int, int], np.ndarray]

    @property
    def centroid_CD(self) -> np.ndarray:
        """Centroids of the cells, float32."""
        return self.centroids.centroid_CD

    @property
    def num_rows(self) -> int:
        """Rows of all cells."""
        return int(self.start_C[-1])

    def shard(self, shards: range, num_shards: int) -> range:
        """Returns the cells of consecutive key shards: whole cells, about as many rows in each."""
        bounds = [
            int(
                np.searchsorted(self.start_C, self.num_rows * min(number, num_shards) // num_shards)
            )
            for number in (shards.start, shards.stop)
        ]
        return range(*bounds)

    def num_rows_of(self, cells: range) -> int:
        """Returns the rows of consecutive cells."""
        return int(self.start_C[cells.stop] - self.start_C[cells.start])

    def visited(
        self, query_QD: np.ndarray, count: int, wanted: int, group_Q: np.ndarray | None = None
    ) -> np.ndarray:
        """Returns the cells that each query visits, nearest first: int64 [Q, V], -1 for none.

        Args:
            query_QD: float32 queries.
            count: Cells to visit.
            wanted: Rows to visit at least, if there are as many.
            group_Q: The group of centroids nearest to each query, where it is known.
        """
        cells, needed = len(self.centroid_CD), min(wanted, self.num_rows)
        count = min(count, cells)
        cell_QV = self.centroids.nearest(query_QD, count, group_Q)
        size_C = np.diff(self.start_C)
        short_Q, most = np.flatnonzero(size_C[cell_QV].sum(axis=1) < needed), count
        while len(short_Q) and most < cells:
            most = min(cells, 2 * most)
            group_S = None if group_Q is None else group_Q[short_Q]
            cell_SV = self.centroids.nearest(query_QD[short_Q], most, group_S)
            size_SV = size_C[cell_SV]
            before_SV = np.cumsum(size_SV, axis=1) - size_SV
            is_visited = (np.arange(most) < count) | (before_SV < needed)
            cell_QV = _widened(cell_QV, most)
            cell_QV[short_Q] = np.where(is_visited, cell_SV, -1)
            short_Q = short_Q[size_SV.sum(axis=1) < needed]
        return cell_QV


class RoutedEngine:
    """Searches cells that are in memory; processes search each for themselves.

    Args:
        settings: How thoroughly; can be replaced between searches.
        held: Consecutive cells to hold; None: all. A query's visits to others find nothing.
        capacity: Rows to have room for: engines of one capacity share compiled programs.
    """

    name: EngineName = "routed"
    spans_processes = False
    skips_rows = False

    def __init__(
        self,
        cells: Cells,
        settings: CellSettings,
        held: range | None = None,
        capacity: int = 0,
    ):
        self.settings = settings
        self._cells = cells
        self._visited_rows: int | None = None
        self._held = range(len(cells.centroid_CD)) if held is None else held
        first, stop = (int(cells.start_C[cell]) for cell in (self._held.start, self._held.stop))
        self.num_rows = stop - first
        self._start_C = cells.start_C - first
        self._length_C = padded_lengths(np.diff(cells.start_C))
        width = cells.centroid_CD.shape[1]
        self._row_N = np.empty(self.num_rows, np.int64)
        # Last column: ‖k − m‖², see `blocked.block_scores`. A padded cell may end behind the rows.
        rows = max(self.num_rows, capacity) + int(self._length_C.max())
        key_NA = aligned_zeros(rows, width + 1)
        self._key_ND, self._norm_N = key_NA[: self.num_rows, :width], key_NA[:, width]
        # Scores ‖k − m‖² − 2 k·(q − m), as in `blocked`.
        self._mean_D = cells.centroid_CD.mean(axis=0)
        self._largest_norm = self._largest_score = 0.0
        for part in row_ranges(self.num_rows, READ_ROWS):
            self._row_N[part] = cells.read_rows(first + part.start, first + part.stop)
            self._key_ND[part] = cells.read_keys(first + part.start, first + part.stop)
            self._fill_norms(part)
        self._keys = jax.device_put(key_NA, host_device(), may_alias=True)

    def _fill_norms(self, part: slice) -> None:
        key_BD = self._key_ND[part]
        centred_BD = key_BD - self._mean_D
        norm_B = np.einsum("bd,bd->b", centred_BD, centred_BD, dtype=np.float64)
        self._norm_N[part] = norm_B
        squared_B = np.einsum("bd,bd->b", key_BD, key_BD)
        self._largest_norm = max(self._largest_norm, float(np.sqrt(squared_B.max())))
        self._largest_score = max(self._largest_score, float(norm_B.max()))

    def search(self, query_QD: np.ndarray, num_neighbors: int) -> Neighbors:
        """Returns the nearest rows of the visited cells, as the protocol says."""
        found = no_neighbors(len(query_QD), num_neighbors)
        threads = min(_MOST_THREADS, max(2, (os.cpu_count() or 2) // 2))
        with concurrent.futures.ThreadPoolExecutor(threads) as pool:
            cell_QV = self._visits(query_QD, num_neighbors, threads, pool)
            order_Q = self._by_cell(cell_QV)
            pieces = list(self._pieces(cell_QV, order_Q, num_neighbors, threads))
            lists = pool.map(
                lambda piece: self._search(query_QD[piece], cell_QV[piece], num_neighbors), pieces
            )
            for piece, one in zip(pieces, lists, strict=True):
                found.distance_QK[piece], found.row_QK[piece] = one.distance_QK, one.row_QK
        return found

    @property
    def rows(self) -> range:
        """All rows of the index: cells hold any of them."""
        return range(self._cells.num_rows)

    def visiting(self, num_rows: int) -> "RoutedEngine":
        """Returns this engine with the same keys, whose visits follow a number of rows alone."""
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
        """Returns an order of rows of the datastore in which neighbours share cells."""
        is_inside_N = (self._row_N >= rows.start) & (self._row_N < rows.stop)
        held = self._row_N[is_inside_N] - rows.start
        others = np.setdiff1d(np.arange(rows.stop - rows.start), held, assume_unique=True)
        return np.concatenate([held, others])

    def _visits(
        self,
        query_QD: np.ndarray,
        wanted: int,
        threads: int,
        pool: concurrent.futures.ThreadPoolExecutor,
    ) -> np.ndarray:
        """Returns the cells in memory that each query visits, -1 elsewhere."""
        count = self.settings.cells_to_search
        wanted = wanted if self._visited_rows is None else self._visited_rows
        # Queries of a group are compared with the same centroids: a thread has all of them.
        group_Q = self._cells.centroids.groups_of(query_QD)
        order_Q = np.argsort(group_Q, kind="stable")
        parts = np.array_split(order_Q, threads)
        found = _stacked(
            list(
                pool.map(
                    lambda part: self._cells.visited(query_QD[part], count, wanted, group_Q[part]),
                    parts,
                )
            )
        )
        cell_QV = np.empty_like(found)
        cell_QV[order_Q] = found
        is_held = (cell_QV >= self._held.start) & (cell_QV < self._held.stop)
        return np.where(is_held, cell_QV, -1)

    @staticmethod
    def _by_cell(cell_QV: np.ndarray) -> np.ndarray:
        """Returns the queries that visit cells in memory, in the order of the nearest of these."""
        first_Q1 = np.argmax(cell_QV >= 0, axis=1)[:, None]
        cell_Q = np.take_along_axis(cell_QV, first_Q1, axis=1)[:, 0]
        order_Q = np.argsort(cell_Q, kind="stable")
        return order_Q[cell_Q[order_Q] >= 0]

    def _sizes(self, cell_QV: np.ndarray) -> np.ndarray:
        return np.where(cell_QV < 0, 0, self._length_C[cell_QV])

    def _pieces(
        self, cell_QV: np.ndarray, order_Q: np.ndarray, num_neighbors: int, threads: int
    ) -> Iterator[np.ndarray]:
        """Cuts queries so that scores and survivors of a piece take bounded buffers."""
        rows_Q = self._sizes(cell_QV).sum(axis=1) + _SURVIVORS * num_neighbors
        most = max(1, -(-len(order_Q) // threads))
        start = 0
        while start < len(order_Q):
            widest = np.maximum.accumulate(rows_Q[order_Q[start : start + most]])
            needed = 4 * widest * np.arange(1, len(widest) + 1)
            stop = start + max(1, int(np.searchsorted(needed, _PIECE_BYTES, side="right")))
            yield order_Q[start:stop]
            start = stop

    def _search(self, query_QD: np.ndarray, cell_QV: np.ndarray, num_neighbors: int) -> Neighbors:
        """Returns the nearest rows in cells that are in memory."""
        size_QV = self._sizes(cell_QV)
        offset_QV = np.cumsum(size_QV, axis=1) - size_QV
        query_QD = np.ascontiguousarray(query_QD)
        centred_QD = query_QD - self._mean_D
        score_QW = pair_scores(
            augmented(centred_QD), self._keys, self._start_C, self._length_C, cell_QV
        )
        norm_Q = np.linalg.norm(centred_QD.astype(np.float64), axis=1)
        margin_Q = margins(norm_Q, self._largest_norm, self._largest_score, query_QD.shape[1])
        # Where there are fewer than K rows, all but the places without one.
        threshold_Q = np.minimum(sample_threshold([score_QW], num_neighbors) + margin_Q, FINITE)
        survivors = Survivors(threshold_Q.astype(np.float32), margin_Q, num_neighbors)
        survivors.add(score_QW, 0)
        column_QS = survivors.places()
        is_used = column_QS >= 0
        # The visit in whose scores a column lies; those without rows begin at the next one's.
        visit_QS = np.full(column_QS.shape, -1, np.int64)
        for visit in range(cell_QV.shape[1]):
            has_rows_Q1 = size_QV[:, visit, None] > 0
            visit_QS[(column_QS >= offset_QV[:, visit, None]) & has_rows_Q1] = visit
        visit_QS = np.maximum(visit_QS, 0)
        inside_QS = column_QS - np.take_along_axis(offset_QV, visit_QS, axis=1)
        place_QS = self._start_C[np.take_along_axis(cell_QV, visit_QS, axis=1)] + inside_QS
        place_QS = np.where(is_used, place_QS, 0)
        distance_QS = squared_distances(query_QD, self._key_ND, place_QS)
        distance_QS[~is_used] = np.inf
        return nearest(distance_QS, self._row_N[place_QS], num_neighbors)


def _stacked(parts: list[np.ndarray]) -> np.ndarray:
    """Joins the visits of consecutive queries; where some are fewer, -1 follows."""
    most = max((part.shape[1] for part in parts), default=1)
    filled = [_widened(part, most) for part in parts]
    return np.concatenate(filled) if filled else np.empty((0, most), np.int64)


def _widened(cell_QV: np.ndarray, most: int) -> np.ndarray:
    """Returns visits with places for so many; -1 where there is none."""
    return np.pad(cell_QV, ((0, 0), (0, most - cell_QV.shape[1])), constant_values=-1)
