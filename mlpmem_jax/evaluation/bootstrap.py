"""Paired cluster bootstrap over documents.

Tokens of a document are not independent, so documents are drawn, with replacement and as
many as there are, and every statistic is a ratio of sums over the documents drawn. All
systems are summed over the same draws: their differences are paired.

Suffixes: D documents, M quantities that are summed, R draws.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

# Weights held at once; bounds memory, changes no number.
_CHUNK_CELLS = 1 << 22


@dataclasses.dataclass(frozen=True)
class Interval:
    """A percentile interval."""

    low: float
    high: float

    def excludes(self, value: float) -> bool:
        """Returns whether a value lies outside."""
        return not self.low <= value <= self.high


def bootstrap_sums(values_DM: np.ndarray, num_draws: int, seed: int) -> np.ndarray:
    """Sums quantities over documents drawn with replacement.

    A draw of D documents out of D gives each a multinomial number of appearances, so a
    draw is one row of weights and all draws are a matrix product.

    Args:
        values_DM: Sums of each document (nats of each system, tokens, ...).
        num_draws: R, number of draws.
        seed: Seed of the draws; the same seed draws the same documents.

    Returns:
        float64 [R, M].
    """
    num_documents = len(values_DM)
    values_DM = np.asarray(values_DM, np.float64)
    rng = np.random.default_rng(seed)
    share_D = np.full(num_documents, 1.0 / num_documents)
    chunk = max(1, _CHUNK_CELLS // num_documents)
    sums_RM = np.empty((num_draws, values_DM.shape[1]), np.float64)
    for start in range(0, num_draws, chunk):
        size = min(chunk, num_draws - start)
        weight_RD = rng.multinomial(num_documents, share_D, size=size)
        with np.errstate(invalid="ignore"):  # An infinite sum spoils its own column alone.
            sums_RM[start : start + size] = weight_RD.astype(np.float64) @ values_DM
    return sums_RM


def interval(
    statistic: Callable[[np.ndarray], np.ndarray], sums_RM: np.ndarray, confidence: float
) -> Interval | None:
    """Returns the percentile interval of a statistic of sums.

    Args:
        statistic: Maps sums [..., M] to values [...].
        sums_RM: What `bootstrap_sums` returned.
        confidence: Level of the interval, for example 0.95.

    Returns:
        The interval, or None where the statistic is undefined in some draw (a share of a
        gain that is zero).
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        values_R = statistic(sums_RM)
    if not np.all(np.isfinite(values_R)):
        return None
    tail = (1.0 - confidence) / 2.0
    low, high = np.quantile(values_R, [tail, 1.0 - tail])
    return Interval(float(low), float(high))
