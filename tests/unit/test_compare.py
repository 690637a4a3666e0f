"""Choices on validation, numbers on test, intervals of paired differences."""

import dataclasses
import json
from typing import Any

import numpy as np
import pytest

from mlpmem_jax.evaluation import evaluate_table as compare_module
from mlpmem_jax.evaluation import metrics
from mlpmem_jax.evaluation.draws import Settings
from mlpmem_jax.evaluation.evaluate_table import SplitScores, compare, rows_of
from mlpmem_jax.evaluation.metrics import QUALITY
from mlpmem_jax.evaluation.picture import draw
from mlpmem_jax.evaluation.report import sentence
from mlpmem_jax.evaluation.statistics import summarise
from mlpmem_jax.evaluation.systems import SeedScores

SEPARATOR = 0


def make_scores(seed: int, num_documents: int = 40, knn_gain: float = 0.5) -> SplitScores:
    """A split whose parts help on some tokens and hurt on others."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(5, 60, num_documents)
    offsets = np.concatenate([[0], np.cumsum(lengths + 1)])
    tokens = rng.integers(1, 100, offsets[-1])
    tokens[offsets[:-1]] = SEPARATOR
    counts = metrics.count_documents(tokens[1:], SEPARATOR, offsets, lengths // 2, lengths * 4)
    num_rows = len(tokens) - 1
    decoder_N = -rng.gamma(4.0, 1.0, num_rows)
    knn_N = np.minimum(decoder_N + 2 * rng.standard_normal(num_rows) + knn_gain, -1e-3)
    knn_N[rng.random(num_rows) < 0.2] = -np.inf
    memory_N = np.minimum(decoder_N + 2 * rng.standard_normal(num_rows) + 0.2, -1e-3)
    return SplitScores(counts, decoder_N, knn_N, memory_N)


def run(valid: SplitScores, test: SplitScores) -> dict[str, Any]:
    return compare(
        valid, test, temperature=5.0, bootstrap_samples=200, confidence=0.9, seed=0
    )  # fmt: skip


def test_numbers_agree_with_a_direct_computation():
    valid, test = make_scores(1), make_scores(2)
    found = run(valid, test)
    json.dumps(found, allow_nan=False)
    scored = test.counts.scored_N
    nats = {"decoder": -test.decoder_N[scored].mean()}
    for name in ("knn", "memory"):
        weight = found["systems"][name]["interpolation"]
        grid = np.linspace(0.001, 0.999, 999)
        rows = valid.counts.scored_N
        base, part = np.exp(valid.decoder_N[rows]), np.exp(valid.parts.logprob[name][rows])
        best = min(-np.log(w * part + (1 - w) * base).mean() for w in grid)
        assert found["systems"][name]["valid_nats"] <= best + 1e-9
        mixture = weight * np.exp(test.parts.logprob[name]) + (1 - weight) * np.exp(test.decoder_N)
        nats[name] = -np.log(mixture[scored]).mean()
    for name, value in nats.items():
        assert found["systems"][name]["test_nats"] == pytest.approx(value)
    memory = found["systems"]["memory"]
    assert memory["difference_nats"] == pytest.approx(nats["memory"] - nats["decoder"])
    share = (nats["decoder"] - nats["memory"]) / (nats["decoder"] - nats["knn"])
    assert memory["gain_recovered"] == pytest.approx(share)
    assert memory["gain_recovered_low"] < share < memory["gain_recovered_high"]
    assert memory["difference_low"] < memory["difference_nats"] < memory["difference_high"]
    assert found["systems"]["knn"]["gain_recovered"] == pytest.approx(1.0)
    assert found["systems"]["knn"]["gain_recovered_low"] is None


def test_its_rows_are_those_of_a_table_of_one_seed():
    valid, test = make_scores(1), make_scores(2)
    rows = rows_of(run(valid, test))
    settings = Settings(200, 0.9, 0, "decoder", "knn")
    seeds = {0: SeedScores(valid.parts, test.parts)}
    several = summarise(list(valid.systems.values()), seeds, settings)["rows"]
    for one, other in zip(rows, several, strict=True):
        assert [one["key"], one["label"]] == [other["key"], other["label"]]
        assert one["test_nats"]["value"] == other["test_nats"]["value"]
        assert one["valid_nats"] == other["valid_nats"]["value"]
        assert [one["interpolation"]] == (other["weights"] or [None])
        for name in QUALITY:
            assert one[name] == other[name]
        if one["key"] != "decoder":
            assert one["difference"] == other["difference"]
            assert one["gain_recovered"] == other["gain_recovered"]


def jointly(scores: SplitScores) -> SplitScores:
    """The same with another decoder beside the memory, and λ as trained."""
    beside_N = np.minimum(scores.decoder_N + 0.05, -1e-3)
    return dataclasses.replace(scores, joint_decoder_N=beside_N, memory_weight=0.3)


def test_the_decoder_trained_jointly_is_a_row_and_where_the_memory_s_curve_begins():
    valid, test = jointly(make_scores(1)), jointly(make_scores(2))
    apart, found = run(make_scores(1), make_scores(2)), run(valid, test)
    assert list(found["systems"]) == ["decoder", "knn", "joint_decoder", "memory"]
    for name in ("decoder", "knn"):
        assert found["systems"][name] == apart["systems"][name]
    row, decoder = found["systems"]["joint_decoder"], found["systems"]["decoder"]
    scored = test.counts.scored_N
    assert row["label"] == "decoder, trained jointly"
    assert row["test_nats"] == pytest.approx(-test.joint_decoder_N[scored].mean())
    assert row["interpolation"] is row["interpolation_source"] is None
    assert row["difference_nats"] == pytest.approx(row["test_nats"] - decoder["test_nats"])
    assert row["difference_low"] < row["difference_nats"] < row["difference_high"]
    assert found["curves"]["memory"][0] == pytest.approx(row["valid_nats"])
    assert found["curves"]["knn"][0] == pytest.approx(decoder["valid_nats"])
    json.dumps(found, allow_nan=False)
    assert "decoder before joint training" in sentence(found)
    assert draw(found).startswith(b"\x89PNG")


def test_lambda_is_chosen_without_looking_at_test():
    valid = make_scores(1)
    weights = {
        run(valid, make_scores(seed))["systems"]["memory"]["interpolation"] for seed in (2, 3)
    }
    assert len(weights) == 1


def test_curves_pass_through_the_ends_and_the_minimum():
    valid = make_scores(1)
    found = run(valid, make_scores(2))
    decoder = found["systems"]["decoder"]["valid_nats"]
    for name in ("knn", "memory"):
        assert found["curves"][name][0] == pytest.approx(decoder)
        finite = [nats for nats in found["curves"][name] if nats is not None]
        assert min(finite) >= found["systems"][name]["valid_nats"] - 1e-9
    assert found["curves"]["knn"][-1] is None  # λ = 1 gives some labels no probability


def test_a_useless_retriever_leaves_nothing_to_recover():
    valid, test = make_scores(1), make_scores(2)
    valid = dataclasses.replace(valid, knn_N=np.full_like(valid.decoder_N, -np.inf))
    test = dataclasses.replace(test, knn_N=np.full_like(test.decoder_N, -np.inf))
    found = run(valid, test)
    assert found["systems"]["knn"]["interpolation"] == 0
    assert found["systems"]["memory"]["gain_recovered"] is None
    assert any("gains nothing" in note for note in found["notes"])


@pytest.mark.parametrize(("knn_gain", "has_interval"), [(-1.1, True), (-1.3, False)])
def test_draws_in_which_the_share_is_undefined_are_counted(knn_gain: float, has_interval: bool):
    """Some of them leave an interval, many none; both are said, and no cell is empty."""
    scores = [make_scores(seed, knn_gain=knn_gain) for seed in (1, 2)]
    scores = [dataclasses.replace(one, memory_weight=0.3) for one in scores]
    found = run(*scores)
    memory = found["systems"]["memory"]
    (note,) = (note for note in found["notes"] if "bootstrap draws" in note)
    count = int(note.split(" in ")[1].split(" of 200 ")[0])
    assert (memory["gain_recovered_low"] is not None) == has_interval
    assert (0 < count < 10) if has_interval else count >= 10
    assert note.endswith("both ends" if has_interval else "no interval")
    if has_interval:
        assert memory["gain_recovered_low"] < memory["gain_recovered"]
        assert memory["gain_recovered"] < memory["gain_recovered_high"]


def test_a_label_without_probability_is_reported_and_drawn():
    """λ = 1 on validation, and a test label that no neighbour has."""
    valid, test = make_scores(1), make_scores(2)
    valid = dataclasses.replace(valid, knn_N=valid.decoder_N / 2)
    found = run(valid, test)
    assert found["systems"]["knn"]["interpolation"] == 1
    assert found["systems"]["knn"]["test_nats"] is None
    assert None in found["documents"]["knn"]
    json.dumps(found, allow_nan=False)
    assert draw(found).startswith(b"\x89PNG")


def test_one_document_has_no_interval_and_few_are_remarked():
    valid = make_scores(1)
    one = run(valid, make_scores(2, num_documents=1))
    assert one["systems"]["memory"]["difference_low"] is None
    assert "warning: the test split has 1 document: there are no intervals" in one["notes"]
    assert run(valid, make_scores(2))["notes"] == [
        "intervals include the choice of λ on validation; τ is held fixed"
    ]


def test_very_many_documents_are_thinned_for_the_picture(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compare_module, "_MOST_DOCUMENTS_DRAWN", 7)
    found = run(make_scores(1), make_scores(2))
    assert {len(column) for column in found["documents"].values()} == {7}
