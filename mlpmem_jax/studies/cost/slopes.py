"""Slopes in log-log, with intervals from rounds that were measured anew.

Suffixes: S sizes, R rounds, T values of a round.
"""

import numpy as np
from scipy import stats

# How a quantity grows: proportional to rows^slope; "low" and "high" of its interval, or None.
Slope = dict[str, float | None]


def fit(rows_S: np.ndarray, value_S: np.ndarray) -> np.ndarray:
    """Returns the slope of log value against log rows by least squares.

    Args:
        rows_S: Sizes, positive, not all equal.
        value_S: Positive values [..., S].
    """
    x_S = np.log(np.asarray(rows_S, np.float64))
    x_S = x_S - x_S.mean()
    return np.asarray(np.log(np.asarray(value_S, np.float64)) @ x_S / (x_S @ x_S))


def over_rounds(slope_R: np.ndarray, confidence: float) -> Slope:
    """Returns the mean of the slopes of rounds, with Student's t interval.

    What else the machine does stays for longer than a value, so that rounds are what is
    independent; they are few, and a bootstrap over five has too narrow an interval.

    Args:
        slope_R: Slopes of rounds, at least two.
    """
    slope = float(slope_R.mean())
    error = float(slope_R.std(ddof=1)) / np.sqrt(len(slope_R))
    half = float(stats.t.ppf((1 + confidence) / 2, len(slope_R) - 1)) * error
    return {"slope": slope, "low": slope - half, "high": slope + half}
