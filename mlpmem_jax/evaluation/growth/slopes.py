"""Slopes in log-log, with intervals from rounds that were measured anew.

Suffixes: S sizes, R rounds, T values of a round, B bootstrap draws.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from mlpmem_jax.evaluation.bootstrap import Interval

_DRAWS = 2000

# Maps values [..., n] to one number a row.
Statistic = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Slope:
    """How a quantity grows: proportional to rows^slope.

    Attributes:
        slope: Least squares over sizes, of log value against log rows.
        interval: Over rounds; None where the quantity does not vary.
    """

    slope: float
    interval: Interval | None


def fit(rows_S: np.ndarray, value_S: np.ndarray) -> np.ndarray:
    """Returns the slope of log value against log rows by least squares.

    Args:
        rows_S: Sizes, positive, not all equal.
        value_S: Positive values [..., S].
    """
    x_S = np.log(np.asarray(rows_S, np.float64))
    x_S = x_S - x_S.mean()
    return np.asarray(np.log(np.asarray(value_S, np.float64)) @ x_S / (x_S @ x_S))


def bootstrap_slope(
    rows_S: np.ndarray,
    value_SRT: np.ndarray,
    statistic: Statistic,
    *,
    confidence: float,
    seed: int,
) -> Slope:
    """Fits the slope of a statistic of repeated measurements.

    Rounds are drawn with replacement, the same for all sizes, and their values pooled: what
    else the machine did in a round stays together, single values of it are not independent.

    Args:
        rows_S: Sizes.
        value_SRT: Values of each size and round.
        statistic: What is fitted, for example the median.
        confidence: Level of the interval.
        seed: Seed of the draws.
    """
    num_sizes, num_rounds, _ = value_SRT.shape
    rng = np.random.default_rng(seed)
    drawn_BR = rng.integers(0, num_rounds, (_DRAWS, num_rounds))
    value_BS = np.empty((_DRAWS, num_sizes))
    for size in range(num_sizes):
        value_BS[:, size] = statistic(value_SRT[size][drawn_BR].reshape(_DRAWS, -1))
    slope_B = fit(rows_S, value_BS)
    tail = (1 - confidence) / 2
    low, high = np.quantile(slope_B, [tail, 1 - tail])
    whole_S = statistic(value_SRT.reshape(num_sizes, -1))
    return Slope(float(fit(rows_S, whole_S)), Interval(float(low), float(high)))


def percentile(percent: float) -> Statistic:
    """Returns the statistic "percentile"."""
    return lambda values: np.asarray(np.percentile(values, percent, axis=-1))


def mean(values: np.ndarray) -> np.ndarray:
    """Returns means."""
    return np.asarray(values.mean(axis=-1))
