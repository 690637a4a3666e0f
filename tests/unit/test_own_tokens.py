"""Rows whose tokenizer cuts the same documents otherwise, in one table with the others."""

import dataclasses

import numpy as np
import pytest

from mlpmem_jax.evaluation.draws import Settings
from mlpmem_jax.evaluation.statistics import summarise
from mlpmem_jax.evaluation.systems import SeedScores, SplitParts, System
from tests.unit.test_suite_statistics import _split

SYSTEMS = (
    System("decoder", "decoder", ("base",)),
    System("memory", "+ memory", ("base", "memory")),
    System("finer", "finer decoder", ("finer-base",)),
    System("finer_memory", "finer + memory", ("finer-base", "finer-memory")),
)
SETTINGS = Settings(
    bootstrap_samples=300, confidence=0.9, seed=0, reference="decoder", full_gain="memory"
)


def _with_finer(split: SplitParts) -> SplitParts:
    """Adds parts that cut each token in two; the second is certain, so that nats stay the same."""
    counts = split.counts
    finer = dataclasses.replace(
        counts, document_N=np.repeat(counts.document_N, 2), tokens_D=2 * counts.tokens_D
    )
    logprob = {name: split.logprob[name] for name in ("base", "memory")}
    for name, value_N in list(logprob.items()):
        logprob[f"finer-{name}"] = np.stack([value_N, np.zeros_like(value_N)], axis=1).ravel()
    return SplitParts(counts, logprob, {name: finer for name in logprob if "finer" in name})


@pytest.fixture(scope="module")
def found() -> dict:
    seeds = {}
    for seed in (3, 8):
        splits = [
            _with_finer(_split(np.random.default_rng(n), np.random.default_rng(10 * n + seed), 30))
            for n in (1, 2)
        ]
        seeds[seed] = SeedScores(*splits)
    return summarise(SYSTEMS, seeds, SETTINGS)


def test_the_same_nats_of_a_text_are_the_same_numbers_whatever_the_tokens(found: dict):
    rows = {row["key"]: row for row in found["rows"]}
    for coarse, finer in (("decoder", "finer"), ("memory", "finer_memory")):
        for name in ("test_nats", "valid_nats"):
            for end in ("value", "low", "high"):
                assert rows[finer][name][end] == pytest.approx(rows[coarse][name][end], rel=1e-9)
        for name in ("bits_per_byte", "word_perplexity", "token_perplexity"):
            assert rows[finer][name] == pytest.approx(rows[coarse][name], rel=1e-9)
        assert rows[finer]["weights"] == pytest.approx(rows[coarse]["weights"], abs=1e-6)
    pairs = {(pair["row"], pair["against"]): pair for pair in found["pairs"]}
    same = pairs["finer_memory", "memory"]
    assert same["value"] == pytest.approx(0, abs=1e-9) and not same["significant"]
    gain, again = pairs["memory", "decoder"], pairs["finer_memory", "finer"]
    assert again["value"] == pytest.approx(gain["value"]) and gain["significant"]
    assert again["without_largest"]["value"] == pytest.approx(gain["without_largest"]["value"])


def test_documents_and_counts_are_those_of_the_table(found: dict):
    documents = found["documents"]["test"]
    assert sum(documents["tokens"]) == found["test"]["tokens"]
    nats = documents["nats"]
    for seed in ("3", "8"):
        np.testing.assert_allclose(nats["finer"][seed], nats["decoder"][seed], atol=2e-6)


def test_a_note_names_the_rows_with_tokens_of_their_own(found: dict):
    (note,) = (note for note in found["notes"] if "tokens of their own" in note)
    assert "finer decoder, finer + memory;" in note
