"""Mixtures whose weights are chosen anew in every draw of the bootstrap.

λ is chosen on validation, so an interval that holds it fixed leaves out that other validation
text would have chosen another. In each draw the clusters of validation are drawn too, λ is
solved for them, and the test clusters of the draw are summed at that λ.

Two models have one λ: sums of each cluster on a grid of λ are multiplied by the weights of
all draws, and what lies between grid points is interpolated by cubics. Rows to which one
model gives no probability are singular at an end and are kept apart, exact. Nats of more models
are expanded to second order around some of their solutions, and each draw uses the nearest.

Suffixes: N scored rows, C clusters, R draws, G points of the grid, M models, A expansions.
"""

import dataclasses

import numpy as np
from scipy import special

from mlpmem_jax.stats.bootstrap import Draws
from mlpmem_jax.stats.mixing import minimum_on_simplex, solve, solve_weights

# Points of the grid: over all of [0, 1], dense at its ends, and where the draws fall.
_COARSE = (1 - np.cos(np.linspace(0.0, np.pi, 33))) / 2
_FINE_POINTS = 33
_STANDARD_ERRORS = 4.0
_BISECTIONS = 40
# Ratios of probabilities below this are 0: their squares must not underflow.
_NEGLIGIBLE = 1e-100
# Expansions, and how often they follow the solutions, for three or more models.
_EXPANSIONS = 48
_ROUNDS = 3
# An expansion keeps this distance from the borders, where nats may be infinite.
_INSIDE = 1e-3


def choose(logp_MN: np.ndarray, cluster_N: np.ndarray, draws: Draws) -> np.ndarray:
    """Returns the weights that minimise the nats of each draw, float64 [R, M].

    Args:
        logp_MN: Log-probabilities of the models, the base first; -inf is allowed.
        cluster_N: int64 cluster of each row; every cluster has rows.
    """
    num_models = len(logp_MN)
    if num_models == 1:
        return np.ones((draws.num_draws, 1))
    if num_models == 2:
        weight_R = _choose_one(logp_MN, cluster_N, draws)
        return np.stack([1.0 - weight_R, weight_R], axis=1)
    first_M = solve_weights(logp_MN)
    weight_RM = np.tile(first_M, (draws.num_draws, 1))
    for _ in range(_ROUNDS):
        near = _Expansions(logp_MN, cluster_N, draws, weight_RM)
        steps = zip(near.slope_RM, near.curvature_RMM, near.center_RM, strict=True)
        weight_RM = np.array([minimum_on_simplex(*step) for step in steps])
    return weight_RM


def sum_nats(
    logp_MN: np.ndarray, cluster_N: np.ndarray, weight_RM: np.ndarray, draws: Draws
) -> np.ndarray:
    """Returns the nats of each draw's rows at its own weights, float64 [R].

    Args:
        logp_MN: Log-probabilities of the models, the base first; -inf is allowed.
        cluster_N: int64 cluster of each row.
        weight_RM: The weights of each draw.
    """
    nats_C = np.bincount(cluster_N, -logp_MN[0].astype(np.float64), draws.num_clusters)
    base_R = draws.sums(nats_C[:, None])[:, 0]
    if len(logp_MN) == 1:
        return base_R
    if len(logp_MN) == 2:
        weight_R = weight_RM[:, 1]
        fine = np.linspace(weight_R.min(), weight_R.max(), _FINE_POINTS)
        curve = _Curve(logp_MN, cluster_N, draws, np.union1d(_COARSE, fine))
        # To the bit: a model without weight makes no difference, not one of rounding.
        same_R = (weight_R == 0) & np.isfinite(base_R)
        return np.where(same_R, base_R, curve.nats(weight_R))
    near = _Expansions(logp_MN, cluster_N, draws, weight_RM)
    step_RM = weight_RM - near.center_RM
    linear_R = np.einsum("rm,rm->r", near.slope_RM, step_RM)
    return np.asarray(
        near.value_R
        + linear_R
        + np.einsum("rm,rmk,rk->r", step_RM, near.curvature_RMM, step_RM) / 2
    )


def _relative(logp_MN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns probabilities as shares of the largest of each row, and that one's logarithm."""
    logp_MN = np.asarray(logp_MN, np.float64)
    top_N = logp_MN.max(axis=0)
    return np.exp(logp_MN - np.where(np.isfinite(top_N), top_N, 0.0)), top_N


class _Expansions:
    """Nats of each draw to second order, around a point near its weights.

    Attributes:
        center_RM: The point.
        value_R, slope_RM, curvature_RMM: Nats there and their derivatives.
    """

    def __init__(
        self, logp_MN: np.ndarray, cluster_N: np.ndarray, draws: Draws, weight_RM: np.ndarray
    ):
        num_models = len(logp_MN)
        p_MN, top_N = _relative(logp_MN)
        center_AM, nearest_R = _spread_out(weight_RM)
        center_AM = (1 - _INSIDE) * center_AM + _INSIDE / num_models
        pairs = [(m, k) for m in range(num_models) for k in range(m + 1)]
        columns: list[np.ndarray] = []
        for center_M in center_AM:
            mixed_N = center_M @ p_MN
            with np.errstate(divide="ignore", invalid="ignore"):
                value_N = -np.log(mixed_N) - top_N
                ratio_MN = np.nan_to_num(p_MN / mixed_N)
            squares = (ratio_MN[m] * ratio_MN[k] for m, k in pairs)
            for each_N in (value_N, *-ratio_MN, *squares):
                columns.append(np.bincount(cluster_N, each_N, draws.num_clusters))
        sums_RAX = draws.sums(np.stack(columns, axis=1)).reshape(len(weight_RM), len(center_AM), -1)
        sums_RX = sums_RAX[np.arange(len(weight_RM)), nearest_R]
        self.center_RM = center_AM[nearest_R]
        self.value_R, self.slope_RM = sums_RX[:, 0], sums_RX[:, 1 : 1 + num_models]
        self.curvature_RMM = np.empty((len(weight_RM), num_models, num_models))
        for (m, k), column_R in zip(pairs, sums_RX[:, 1 + num_models :].T, strict=True):
            self.curvature_RMM[:, m, k] = self.curvature_RMM[:, k, m] = column_R


def _spread_out(weight_RM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns points [A, M] such that each row is near one, and which it is [R].

    Each further point is the row that is farthest from those before.
    """
    centers = [weight_RM.mean(axis=0)]
    distance_R = np.square(weight_RM - centers[0]).sum(axis=1)
    nearest_R = np.zeros(len(weight_RM), np.int64)
    while len(centers) < _EXPANSIONS and distance_R.max() > 0:
        centers.append(weight_RM[np.argmax(distance_R)])
        found_R = np.square(weight_RM - centers[-1]).sum(axis=1)
        nearest_R = np.where(found_R < distance_R, len(centers) - 1, nearest_R)
        distance_R = np.minimum(distance_R, found_R)
    return np.array(centers), nearest_R


def _choose_one(logp_MN: np.ndarray, cluster_N: np.ndarray, draws: Draws) -> np.ndarray:
    """Returns λ [R] of the second of two models."""
    best = solve(logp_MN[1], logp_MN[0]).weight
    (base_N, added_N), _ = _relative(logp_MN)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio_N = np.nan_to_num((added_N - base_N) / (base_N + best * (added_N - base_N)))
    slope_C = np.bincount(cluster_N, ratio_N, draws.num_clusters)
    # By the sandwich formula: where the draws fall, about.
    curvature = float(ratio_N @ ratio_N)
    error = float(np.linalg.norm(slope_C)) / curvature if curvature > 0 else 1.0
    fine = best + error * _STANDARD_ERRORS * np.linspace(-1.0, 1.0, _FINE_POINTS)
    points = np.union1d(_COARSE, np.clip(fine, 0.0, 1.0))
    return _Curve(logp_MN, cluster_N, draws, points).minimum()


@dataclasses.dataclass(frozen=True)
class _Cell:
    """Interpolates between two neighbouring points of the grid, for each draw."""

    left_R: np.ndarray
    width_R: np.ndarray
    value: tuple[np.ndarray, np.ndarray]
    slope: tuple[np.ndarray, np.ndarray]

    def at(self, weight_R: np.ndarray) -> np.ndarray:
        """Returns the cubic that has values and slopes of both ends."""
        t = (weight_R - self.left_R) / self.width_R
        (v0, v1), (s0, s1) = self.value, (each * self.width_R for each in self.slope)
        return np.asarray(
            v0 + t * s0 + t**2 * (3 * (v1 - v0) - 2 * s0 - s1) + t**3 * (2 * (v0 - v1) + s0 + s1)
        )


class _Curve:
    """Nats of each draw as a function of λ, the weight of the second of two models."""

    def __init__(
        self, logp_MN: np.ndarray, cluster_N: np.ndarray, draws: Draws, points: np.ndarray
    ):
        self._points_G = points
        (base_N, added_N), top_N = _relative(logp_MN)
        has_base, has_added = base_N > _NEGLIGIBLE, added_N > _NEGLIGIBLE
        both = has_base & has_added

        def by_cluster(values_N: np.ndarray, rows_N: np.ndarray) -> np.ndarray:
            return np.bincount(
                cluster_N[rows_N], np.asarray(values_N, np.float64)[rows_N], draws.num_clusters
            )

        ones_N = np.ones(len(top_N))
        parts = [
            by_cluster(-top_N, np.ones(len(top_N), bool)),
            by_cluster(ones_N, has_base & ~has_added),
            by_cluster(ones_N, has_added & ~has_base),
        ]
        cluster_N = cluster_N[both]
        base_N, added_N = base_N[both], added_N[both]
        gain_N = added_N - base_N
        every = np.ones(len(base_N), bool)
        for weight in points:
            # Not base + weight · gain: a tiny probability would round to 0 beside a large one.
            mixed_N = (1 - weight) * base_N + weight * added_N
            ratio_N = gain_N / mixed_N
            for values_N in (-np.log(mixed_N), -ratio_N, ratio_N * ratio_N):
                parts.append(by_cluster(values_N, every))
        sums_RM = draws.sums(np.stack(parts, axis=1))
        # Rows of one model alone: −log(1 − λ) each for the base, −log λ for the added one.
        self._constant_R, self._base_only_R, self._added_only_R = sums_RM[:, :3].T
        self._value_RG, self._slope_RG, self._curvature_RG = (
            sums_RM[:, 3 + kind :: 3] for kind in range(3)
        )

    def _cell(self, right_R: np.ndarray, values_RG: np.ndarray, slopes_RG: np.ndarray) -> _Cell:
        rows = np.arange(len(right_R))
        ends = right_R - 1, right_R
        left_R, end_R = (self._points_G[each] for each in ends)
        value, slope = (
            (of_RG[rows, ends[0]], of_RG[rows, ends[1]]) for of_RG in (values_RG, slopes_RG)
        )
        return _Cell(left_R, end_R - left_R, value, slope)

    def _singular_slope(self, weight: np.ndarray) -> np.ndarray:
        """Returns the slope of the rows of one model alone, [...] with draws in front."""
        counts = (self._base_only_R, self._added_only_R)
        base, added = (each.reshape(-1, *[1] * (weight.ndim - 1)) for each in counts)
        with np.errstate(divide="ignore", invalid="ignore"):
            rising = np.where(base > 0, base / (1 - weight), 0.0)
            return np.asarray(rising - np.where(added > 0, added / weight, 0.0))

    def minimum(self) -> np.ndarray:
        """Returns λ [R] of the smallest nats; 0 where every λ does equally well."""
        last = len(self._points_G) - 1
        slope_RG = self._slope_RG + self._singular_slope(self._points_G[None, :])
        falling_R = np.count_nonzero(slope_RG < 0, axis=1)
        right_R = np.clip(falling_R, 1, last)
        cell = self._cell(right_R, self._slope_RG, self._curvature_RG)
        low_R, high_R = cell.left_R, cell.left_R + cell.width_R
        for _ in range(_BISECTIONS):
            middle_R = (low_R + high_R) / 2
            # The slope never falls as λ grows.
            smooth_R = np.clip(cell.at(middle_R), *cell.value)
            falls_R = smooth_R + self._singular_slope(middle_R) < 0
            low_R, high_R = np.where(falls_R, middle_R, low_R), np.where(falls_R, high_R, middle_R)
        inner_R = np.where(falling_R > last, 1.0, (low_R + high_R) / 2)
        return np.where(falling_R == 0, 0.0, inner_R)

    def nats(self, weight_R: np.ndarray) -> np.ndarray:
        """Returns the nats [R] of each draw at its λ."""
        right_R = np.searchsorted(self._points_G, weight_R).clip(1, len(self._points_G) - 1)
        cell = self._cell(right_R, self._value_RG, self._slope_RG)
        (v0, v1), (s0, s1) = cell.value, cell.slope
        from_left_R = weight_R - cell.left_R
        # Nats are convex in λ: above both tangents and below the chord.
        tangent_R = np.maximum(v0 + s0 * from_left_R, v1 - s1 * (cell.width_R - from_left_R))
        chord_R = v0 + (v1 - v0) * from_left_R / cell.width_R
        smooth_R = np.minimum(np.maximum(cell.at(weight_R), tangent_R), chord_R)
        with np.errstate(divide="ignore", invalid="ignore"):
            alone_R = special.xlog1py(self._base_only_R, -weight_R)
            alone_R = alone_R + special.xlogy(self._added_only_R, weight_R)
        return np.asarray(self._constant_R + smooth_R - alone_R)
