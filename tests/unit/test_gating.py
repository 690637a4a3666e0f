"""A gate fitted to rows: against one λ, a plain minimiser and what it was drawn from."""

import numpy as np
import pytest
from scipy import optimize, special

from mlpmem_jax.stats.gating import Gate, GateRows, fit_gate
from mlpmem_jax.stats.mixing import mixture_logprob, solve


def _rows(seed: int, count: int = 6000, slope: float = 2.0) -> GateRows:
    """Rows where the memory is better the larger the first of three features is."""
    rng = np.random.default_rng(seed)
    feature_NX = rng.normal(size=(count, 3)).astype(np.float32) * [1.0, 30.0, 0.01] + [0, 5, 0]
    better_N = rng.random(count) < special.expit(slope * feature_NX[:, 0])
    good_N, bad_N = np.log(rng.uniform(0.3, 0.9, count)), np.log(rng.uniform(1e-4, 0.1, count))
    memory_N, decoder_N = np.where(better_N, good_N, bad_N), np.where(better_N, bad_N, good_N)
    return GateRows(
        feature_NX.astype(np.float32), memory_N.astype(np.float32), decoder_N.astype(np.float32)
    )


def _share(gate: Gate, rows: GateRows) -> np.ndarray:
    return special.expit(rows.feature_NX @ gate.weight_X + gate.bias)


def _nats(rows: GateRows, weight_N: np.ndarray | float) -> float:
    return -float(mixture_logprob(rows.memory_N, rows.decoder_N, weight_N).mean())


def test_it_finds_where_each_model_is_better():
    gate, fresh = fit_gate(_rows(0), 0.0), _rows(1)
    one = solve(fresh.memory_N, fresh.decoder_N)
    assert _nats(fresh, _share(gate, fresh)) < one.nats - 0.2
    # Left-out rows say before what new rows say after.
    assert gate.nats == pytest.approx(_nats(fresh, _share(gate, fresh)), abs=0.03)
    assert gate.nats_one == pytest.approx(one.nats, abs=0.03)
    assert gate.weight_X[0] == pytest.approx(2.0, abs=0.3)
    scale_X = np.asarray([1.0, 30.0, 0.01])
    assert np.all(np.abs(gate.weight_X * scale_X)[1:] < 0.15)


def test_features_that_say_nothing_leave_one_weight():
    gate, rows = fit_gate(_rows(0, slope=0.0), 0.0), _rows(0, slope=0.0)
    one = solve(rows.memory_N, rows.decoder_N)
    assert _share(gate, rows) == pytest.approx(one.weight, abs=0.05)
    assert _nats(rows, _share(gate, rows)) == pytest.approx(one.nats, abs=2e-3)


def test_it_is_the_minimum_of_the_penalised_mean():
    """Against a minimiser of its own that knows values alone."""
    rows = _rows(0, count=400)
    gate = fit_gate(rows, 0.1)
    mean_X, deviation_X = rows.feature_NX.mean(0), rows.feature_NX.std(0)
    scaled_NX = (rows.feature_NX - mean_X) / deviation_X

    def value(solution: np.ndarray) -> float:
        weight_N = 0.1 + 0.8 * special.expit(scaled_NX @ solution[1:] + solution[0])
        return _nats(rows, weight_N) + gate.ridge / 2 * float(solution[1:] @ solution[1:])

    plain = optimize.minimize(value, np.zeros(4), method="Powell", options={"xtol": 1e-6})
    weight_X = gate.weight_X * deviation_X
    ours = np.concatenate([[gate.bias + gate.weight_X @ mean_X], weight_X])
    assert np.isfinite(gate.ridge)
    assert value(ours) <= plain.fun + 1e-5


def test_labels_that_no_model_expects_count_for_nothing():
    rows = _rows(0, count=400)
    rows.memory_N[:5], rows.decoder_N[:5] = -2000.0, -1500.0
    rows.decoder_N[5:9] = -np.inf
    rows.memory_N[9:12], rows.decoder_N[9:12] = -np.inf, -np.inf
    gate = fit_gate(rows, 0.0)
    kept = np.r_[0:9, 12:400]
    without = GateRows(rows.feature_NX[kept], rows.memory_N[kept], rows.decoder_N[kept])
    np.testing.assert_array_equal(gate.weight_X, fit_gate(without, 0.0).weight_X)
    assert np.any(gate.weight_X) and np.isfinite(gate.nats)


def test_few_rows_get_the_best_single_weight():
    rows = _rows(0, count=100)
    gate, one = fit_gate(rows, 0.0), solve(rows.memory_N, rows.decoder_N)
    assert not np.any(gate.weight_X) and np.isnan(gate.nats)
    assert special.expit(gate.bias) == pytest.approx(one.weight, abs=1e-3)


@pytest.mark.parametrize("name", ["feature_NX", "memory_N", "decoder_N"])
def test_what_is_not_a_number_is_refused(name):
    rows = _rows(0, count=400)
    getattr(rows, name)[7] = np.nan
    with pytest.raises(ValueError, match="not"):
        fit_gate(rows, 0.0)
