"""The best weight λ of a mixture of two models (paper, Eq. 7).

The mean of −log(λ a + (1 − λ) b) is convex in λ, so it is solved, not searched on a grid.
"""

import dataclasses

import numpy as np

_MAX_ITERATIONS = 100
_TOLERANCE = 1e-10


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The best mixture.

    Attributes:
        weight: λ, the weight of the first model.
        nats: Mean −log p of the mixture.
    """

    weight: float
    nats: float


def mixture_logprob(
    logp_a_N: np.ndarray, logp_b_N: np.ndarray, weight: float | np.ndarray
) -> np.ndarray:
    """Returns float64 [N] log(λ a + (1 − λ) b); either may be -inf.

    Args:
        logp_a_N: Log-probabilities of the first model.
        logp_b_N: Log-probabilities of the second.
        weight: λ in [0, 1], for all rows or of each.
    """
    with np.errstate(divide="ignore"):
        log_a = np.log(np.asarray(weight, np.float64)) + np.asarray(logp_a_N, np.float64)
        log_b = np.log1p(-np.asarray(weight, np.float64)) + np.asarray(logp_b_N, np.float64)
    return np.logaddexp(log_a, log_b)


def solve(
    logp_a_N: np.ndarray, logp_b_N: np.ndarray, weight_N: np.ndarray | None = None
) -> Mixture:
    """Minimises the mean of −log(λ a + (1 − λ) b) over λ in [0, 1].

    Newton's method on the derivative, kept inside a bracket that bisection halves where a
    step would leave it. float64 throughout.

    Args:
        logp_a_N: Log-probabilities of the first model; -inf is allowed.
        logp_b_N: Log-probabilities of the second; -inf is allowed where the first is not.
        weight_N: Weights of the rows, not negative; none: all equal.

    Returns:
        λ and the mean at λ. λ is 0 where every λ does equally well.
    """
    logp_a = np.asarray(logp_a_N, np.float64)
    logp_b = np.asarray(logp_b_N, np.float64)
    share = np.full(len(logp_a), 1.0) if weight_N is None else np.asarray(weight_N, np.float64)
    assert len(logp_a) and share.sum() > 0, "no rows"
    share = share / share.sum()
    used = share > 0
    logp_a, logp_b, share = logp_a[used], logp_b[used], share[used]
    top = np.maximum(logp_a, logp_b)
    a, b = np.exp(logp_a - top), np.exp(logp_b - top)
    gain = a - b

    def slopes(weight: float) -> tuple[float, float]:
        """Returns first and second derivative; the first grows with λ."""
        with np.errstate(divide="ignore", over="ignore"):
            ratio = gain / (b + weight * gain)
            return -float(share @ ratio), float(share @ (ratio * ratio))

    def solution(weight: float) -> Mixture:
        return Mixture(weight, -float(share @ mixture_logprob(logp_a, logp_b, weight)))

    if slopes(0.0)[0] >= 0:
        return solution(0.0)
    if slopes(1.0)[0] <= 0:
        return solution(1.0)
    low, high, weight = 0.0, 1.0, 0.5
    for _ in range(_MAX_ITERATIONS):
        slope, curvature = slopes(weight)
        low, high = (weight, high) if slope < 0 else (low, weight)
        newton = weight - slope / curvature if curvature > 0 else low
        following = newton if low < newton < high else (low + high) / 2
        if abs(following - weight) < _TOLERANCE:
            weight = following
            break
        weight = following
    return solution(weight)
