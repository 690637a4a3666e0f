"""Slopes in log-log, with intervals from rounds that were measured anew.

Suffixes: S sizes, R rounds, T values of a round.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy import stats

from mlpmem_jax.stats.bootstrap import Interval

# Maps values [..., n] to one number a row.
Statistic = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Slope:
    """How a quantity grows: proportional to rows^slope.

    Attributes:
        slope: Least squares over sizes, of log value against log rows; the mean of rounds.
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


def slope_by_round(rows_S: np.ndarray, value_SRT: np.ndarray, statistic: Statistic) -> np.ndarray:
    """Fits the slope of a statistic in each round alone.

    Args:
        rows_S: Sizes.
        value_SRT: Values of each size and round.
        statistic: What is fitted, for example the median.

    Returns:
        Slopes [R].
    """
    return fit(rows_S, statistic(value_SRT).T)


def over_rounds(slope_R: np.ndarray, confidence: float) -> Slope:
    """Returns the mean of the slopes of rounds, with Student's t interval.

    What else the machine does stays for longer than a value, so that rounds are what is
    independent; they are few, and a bootstrap over five has too narrow an interval.

    Args:
        slope_R: Slopes of rounds, at least two.
        confidence: Level of the interval.
    """
    slope = float(slope_R.mean())
    error = float(slope_R.std(ddof=1)) / np.sqrt(len(slope_R))
    half = float(stats.t.ppf((1 + confidence) / 2, len(slope_R) - 1)) * error
    return Slope(slope, Interval(slope - half, slope + half))


def percentile(percent: float) -> Statistic:
    """Returns the statistic "percentile"."""
    return lambda values: np.asarray(np.percentile(values, percent, axis=-1))


def mean(values: np.ndarray) -> np.ndarray:
    """Returns means."""
    return np.asarray(values.mean(axis=-1))
