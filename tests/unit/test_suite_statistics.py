"""Numbers over rows and seeds against plain loops."""

import dataclasses
import json

import numpy as np
import pytest

from mlpmem_jax.evaluation.draws import Settings
from mlpmem_jax.evaluation.lines import correction_note
from mlpmem_jax.evaluation.metrics import count_documents
from mlpmem_jax.evaluation.pairs import spread
from mlpmem_jax.evaluation.statistics import summarise
from mlpmem_jax.evaluation.systems import SeedScores, SplitParts, System
from mlpmem_jax.stats.mixing import solve
from mlpmem_jax.studies.ablate import sweeps
from mlpmem_jax.studies.overfitting import epochs
from mlpmem_jax.studies.tables import report
from mlpmem_jax.studies.tables.report import _carried_by_one

SYSTEMS = (
    System("decoder", "decoder", ("base",)),
    System("knn", "+ kNN-LM", ("base", "knn")),
    System("memory", "+ memory", ("base", "memory")),
    System("both", "+ both", ("base", "memory", "knn")),
    System("twin", "twin", ("twin",)),
)
SETTINGS = Settings(
    bootstrap_samples=300, confidence=0.9, seed=0, reference="decoder", full_gain="knn"
)


def _split(documents: np.random.Generator, noise: np.random.Generator, num_documents: int):
    lengths = documents.integers(5, 60, num_documents)
    offset = np.concatenate([[0], np.cumsum(lengths + 1)])
    token = documents.integers(1, 50, offset[-1])
    token[offset[:-1]] = 0
    counts = count_documents(token[1:], 0, offset, lengths // 2, lengths * 4)
    num_rows = len(token) - 1
    base = -documents.gamma(3.0, 1.0, num_rows)
    knn = np.minimum(base + 2 * noise.standard_normal(num_rows) + 0.6, -1e-3)
    knn[noise.random(num_rows) < 0.2] = -np.inf
    memory = np.minimum(base + 2 * noise.standard_normal(num_rows) + 0.3, -1e-3)
    twin = base + 1e-3 * (-1.0) ** np.arange(num_rows)
    return SplitParts(counts, {"base": base, "knn": knn, "memory": memory, "twin": twin})


@pytest.fixture(scope="module")
def seeds() -> dict[int, SeedScores]:
    """Two seeds over the same documents."""
    return {
        seed: SeedScores(
            valid=_split(np.random.default_rng(1), np.random.default_rng(10 + seed), 30),
            test=_split(np.random.default_rng(2), np.random.default_rng(20 + seed), 40),
        )
        for seed in (3, 8)
    }


@pytest.fixture(scope="module")
def found(seeds) -> dict:
    return summarise(SYSTEMS, seeds, SETTINGS)


def _nats(scores: SeedScores, part: str) -> float:
    scored_N = scores.test.counts.scored_N
    base = scores.test.logprob["base"][scored_N]
    if part == "base":
        return float(-base.mean())
    rows = scores.valid.counts.scored_N
    weight = solve(scores.valid.logprob[part][rows], scores.valid.logprob["base"][rows]).weight
    mixed = weight * np.exp(scores.test.logprob[part][scored_N]) + (1 - weight) * np.exp(base)
    return float(-np.log(mixed).mean())


def test_numbers_of_seeds_and_their_mean(seeds, found):
    json.dumps(found, allow_nan=False)
    rows = {row["key"]: row for row in found["rows"]}
    for key, part in (("decoder", "base"), ("knn", "knn"), ("memory", "memory")):
        values = [_nats(scores, part) for scores in seeds.values()]
        for seed, value in zip(seeds, values, strict=True):
            assert rows[key]["by_seed"][str(seed)]["test_nats"]["value"] == pytest.approx(value)
        assert rows[key]["test_nats"]["value"] == pytest.approx(np.mean(values))
        assert rows[key]["spread"]["test_nats"]["min"] == pytest.approx(min(values))
        assert rows[key]["spread"]["test_nats"]["max"] == pytest.approx(max(values))
    base, knn, memory = (rows[key]["test_nats"]["value"] for key in ("decoder", "knn", "memory"))
    assert rows["memory"]["gain_recovered"]["value"] == pytest.approx(
        (base - memory) / (base - knn)
    )
    assert rows["both"]["valid_nats"]["value"] <= min(
        rows["memory"]["valid_nats"]["value"], rows["knn"]["valid_nats"]["value"]
    )
    assert len(rows["both"]["weights"]) == 2 and rows["decoder"]["weights"] == []


def test_intervals_are_paired_and_over_documents(seeds, found):
    """Against a plain bootstrap that draws documents and sums each row over them."""
    documents = found["documents"]["test"]
    tokens = np.array(documents["tokens"])
    nats = {
        key: np.mean([values[str(seed)] for seed in seeds], axis=0)
        for key, values in documents["nats"].items()
    }
    rng = np.random.default_rng(7)
    drawn = [rng.integers(len(tokens), size=len(tokens)) for _ in range(4000)]
    differences = [
        (nats["memory"][d].sum() - nats["decoder"][d].sum()) / tokens[d].sum() for d in drawn
    ]
    low, high = np.quantile(differences, [0.05, 0.95])
    (row,) = (row for row in found["rows"] if row["key"] == "memory")
    width = high - low
    assert row["difference"]["low"] == pytest.approx(low, abs=0.15 * width)
    assert row["difference"]["high"] == pytest.approx(high, abs=0.15 * width)
    # Not paired, it would be much wider.
    assert row["test_nats"]["high"] - row["test_nats"]["low"] > 1.5 * width


def test_pairs_say_what_is_not_significant(found):
    pairs = {(pair["row"], pair["against"]): pair for pair in found["pairs"]}
    assert len(pairs) == 10
    assert pairs["memory", "decoder"]["significant"]
    assert pairs["memory", "decoder"]["seeds_significant"] == 2
    assert not pairs["twin", "decoder"]["significant"]
    assert pairs["twin", "decoder"]["low"] < 0 < pairs["twin", "decoder"]["high"]
    assert pairs["memory", "knn"]["value"] == pytest.approx(
        pairs["memory", "decoder"]["value"] - pairs["knn", "decoder"]["value"]
    )


def test_what_one_document_carries_is_told_from_what_all_say():
    """Without the largest document it is what a table without it says."""
    one = _split(np.random.default_rng(1), np.random.default_rng(2), 40)
    largest = int(np.argmax(one.counts.tokens_D))
    kept_N = one.counts.document_N != largest
    # Worse by a little everywhere, better by much in the largest document.
    base = one.logprob["base"]
    other = base + np.where(kept_N, -0.01, 1.5) * (1 + 0.1 * np.sin(np.arange(len(base))))
    systems = (System("decoder", "the decoder", ("base",)), System("other", "another", ("other",)))
    parts = SplitParts(one.counts, {"base": base, "other": other})
    found = summarise(systems, {0: SeedScores(parts, parts)}, SETTINGS)
    (pair,) = found["pairs"]
    less = pair["without_largest"]
    without = dataclasses.replace(
        one.counts,
        document_N=np.where(kept_N, one.counts.document_N, -1),
        tokens_D=np.delete(one.counts.tokens_D, largest),
    )
    plain = (base - other)[without.scored_N].mean()
    assert less["value"] == pytest.approx(plain) and less["low"] > 0 and less["significant"]
    assert pair["value"] < 0
    lines = _carried_by_one(found)
    assert "the largest test document" in lines[0] and len(lines) == 2
    assert "another against the decoder: +0.010 [" in lines[1]
    # Rows that differ alike everywhere are carried by no document.
    same = SplitParts(one.counts, {"base": base, "other": base - 0.5})
    found = summarise(systems, {0: SeedScores(same, same)}, SETTINGS)
    assert not _carried_by_one(found)
    assert any(note.startswith("one seed") for note in found["notes"])


def test_seeds_that_disagree_do_not_resolve():
    """Documents alone would be sure of the mean: one seed gains much, the other loses."""
    rng = np.random.default_rng(0)
    seeds = {}
    for seed, shift in ((0, 0.5), (1, -0.1)):
        one = _split(np.random.default_rng(1), np.random.default_rng(2), 40)
        base = one.logprob["base"]
        other = base + shift + 0.01 * rng.standard_normal(len(base))
        parts = SplitParts(one.counts, {"base": base, "other": other})
        seeds[seed] = SeedScores(parts, parts)
    systems = (System("decoder", "", ("base",)), System("other", "", ("other",)))
    (pair,) = summarise(systems, seeds, SETTINGS)["pairs"]
    assert pair["high"] < 0 and pair["seeds_significant"] == 2
    assert not pair["significant"]
    assert pair["spread"]["min"] < 0 < pair["spread"]["max"]


def test_spread_of_one_seed_has_no_deviation():
    assert spread([2.0]) == {"min": 2.0, "max": 2.0, "std": None}
    assert spread([2.0, None])["max"] is None
    assert spread([1.0, 3.0])["std"] == pytest.approx(np.sqrt(2))


def test_a_row_without_probability_left_is_reported_as_such():
    """λ = 1 on validation, and a test label that no neighbour has: infinite, not a crash."""
    scores = _split(np.random.default_rng(1), np.random.default_rng(2), 20)
    base = scores.logprob["base"]
    valid = SplitParts(scores.counts, {"base": base, "knn": base / 2})
    knn = np.where(np.arange(len(base)) == np.flatnonzero(scores.counts.scored_N)[4], -np.inf, base)
    test = SplitParts(scores.counts, {"base": base, "knn": knn})
    found = summarise(SYSTEMS[:2], {0: SeedScores(valid, test)}, SETTINGS)
    json.dumps(found, allow_nan=False)
    assert found["rows"][1]["weights"] == [1.0]
    assert found["rows"][1]["test_nats"]["value"] is None
    assert not found["pairs"][0]["significant"]


def _in_files(parts: SplitParts, per_file: int) -> SplitParts:
    """The same scores, documents cut from files of so many."""
    counts = parts.counts
    file_D = np.arange(len(counts.tokens_D)) // per_file
    return SplitParts(dataclasses.replace(counts, file_D=file_D), parts.logprob)


def _two_rows(per_file: int) -> dict:
    """Documents of a file share how much better the other row is."""
    one = _split(np.random.default_rng(1), np.random.default_rng(2), 60)
    base = one.logprob["base"]
    likes = np.random.default_rng(3).standard_normal(10)[one.counts.document_N // 6]
    parts = SplitParts(one.counts, {"base": base, "other": base + 0.05 + 0.3 * likes})
    parts = _in_files(parts, per_file)
    systems = (System("decoder", "decoder", ("base",)), System("other", "other", ("other",)))
    return summarise(systems, {0: SeedScores(parts, parts)}, SETTINGS)


def test_documents_of_a_file_are_drawn_together():
    apart, together, one_file = _two_rows(1), _two_rows(6), _two_rows(60)
    widths = [found["pairs"][0]["high"] - found["pairs"][0]["low"] for found in (apart, together)]
    # Six documents of a file that agree are one: the interval is about √6 as wide.
    assert 1.8 < widths[1] / widths[0] < 3.2
    assert apart["pairs"][0]["value"] == pytest.approx(together["pairs"][0]["value"], rel=1e-12)
    assert together["test"]["files"] == 10 and together["test"]["documents"] == 60
    assert together["documents"]["test"]["cluster"][:7] == [0] * 6 + [1]
    pair = one_file["pairs"][0]
    assert pair["low"] is None and pair["corrected_low"] is None and not pair["significant"]
    assert one_file["rows"][1]["test_nats"]["low"] is None
    assert any("there are no intervals" in note for note in one_file["notes"])


def test_the_largest_file_is_left_out_whole():
    found = _two_rows(6)
    tokens = np.array(found["documents"]["test"]["tokens"])
    cluster = np.array(found["documents"]["test"]["cluster"])
    kept = cluster != np.bincount(cluster, tokens).argmax()
    nats = {
        row: np.array(of["0"])[kept].sum() for row, of in found["documents"]["test"]["nats"].items()
    }
    plain = (nats["other"] - nats["decoder"]) / tokens[kept].sum()
    assert found["pairs"][0]["without_largest"]["value"] == pytest.approx(plain, abs=1e-6)


def _many_equal_rows(num_rows: int, family=None) -> dict:
    """Rows that differ from the decoder by noise of documents alone."""
    one = _split(np.random.default_rng(1), np.random.default_rng(2), 40)
    base, rng = one.logprob["base"], np.random.default_rng(6)
    noise = rng.standard_normal((num_rows, 40))[:, one.counts.document_N]
    parts = {f"p{n}": base + 0.1 * noise[n] for n in range(num_rows)}
    systems = [System("decoder", "decoder", ("base",))]
    systems += [System(name, name, (name,)) for name in parts]
    scores = SplitParts(one.counts, {"base": base, **parts})
    settings = dataclasses.replace(SETTINGS, bootstrap_samples=1000, family=family)
    return summarise(systems, {0: SeedScores(scores, scores)}, settings)


def test_verdicts_are_corrected_for_the_number_of_pairs():
    """Of 105 pairs without a true difference a tenth look significant one by one."""
    pairs = _many_equal_rows(14)["pairs"]
    assert len(pairs) == 105 and all(pair["compared"] for pair in pairs)
    assert sum(pair["significant_alone"] for pair in pairs) >= 5
    assert sum(pair["significant"] for pair in pairs) == 0
    for pair in pairs:
        assert pair["corrected_low"] < pair["low"] and pair["corrected_high"] > pair["high"]
        inside = pair["corrected_low"] <= 0 <= pair["corrected_high"]
        assert inside == (pair["corrected_p"] > 0.0995)


def test_a_family_holds_what_is_compared_and_no_more():
    found = _many_equal_rows(6, lambda rows: {(row["key"], "decoder") for row in rows})
    compared = [pair for pair in found["pairs"] if pair["compared"]]
    others = [pair for pair in found["pairs"] if not pair["compared"]]
    assert {pair["against"] for pair in compared} == {"decoder"} and len(compared) == 6
    assert all(pair["corrected_p"] is None and not pair["significant"] for pair in others)
    every = {(p["row"], p["against"]): p for p in _many_equal_rows(6)["pairs"]}
    for pair in compared:  # Six comparisons need less of a correction than 21.
        wider = every[pair["row"], pair["against"]]
        assert pair["corrected_high"] < wider["corrected_high"]
        assert pair["low"] == wider["low"]


def test_the_report_says_what_was_corrected(found):
    note = correction_note(len(found["pairs"]), "90 %")
    assert "corrected for 10 comparisons" in note
    lines = report._verdicts(found)
    assert lines[0].startswith("not significant")
    carried = {pair["row"]: pair for pair in found["pairs"]}
    assert "significant_alone" in carried["twin"]


def test_epochs_are_compared_with_the_best_of_validation():
    rows = [
        {"key": f"{network}_epoch_{epoch:03d}", "valid_nats": {"value": value}}
        for network, values in {"decoder": [3.0, 2.0, 2.5], "memory": [3.0, 2.0, 1.0]}.items()
        for epoch, value in enumerate(values, 1)
    ]
    family = epochs.last_against_best({"decoder": [1, 2, 3], "memory": [1, 2, 3]})
    assert family(rows) == {("decoder_epoch_003", "decoder_epoch_002")}


def test_values_of_a_sweep_are_compared_with_the_configured_one():
    rows = [{"key": key} for key in ("configured", "decoder", "value=1", "value=2")]
    pairs = {("value=1", "configured"), ("value=2", "configured")}
    assert sweeps.against_configured(rows) == pairs
