"""A gate: λ of each token as a function of features, fitted to rows that no network was trained on.

Suffixes: N rows, X features.
"""

import dataclasses

import numpy as np
from scipy import optimize, special

# Of features of unit deviation; infinite: one λ for all rows.
_RIDGES = (np.inf, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
_BLOCKS = 16  # Rows that follow one another are of the same text: they are left out together.
_MAX_ITERATIONS = 200


@dataclasses.dataclass(frozen=True)
class Gate:
    """λ = floor + (1 − 2·floor)·sigmoid(x·weight + bias).

    Attributes:
        weight_X: float64.
        bias: Of the same sum.
        ridge: The penalty that was chosen; infinite: all weights are 0.
        nats: Mean −log p of rows that the fit had left out, with this ridge.
        nats_one: The same with one λ for all rows.
    """

    weight_X: np.ndarray
    bias: float
    ridge: float
    nats: float
    nats_one: float


@dataclasses.dataclass(frozen=True)
class GateRows:
    """Rows that a gate is fitted to.

    Attributes:
        feature_NX: float [N, X].
        memory_N: float log p of the label by the model whose weight is λ.
        decoder_N: The same by the other.
    """

    feature_NX: np.ndarray
    memory_N: np.ndarray
    decoder_N: np.ndarray

    def of(self, chosen_N: np.ndarray) -> "GateRows":
        """Returns some of the rows (bool [N])."""
        return GateRows(
            self.feature_NX[chosen_N], self.memory_N[chosen_N], self.decoder_N[chosen_N]
        )


def fit_gate(rows: GateRows, floor: float) -> Gate:
    """Minimises the mean −log p of the mixture plus ridge/2 · |weight|² of scaled features.

    The ridge is the one with the least nats on left-out rows: blocks of consecutive rows are dealt
    to two halves, and each half is scored by the gate of the other.

    Args:
        rows: At least `_BLOCKS` of them.
        floor: Smallest distance of λ from 0 and 1, below 0.5.
    """
    mean_X = rows.feature_NX.mean(axis=0, dtype=np.float64)
    deviation_X = np.maximum(rows.feature_NX.std(axis=0, dtype=np.float64), 1e-6)
    scaled_NX = ((rows.feature_NX - mean_X) / deviation_X).astype(np.float32)
    rows = dataclasses.replace(rows, feature_NX=scaled_NX)
    count = len(rows.memory_N)
    half_N = np.arange(count) * _BLOCKS // count % 2 == 0
    halves = [(rows.of(half_N), rows.of(~half_N)), (rows.of(~half_N), rows.of(half_N))]
    starts = [_start(rows.feature_NX.shape[1]) for _ in halves]
    nats = []
    for ridge in _RIDGES:  # Each begins with the solution of the stronger one before.
        starts = [
            _fitted(fitted, floor, ridge, start)
            for (fitted, _), start in zip(halves, starts, strict=True)
        ]
        left_out = [
            _loss(solution, out, floor, 0.0)[0] * len(out.memory_N)
            for (_, out), solution in zip(halves, starts, strict=True)
        ]
        nats.append(sum(left_out) / count)
    best = int(np.argmin(nats))
    solution = _start(rows.feature_NX.shape[1])
    for ridge in _RIDGES[: best + 1]:
        solution = _fitted(rows, floor, ridge, solution)
    weight_X = solution[1:] / deviation_X
    bias = float(solution[0] - weight_X @ mean_X)
    return Gate(weight_X, bias, _RIDGES[best], float(nats[best]), float(nats[0]))


def _start(num_features: int) -> np.ndarray:
    return np.zeros(num_features + 1)


def _fitted(rows: GateRows, floor: float, ridge: float, start: np.ndarray) -> np.ndarray:
    """Returns bias and weights, float64 [1 + X]."""
    if np.isinf(ridge):
        alone = dataclasses.replace(rows, feature_NX=rows.feature_NX[:, :0])
        found = optimize.minimize(_loss, start[:1], (alone, floor, 0.0), "L-BFGS-B", jac=True)
        return np.concatenate([found.x, np.zeros(len(start) - 1)])
    limits = {"maxiter": _MAX_ITERATIONS}
    found = optimize.minimize(
        _loss, start, (rows, floor, ridge), "L-BFGS-B", jac=True, options=limits
    )
    return np.asarray(found.x)


def _loss(
    solution: np.ndarray, rows: GateRows, floor: float, ridge: float
) -> tuple[float, np.ndarray]:
    """Returns the mean −log p with the penalty, and its gradient."""
    weight_X = solution[1:]
    share_N = special.expit(
        (rows.feature_NX @ weight_X.astype(np.float32)).astype(np.float64) + solution[0]
    )
    lambda_N = floor + (1 - 2 * floor) * share_N
    # Relative to the larger of both, so that none underflows.
    top_N = np.maximum(rows.memory_N, rows.decoder_N).astype(np.float64)
    memory_N, decoder_N = np.exp(rows.memory_N - top_N), np.exp(rows.decoder_N - top_N)
    mixed_N = np.maximum(lambda_N * memory_N + (1 - lambda_N) * decoder_N, np.finfo(float).tiny)
    slope_N = -(1 - 2 * floor) * share_N * (1 - share_N) * (memory_N - decoder_N) / mixed_N
    slope_N /= len(slope_N)
    gradient_X = rows.feature_NX.T @ slope_N.astype(np.float32) + ridge * weight_X
    value = -np.mean(np.log(mixed_N) + top_N) + ridge / 2 * float(weight_X @ weight_X)
    return float(value), np.concatenate([[slope_N.sum()], gradient_X])
