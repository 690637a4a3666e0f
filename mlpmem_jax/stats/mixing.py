"""The best weights of a mixture of models (paper, Eq. 7, and more than two).

The mean of −log Σ w p is convex in w, so it is solved, not searched on a grid.
"""

import dataclasses
import itertools

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
        logp_b_N: Log-probabilities of the second, likewise. A row to which neither gives any
            probability makes the mean infinite at every λ and does not decide it.
        weight_N: Weights of the rows, not negative; none: all equal.

    Returns:
        λ and the mean at λ. λ is 0 where every λ does equally well.
    """
    logp_a = np.asarray(logp_a_N, np.float64)
    logp_b = np.asarray(logp_b_N, np.float64)
    share = np.full(len(logp_a), 1.0) if weight_N is None else np.asarray(weight_N, np.float64)
    assert len(logp_a) and share.sum() > 0, "no rows"
    share = share / share.sum()
    top = np.maximum(logp_a, logp_b)
    impossible = bool(np.any(share[top == -np.inf] > 0))
    used = (share > 0) & (top > -np.inf)
    logp_a, logp_b, share, top = logp_a[used], logp_b[used], share[used], top[used]
    a, b = np.exp(logp_a - top), np.exp(logp_b - top)
    gain = a - b

    def slopes(weight: float) -> tuple[float, float]:
        """Returns first and second derivative; the first grows with λ."""
        with np.errstate(divide="ignore", over="ignore"):
            ratio = gain / (b + weight * gain)
            return -float(share @ ratio), float(share @ (ratio * ratio))

    def solution(weight: float) -> Mixture:
        nats = -float(share @ mixture_logprob(logp_a, logp_b, weight))
        return Mixture(weight, np.inf if impossible else nats)

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


def mixture_of(logp_MN: np.ndarray, weight_M: np.ndarray) -> np.ndarray:
    """Returns float64 [N] log Σ w_m p_m; log-probabilities may be -inf.

    Args:
        logp_MN: Log-probabilities of each of M models.
        weight_M: Weights, not negative, with sum 1.
    """
    mixed_N = np.full(logp_MN.shape[1], -np.inf)
    for logp_N, weight in zip(logp_MN, weight_M, strict=True):
        if weight > 0:
            mixed_N = np.logaddexp(mixed_N, np.log(weight) + np.asarray(logp_N, np.float64))
    return mixed_N


def solve_weights(logp_MN: np.ndarray) -> np.ndarray:
    """Minimises the mean of −log Σ w_m p_m over weights that are not negative and sum to 1.

    The objective is convex and self-concordant. Two models are one dimension (`solve`). For
    more, Newton's method: each step minimises the quadratic model over the whole simplex,
    which for a handful of models means trying every set of models that keep a weight, and
    is halved until the objective falls. Weights at a border come out as exactly 0.

    Args:
        logp_MN: Log-probabilities of each of M models, the base first; -inf is allowed. Rows
            to which no model gives any probability do not decide.

    Returns:
        float64 [M].
    """
    logp_MN = np.asarray(logp_MN, np.float64)
    assert logp_MN.shape[1], "no rows"
    logp_MN = logp_MN[:, logp_MN.max(axis=0) > -np.inf]
    num_models, num_rows = logp_MN.shape
    if num_models == 1 or not num_rows:
        return np.eye(num_models)[0]
    if num_models == 2:
        weight = solve(logp_MN[1], logp_MN[0]).weight
        return np.array([1.0 - weight, weight])
    p_MN = np.exp(logp_MN - logp_MN.max(axis=0))

    def objective(weight_M: np.ndarray) -> float:
        with np.errstate(divide="ignore"):
            return -float(np.mean(np.log(weight_M @ p_MN)))

    weight_M = np.full(num_models, 1.0 / num_models)
    value = objective(weight_M)
    for _ in range(_MAX_ITERATIONS):
        ratio_MN = p_MN / (weight_M @ p_MN)
        slope_M = -ratio_MN.mean(axis=1)
        curvature_MM = ratio_MN @ ratio_MN.T / num_rows
        target_M = minimum_on_simplex(slope_M, curvature_MM, weight_M)
        direction_M = target_M - weight_M
        # What is left to gain by this model of the objective, to first order.
        if -float(slope_M @ direction_M) < _TOLERANCE:
            break
        length = 1.0
        while length > _TOLERANCE:
            trial_M = target_M if length == 1.0 else weight_M + length * direction_M
            trial = objective(trial_M)
            if trial <= value + 1e-4 * length * float(slope_M @ direction_M):
                break
            length /= 2
        else:
            break
        weight_M, value = trial_M, trial
    return weight_M


def minimum_on_simplex(
    slope_M: np.ndarray, curvature_MM: np.ndarray, weight_M: np.ndarray
) -> np.ndarray:
    """Minimises slope·d + d·curvature·d / 2, d = w − weight_M, over the simplex of w.

    The minimum has some support, and on it solves the problem with equality constraints
    alone; there are 2^M − 1 supports.
    """
    num_models = len(weight_M)
    # Equal models make it singular; this decides between equally good minima only.
    curvature_MM = curvature_MM + 1e-12 * np.trace(curvature_MM) * np.eye(num_models)
    linear_M = slope_M - curvature_MM @ weight_M
    best, best_value = weight_M, np.inf
    for size in range(1, num_models + 1):
        for support in itertools.combinations(range(num_models), size):
            kept = np.array(support)
            system = np.ones((size + 1, size + 1))
            system[:size, :size] = curvature_MM[np.ix_(kept, kept)]
            system[size, size] = 0.0
            found = np.linalg.solve(system, np.append(-linear_M[kept], 1.0))[:size]
            if (found < 0).any():
                continue
            candidate = np.zeros(num_models)
            candidate[kept] = found / found.sum()
            model_value = float(linear_M @ candidate + candidate @ curvature_MM @ candidate / 2)
            if model_value < best_value:
                best, best_value = candidate, model_value
    return best
