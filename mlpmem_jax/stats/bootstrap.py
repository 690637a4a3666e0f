"""Paired cluster bootstrap.

Tokens of a document are not independent, nor are documents that were cut from one file, so
clusters are drawn, with replacement and as many as there are, and every statistic is a ratio
of sums over the clusters drawn. All systems are summed over the same draws: their
differences are paired. A cluster is a file, JSONL record or dataset row.

Suffixes: C clusters, M quantities that are summed, R draws, P statistics.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

# Maps sums [..., M] to values [...].
Statistic = Callable[[np.ndarray], np.ndarray]
# A value with its interval: "value", "low", "high"; None where it is not defined.
Number = dict[str, Any]
# How intervals are made; part of the recipe of every report, so that older ones are stale.
INTERVALS = "clusters of files, λ chosen in each draw, corrected by max |t|"
# Weights held at once; bounds memory, changes no number.
_CHUNK_CELLS = 1 << 22
# Draws of no more weights are drawn once and kept.
_KEPT_CELLS = 1 << 24
# A spread below this share of the value is rounding.
_ROUNDING = 1e-12


@dataclasses.dataclass(frozen=True)
class Interval:
    """A percentile interval."""

    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Returns whether a value lies outside."""
        return not self.low <= value <= self.high


class Draws:
    """How often each cluster appears in each draw.

    A draw of C clusters out of C gives each a multinomial number of appearances, so a draw
    is one row of weights and all draws are a matrix product.

    Attributes:
        num_clusters: C.
        num_draws: R.
    """

    def __init__(self, num_clusters: int, num_draws: int, seed: int | Sequence[int]):
        """Prepares to draw.

        Args:
            num_clusters: C.
            num_draws: R.
            seed: Seed of the draws; the same seed draws the same clusters.
        """
        self.num_clusters = num_clusters
        self.num_draws = num_draws
        self._seed = seed
        keeps = num_clusters * num_draws <= _KEPT_CELLS
        self._kept = list(self._drawn()) if keeps else None

    def chunks(self) -> Iterator[tuple[slice, np.ndarray]]:
        """Yields consecutive draws and their weights, float64 [draws, C]."""
        yield from self._drawn() if self._kept is None else self._kept

    def _drawn(self) -> Iterator[tuple[slice, np.ndarray]]:
        rng = np.random.default_rng(self._seed)
        share_C = np.full(self.num_clusters, 1.0 / self.num_clusters)
        chunk = max(1, _CHUNK_CELLS // self.num_clusters)
        for start in range(0, self.num_draws, chunk):
            stop = min(start + chunk, self.num_draws)
            weight_RC = rng.multinomial(self.num_clusters, share_C, size=stop - start)
            yield slice(start, stop), weight_RC.astype(np.float64)

    def sums(self, values_CM: np.ndarray) -> np.ndarray:
        """Returns sums over the clusters of each draw, float64 [R, M].

        Args:
            values_CM: Sums of each cluster (nats of each system, tokens, ...).
        """
        values_CM = np.asarray(values_CM, np.float64)
        sums_RM = np.empty((self.num_draws, values_CM.shape[1]), np.float64)
        for part, weight_RC in self.chunks():
            with np.errstate(invalid="ignore"):  # An infinite sum spoils its own column alone.
                sums_RM[part] = weight_RC @ values_CM
        return sums_RM


def bootstrap_sums(values_CM: np.ndarray, num_draws: int, seed: int) -> np.ndarray:
    """Returns sums over drawn clusters, float64 [R, M]; see :class:`Draws`."""
    return Draws(len(values_CM), num_draws, seed).sums(values_CM)


def interval(statistic: Statistic, sums_RM: np.ndarray, confidence: float) -> Interval | None:
    """Returns the percentile interval of a statistic of sums.

    Args:
        statistic: Maps sums [..., M] to values [...].
        sums_RM: What `bootstrap_sums` returned.
        confidence: Level of the interval, for example 0.95.

    Returns:
        The interval. Draws in which the statistic is undefined (a share of a gain that is zero)
        count as below it and as above it, so that it holds whatever their value is; None where
        they are too many for it to have ends.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        values_R = statistic(sums_RM)
    tail = (1.0 - confidence) / 2.0
    is_defined_R = np.isfinite(values_R)
    if is_defined_R.all():
        low, high = np.quantile(values_R, [tail, 1.0 - tail])
        return Interval(float(low), float(high))
    low = np.quantile(np.where(is_defined_R, values_R, -np.inf), tail, method="lower")
    high = np.quantile(np.where(is_defined_R, values_R, np.inf), 1.0 - tail, method="higher")
    return Interval(float(low), float(high)) if np.isfinite([low, high]).all() else None


@dataclasses.dataclass(frozen=True)
class PairedSums:
    """Sums of the same columns over all clusters, and over those of each draw.

    Attributes:
        total_M: Over all clusters.
        drawn_RM: Of each draw.
        has_interval: Whether there are clusters enough for intervals.
    """

    total_M: np.ndarray
    drawn_RM: np.ndarray
    confidence: float
    has_interval: bool

    def number(self, statistic: Statistic, *, bounded: bool = True) -> Number:
        """Returns a statistic ("value") and its interval ("low", "high"); None: not defined.

        Args:
            statistic: Maps sums [..., M] to values [...].
            bounded: Whether an interval is wanted.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(statistic(self.total_M))
        # Without a probability left for some label it is infinite, or not a number.
        if not np.isfinite(value):
            return {"value": None, "low": None, "high": None}
        found = None
        if bounded and self.has_interval:
            found = interval(statistic, self.drawn_RM, self.confidence)
        return {
            "value": value,
            "low": found.low if found else None,
            "high": found.high if found else None,
        }


@dataclasses.dataclass(frozen=True)
class Simultaneous:
    """An interval and a p-value that hold for all statistics of a family together."""

    interval: Interval
    p_value: float


def simultaneous(
    value_P: np.ndarray, drawn_RP: np.ndarray, confidence: float
) -> list[Simultaneous]:
    """Corrects intervals for the number of statistics, by the bootstrap's largest |t|.

    With probability `confidence` all the true values lie in their intervals. Unlike Bonferroni
    or Holm it knows how statistics depend on each other, and needs no more draws for more of
    them (single-step maxT, Westfall and Young 1993; Romano and Wolf 2005).

    Args:
        value_P: The statistics, finite.
        drawn_RP: The same in each draw, finite.
        confidence: Level of the family.
    """
    error_P = drawn_RP.std(axis=0)
    # What does not vary, two equal systems for one, is known and takes no part.
    varies_P = error_P > _ROUNDING * np.maximum(np.abs(value_P), _ROUNDING)
    error_P = np.where(varies_P, error_P, np.inf)
    largest_R = (np.abs(drawn_RP - value_P) / error_P).max(axis=1, initial=0.0)
    reach = float(np.quantile(largest_R, confidence))
    found = []
    for value, error in zip(value_P.tolist(), error_P.tolist(), strict=True):
        if np.isinf(error):
            found.append(Simultaneous(Interval(value, value), float(value == 0)))
            continue
        as_large = int(np.count_nonzero(largest_R >= abs(value) / error))
        p_value = (1 + as_large) / (1 + len(largest_R))
        found.append(Simultaneous(Interval(value - reach * error, value + reach * error), p_value))
    return found
