"""How many of the true neighbours an engine finds; always measured, never assumed."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol, Self, TypeVar

import numpy as np

from mlpmem_jax.config.data import RetrievalConfig
from mlpmem_jax.console import warn
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.retrieval.distances import squared_distances
from mlpmem_jax.retrieval.engine import READ_ROWS, Engine, Keys, row_ranges
from mlpmem_jax.retrieval.merge import Neighbors, drop_own_row, merge, sort_neighbors

# Two float32 sums of the same squares, in another order, differ by less than this share.
_ROUNDING = 1e-5
# Calibration aims above the floor, so that the independent measurement passes too.
_MARGIN = 0.01


class Thoroughness(Protocol):
    """How thoroughly an approximate engine searches."""

    def raised(self, last: Self) -> Sequence[Self]:
        """Returns the next larger settings, none of them above `last`."""
        ...

    def lowest(self, config: RetrievalConfig) -> Self:
        """Returns the least thorough search; what is given stays."""
        ...

    @property
    def way_out(self) -> str:
        """The keys that bring more recall, with their values, and the engine that does."""
        ...


_Settings = TypeVar("_Settings", bound=Thoroughness)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Queries with their true neighbours.

    Attributes:
        row_Q: int64 rows that are the queries.
        query_QD: float32 keys of these rows.
        truth: Their K nearest other rows.
    """

    row_Q: np.ndarray
    query_QD: np.ndarray
    truth: Neighbors

    @property
    def num_neighbors(self) -> int:
        """K."""
        return int(self.truth.row_QK.shape[1])


def draw_sample(
    keys: Keys,
    search: Callable[[np.ndarray, int], Neighbors],
    num_queries: int,
    num_neighbors: int,
    seed: tuple[int, ...],
) -> Sample:
    """Draws rows without repetition and finds their true neighbours.

    Args:
        keys: The datastore; fewer rows than `num_queries` are all taken.
        search: The exact search of an engine.
        num_neighbors: K.
    """
    count = min(num_queries, keys.num_rows)
    generator = np.random.default_rng(seed)
    row_Q = np.sort(generator.choice(keys.num_rows, size=count, replace=False)).astype(np.int64)
    query_QD = keys.take(row_Q)
    return Sample(row_Q, query_QD, drop_own_row(search(query_QD, num_neighbors + 1), row_Q))


def measure(engine: Engine, sample: Sample) -> float:
    """Returns recall@K: the mean share of places that hold a true neighbour.

    A neighbour as near as the K-th true one is a hit, whatever its number: of equal
    distances any may be chosen. The own row is excluded.
    """
    found = engine.search(sample.query_QD, sample.num_neighbors + 1)
    return recall(drop_own_row(found, sample.row_Q), sample.truth)


def recall(found: Neighbors, truth: Neighbors) -> float:
    """Returns the mean share of true neighbours among those found; distances decide."""
    is_there = truth.row_QK >= 0
    radius_Q = np.where(is_there, truth.distance_QK, -np.inf).max(axis=1, initial=-np.inf)
    num_true_Q = is_there.sum(axis=1)
    is_hit = (found.row_QK >= 0) & (found.distance_QK <= radius_Q[:, None] * (1 + _ROUNDING))
    num_hits_Q = np.minimum(is_hit.sum(axis=1), num_true_Q)
    return float(np.mean(num_hits_Q / np.maximum(1, num_true_Q))) if len(num_hits_Q) else 1.0


def plain_search(keys: Keys) -> Callable[[np.ndarray, int], Neighbors]:
    """Returns an exact search in plain NumPy: the check of the exact engine itself."""

    def search(query_QD: np.ndarray, num_neighbors: int) -> Neighbors:
        best: list[Neighbors] = []
        for part in row_ranges(keys.num_rows, READ_ROWS):
            key_ND = keys.read(part.start, part.stop)
            norm_N = np.einsum("nd,nd->n", key_ND, key_ND)
            kept = min(num_neighbors + 16, len(key_ND))
            row_QK = np.empty((len(query_QD), kept), np.int64)
            for queries in row_ranges(len(query_QD), 128):
                score_QN = norm_N - 2 * (query_QD[queries] @ key_ND.T)
                row_QK[queries] = np.argpartition(score_QN, kept - 1, axis=1)[:, :kept]
            distance_QK = squared_distances(query_QD, key_ND, row_QK)
            best.append(sort_neighbors(distance_QK, row_QK + part.start))
            best = [merge(best, num_neighbors)]
        return best[0]

    return search


def calibrate(
    measure_with: Callable[[_Settings], float], first: _Settings, last: _Settings, floor: float
) -> tuple[_Settings, float]:
    """Finds how thoroughly to search for a recall above the floor.

    Each step raises the setting that brings more, leaves or candidates.

    Args:
        measure_with: Recall with given settings.
        first: Settings to begin with.
        last: The largest settings; equal to `first` where a setting is given.
        floor: `retrieval.min_recall`.

    Returns:
        The settings and their recall on the sample.
    """
    goal = min(floor + _MARGIN, (floor + 1) / 2)
    settings, found = first, measure_with(first)
    while found < goal:
        raised = [one for one in settings.raised(last) if one != settings]
        if not raised:
            break
        recalls = [measure_with(one) for one in raised]
        best = int(np.argmax(recalls))
        settings, found = raised[best], recalls[best]
    return settings, found


def check(
    measured: float,
    config: RetrievalConfig,
    settings: Thoroughness | None,
    num_queries: int,
    floor: float | None = None,
) -> None:
    """Warns of a recall below `retrieval.min_recall`: targets serve with less than the best.

    Args:
        floor: `targets.min_recall`, where that is what was searched for.

    Raises:
        ConfigError: The exact engine is below it, so its answers are wrong.
    """
    if settings is not None:
        warn_of(measured, config, settings, floor)
    elif measured < config.min_recall:
        raise ConfigError(
            f"recall@{config.num_neighbors} of the exact engine is {measured:.4f} on {num_queries} "
            f"rows, below retrieval.min_recall={config.min_recall}: its answers are wrong, please "
            "report it"
        )


def warn_of(
    measured: float, config: RetrievalConfig, settings: Thoroughness, floor: float | None = None
) -> None:
    """Warns of a recall below `retrieval.min_recall`; names the keys to raise, and their values.

    Args:
        floor: As of `check`.
    """
    key = "retrieval.min_recall" if floor is None else "targets.min_recall"
    floor = config.min_recall if floor is None else floor
    if measured < floor:
        warn(
            f"recall@{config.num_neighbors} is {measured:.4f}, below {key}={floor}: raise "
            f"{settings.way_out}"
        )
