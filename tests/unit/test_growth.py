"""Slopes against known data, sizes, and that few queries are searched as many are."""

from types import SimpleNamespace

import numpy as np
import pytest

from mlpmem_jax.config.studies import CostConfig
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.evaluation.timed_decoding import CompiledModel, in_turns, make_search
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.retrieval.distributions import neighbor_weights
from mlpmem_jax.retrieval.engine import ArrayKeys
from mlpmem_jax.retrieval.exact import ExactEngine, _MeshSearch
from mlpmem_jax.studies.cost import slopes
from mlpmem_jax.studies.cost.measurements import sizes
from mlpmem_jax.studies.cost.study import summarize

ROWS = np.array([1000, 2000, 4000, 8000, 16_000])


@pytest.mark.parametrize("power", [-0.5, 0.0, 1.0, 1.7])
def test_the_slope_of_a_power_is_its_exponent(power: float):
    assert slopes.fit(ROWS, 3.5 * ROWS**power) == pytest.approx(power, abs=1e-12)
    both = np.stack([ROWS**power, 2 * ROWS**0.25])
    np.testing.assert_allclose(slopes.fit(ROWS, both), [power, 0.25], atol=1e-12)


def test_the_interval_holds_the_true_slope_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held, widths = 0, []
    for _ in range(400):
        # Each round has a slowness of its own at each size, each value its own noise.
        slow_SR1 = np.exp(0.1 * rng.standard_normal((len(ROWS), 5, 1)))
        value_SRT = (ROWS**0.5)[:, None, None] * slow_SR1 * rng.gamma(50, 1 / 50, (5, 5, 9))
        slope_R = slopes.fit(ROWS, np.median(value_SRT, axis=-1).T)
        found = slopes.over_rounds(slope_R, 0.9)
        assert found["slope"] == pytest.approx(slope_R.mean())
        held += found["low"] <= 0.5 <= found["high"]
        widths.append(found["high"] - found["low"])
    assert 0.86 < held / 400 < 0.94
    assert 0.02 < np.mean(widths) < 0.2


def test_a_round_in_which_everything_was_slow_does_not_move_the_slope():
    rng = np.random.default_rng(1)
    value_SRT = np.ones((len(ROWS), 6, 4)) * rng.gamma(5, 1, (1, 6, 1))
    found = slopes.over_rounds(slopes.fit(ROWS, value_SRT.mean(axis=-1).T), 0.95)
    assert found["slope"] == pytest.approx(0, abs=1e-12)
    assert max(abs(found["low"]), abs(found["high"])) < 1e-12


def test_what_slows_all_systems_of_a_round_alike_is_not_their_own():
    rng = np.random.default_rng(2)
    drift_SR1 = np.exp(rng.standard_normal((1, 5, 1)) * np.log(ROWS)[:, None, None])
    decoder = {"token": 2 * drift_SR1, "search": 0 * drift_SR1}
    memory = {"token": 3 * drift_SR1, "search": 0 * drift_SR1}
    times = {"first": drift_SR1, "step": drift_SR1}
    names = ("decoder", "memory")
    found = summarize(
        CostConfig(),
        ROWS.tolist(),
        dict(zip(names, (decoder | times, memory | times), strict=True)),
        dict.fromkeys(names, [7] * len(ROWS)),
    )
    slope, above = (
        found["memory"][name]["token_ms_p50"] for name in ("slopes", "slopes_above_decoder")
    )
    assert slope["high"] - slope["low"] > 0.5
    assert above["slope"] == pytest.approx(0, abs=1e-9)
    assert above["high"] - above["low"] < 1e-9
    assert "search_ms_p50" not in found["memory"]["slopes"]
    assert found["decoder"]["slopes_above_decoder"] == {}


def test_sizes_double_up_to_all_rows():
    assert sizes(1003, 3, 16) == [125, 250, 501, 1003]
    with pytest.raises(ConfigError, match=r"cost\.doublings=7.*7 of 1003 rows"):
        sizes(1003, 7, 16)


def test_the_timed_knn_lm_draws_from_the_mixture():
    rng = np.random.default_rng(0)
    key = rng.standard_normal((300, 4)).astype(np.float32)
    label = rng.integers(0, 9, 300).astype(np.int32)
    logits = rng.standard_normal((5, 9))
    logprob_BV = (logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))).astype(np.float32)
    engine = ExactEngine(ArrayKeys(key), single_device_mesh(), 1024)
    compiled = CompiledModel(SimpleNamespace(mesh=single_device_mesh()), None, 0.4)
    search = make_search(engine, label, 20, 2.0, 0.4)
    share_BK, label_BK = search(key[:5] + 0.1)
    np.testing.assert_allclose(share_BK.sum(axis=1), 0.4, rtol=1e-5)
    drawn = np.asarray(compiled.mix(logprob_BV, share_BK, label_BK))[:, 0]
    for row in range(5):  # One text, in NumPy.
        found = engine.search(key[row : row + 1] + np.float32(0.1), 20)
        weight_K = neighbor_weights(found.distance_QK, 2.0)[0]
        knn_V = np.bincount(label[found.row_QK[0]], weight_K, minlength=9) / weight_K.sum()
        assert drawn[row] == (0.6 * np.exp(logprob_BV[row]) + 0.4 * knn_V).argmax()


@pytest.mark.parametrize("num_queries", [1, 3, 32])
def test_few_queries_find_what_many_find(num_queries: int):
    rng = np.random.default_rng(num_queries)
    key = rng.standard_normal((9000, 16)).astype(np.float32)
    key[500:520] = key[0]  # Ties are ordered by row.
    query = np.concatenate([key[:1], rng.standard_normal((99, 16)).astype(np.float32)])
    for engine in (
        ExactEngine(ArrayKeys(key), single_device_mesh(), 1024),
        _MeshSearch(ArrayKeys(key), single_device_mesh(), 1024, "cpu"),
    ):
        many, few = engine.search(query, 40), engine.search(query[:num_queries], 40)
        np.testing.assert_array_equal(few.row_QK, many.row_QK[:num_queries])
        # XLA sums the differences of another shape in another order.
        rtol = 1e-6 if isinstance(engine, _MeshSearch) else 0
        np.testing.assert_allclose(few.distance_QK, many.distance_QK[:num_queries], rtol=rtol)


def test_each_round_of_turns_has_an_order_of_its_own():
    def orders(seed: int) -> list[str]:
        names = [name for name, _ in in_turns(dict.fromkeys("abcd", ""), len, 80, seed=(seed,))]
        return ["".join(names[start : start + 32 : 8]) for start in range(0, 320, 32)]

    assert orders(1) == orders(1) != orders(2)
    assert all(sorted(one) == list("abcd") for one in orders(1))
    # Not always behind the same one.
    assert len({one[one.index("a") - 1] for one in orders(1) if one[0] != "a"}) > 1


def test_turns_are_several_in_a_row_after_one_that_does_not_count():
    done: list[str] = []

    def work(writer: str) -> int:
        done.append(writer)
        return len(done)

    found = list(in_turns({"a": "A", "b": "B"}, work, 10, seed=(7,)))
    names = [name for name, _ in found]
    assert sorted(names[:16]) == ["a"] * 8 + ["b"] * 8 and sorted(names[16:]) == list("aabb")
    turns = [names[0] * 9, names[8] * 9, names[16] * 3, names[18] * 3]
    assert "".join(done) == "AAABBB" + "".join(turns).upper()
    counted = {number for _, number in found}
    # The warm-up and the first of each turn are not counted.
    assert set(range(1, len(done) + 1)) - counted == {*range(1, 7), 7, 16, 25, 28}
