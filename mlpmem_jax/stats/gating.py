"""A gate: λ of each token as a function of features, fitted to rows that no network was trained on.

Suffixes: N rows, X features.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np
from scipy import optimize, special

# Of features of unit deviation; infinite: one λ for all rows.
_RIDGES = (np.inf, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
_BLOCKS = 16  # Rows that follow one another are of the same text: they are left out together.
_LEAST_ROWS = 256  # With fewer, one λ.
_MAX_ITERATIONS = 200
_ROWS_AT_ONCE = 4096


@dataclasses.dataclass(frozen=True)
class Gate:
    """λ = floor + (1 − 2·floor)·sigmoid(x·weight + bias).

    Attributes:
        weight_X: float64.
        bias: Of the same sum.
        ridge: The penalty that was chosen; infinite: all weights are 0.
        nats: Mean −log p of rows that the fit had left out, with this ridge; not a number where
            there are too few rows to leave any out.
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
        feature_NX: float32 [N, X].
        memory_N: float log p of the label by the model whose weight is λ.
        decoder_N: The same by the other.
    """

    feature_NX: np.ndarray
    memory_N: np.ndarray
    decoder_N: np.ndarray

    def __getitem__(self, part: slice) -> "GateRows":
        """Returns some of the rows, as views."""
        return GateRows(self.feature_NX[part], self.memory_N[part], self.decoder_N[part])

    def __len__(self) -> int:
        """The number of rows."""
        return len(self.memory_N)


def fit_gate(rows: GateRows, floor: float) -> Gate:
    """Minimises the mean −log p of the mixture plus ridge/2 · |weight|² of scaled features.

    The ridge is the one with the least nats on left-out rows: blocks of consecutive rows are dealt
    to two halves, and each half is scored by the gate of the other.

    Args:
        rows: In the order of their text. Rows whose label neither model expects at all count for
            nothing.
        floor: Smallest distance of λ from 0 and 1, below 0.5.

    Raises:
        ValueError: No row is left, or one is not finite.
    """
    halves, mean_X, deviation_X = _scaled_halves(rows)
    whole = halves.whole
    nats, best = [np.nan], 0
    if len(whole) >= _LEAST_ROWS:
        nats = [_left_out(halves, solutions, floor) for solutions in _paths(halves, floor)]
        best = int(np.argmin(nats))
    solution = _start(whole.feature_NX.shape[1])
    for ridge in _RIDGES[: best + 1]:  # Each begins with the solution of the stronger one before.
        solution = _fitted(whole, floor, ridge, solution)
    weight_X = solution[1:] / deviation_X
    bias = float(solution[0] - weight_X @ mean_X)
    if not (np.all(np.isfinite(weight_X)) and np.isfinite(bias)):
        raise ValueError("the gate's weights are not finite")
    return Gate(weight_X, bias, _RIDGES[best], float(nats[best]), float(nats[0]))


@dataclasses.dataclass(frozen=True)
class _Halves:
    """Scaled rows, those of the one half before those of the other."""

    whole: GateRows
    first: int

    @property
    def both(self) -> tuple[GateRows, GateRows]:
        return self.whole[: self.first], self.whole[self.first :]


def _scaled_halves(rows: GateRows) -> tuple[_Halves, np.ndarray, np.ndarray]:
    """Returns the rows that count, with features of mean 0 and deviation 1, and both of before."""
    kept_N = np.flatnonzero(np.maximum(rows.memory_N, rows.decoder_N) > -np.inf)
    is_nan = np.isnan(rows.memory_N).any() or np.isnan(rows.decoder_N).any()
    if is_nan or not len(kept_N):
        raise ValueError("log-probabilities are not a number, or no label has any")
    second_N = np.arange(len(kept_N)) * _BLOCKS // len(kept_N) % 2
    kept_N = kept_N[np.argsort(second_N, kind="stable")]
    feature_NX = rows.feature_NX[kept_N].astype(np.float32, copy=False)
    mean_X = feature_NX.mean(axis=0, dtype=np.float64)
    square_X = np.zeros_like(mean_X)
    for at in range(0, len(kept_N), _ROWS_AT_ONCE):
        part_NX = feature_NX[at : at + _ROWS_AT_ONCE]
        part_NX -= mean_X.astype(np.float32)
        square_X += np.square(part_NX, dtype=np.float64).sum(axis=0)
    deviation_X = np.maximum(np.sqrt(square_X / len(kept_N)), 1e-6)
    feature_NX /= deviation_X.astype(np.float32)
    if not np.all(np.isfinite(deviation_X)):
        raise ValueError("features are not finite")
    scaled = GateRows(feature_NX, rows.memory_N[kept_N], rows.decoder_N[kept_N])
    return _Halves(scaled, int(np.sum(second_N == 0))), mean_X, deviation_X


def _paths(halves: _Halves, floor: float) -> Iterator[list[np.ndarray]]:
    """Yields the solutions of both halves for each ridge, from the strongest."""
    solutions = [_start(half.feature_NX.shape[1]) for half in halves.both]
    for ridge in _RIDGES:
        solutions = [
            _fitted(half, floor, ridge, start)
            for half, start in zip(halves.both, solutions, strict=True)
        ]
        yield solutions


def _left_out(halves: _Halves, solutions: list[np.ndarray], floor: float) -> float:
    """Returns mean nats, each half scored with the solution of the other."""
    scored = zip(reversed(halves.both), solutions, strict=True)
    sums = [_loss(solution, half, floor, 0.0)[0] * len(half) for half, solution in scored]
    return sum(sums) / len(halves.whole)


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
