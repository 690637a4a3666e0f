"""What the tables of several runs say: text and CSV from the numbers of `summarise`."""

import csv
import dataclasses
import io

import numpy as np
import pytest

from mlpmem_jax.evaluation.draws import Settings
from mlpmem_jax.evaluation.statistics import summarise
from mlpmem_jax.evaluation.systems import SeedScores, SplitParts, System
from mlpmem_jax.studies.ablate import sweeps
from mlpmem_jax.studies.overfitting import epochs
from mlpmem_jax.studies.tables import report
from tests.unit.test_suite_statistics import _split

COST = {
    "flops": 1e9, "flops_by_purpose": {"pretrain": 1e9}, "network_flops": 1e9, "seconds": 2.0,
}  # fmt: skip


def _seeds(parts: dict[str, float], num_seeds: int = 2) -> dict[int, SeedScores]:
    """Seeds whose parts are better than the decoder by so much, with a noise by document."""
    seeds = {}
    for seed in range(num_seeds):
        splits = []
        for of_split in (1, 2):
            one = _split(np.random.default_rng(of_split), np.random.default_rng(seed), 30)
            rng = np.random.default_rng((of_split, seed))
            base = one.logprob["base"]
            noise = 0.05 * rng.standard_normal((len(parts), 30))[:, one.counts.document_N]
            better = {name: base + gain + noise[n] for n, (name, gain) in enumerate(parts.items())}
            file_D = np.arange(30) // 2
            counts = dataclasses.replace(one.counts, file_D=file_D)
            splits.append(SplitParts(counts, {"base": base, **better}))
        seeds[seed] = SeedScores(*splits)
    return seeds


def _measured(rows: list[str], at_bound: str | None = None) -> dict:
    one = {
        "parameters": 10, "non_embedding_parameters": 5, "temperature": 2.5,
        "temperature_at_bound": at_bound, "trained_weight": None, "recall": None,
        "recall_of_targets": None, "steps": {"decoder": 3}, "cost": COST,
    }  # fmt: skip
    return {"peak_flops": 1e9, "rows": {row: {"0": one, "1": one} for row in rows}}


def _settings(**more) -> Settings:
    return Settings(300, 0.9, 0, more.pop("reference", "decoder"), "", **more)


def _table(parts: dict[str, float], **more) -> dict:
    systems = [System("decoder", "decoder", ("base",))]
    systems += [System(name, name, (name,)) for name in parts]
    return summarise(systems, _seeds(parts), _settings(**more))


def test_compare_says_what_is_not_significant_after_the_correction():
    found = _table({"good": 0.5, "none": 0.0})
    documents = found.pop("documents")
    measured = _measured(["decoder", "good", "none"], "upper")
    text = report.as_text(found, measured)
    joined = " ".join(text.split())
    assert "in 30 documents from 15 files (" in text and "effective sample size" in text
    assert "corrected for 3 comparisons" in joined
    assert "τ = 2.5 is at the upper bound" in joined and "(row good, seed 1)" in joined
    below = text[text.index("not significant (interval") :]
    assert "none against decoder" in below and "good against decoder" not in below
    rows = list(csv.DictReader(io.StringIO(report.pairs_csv(found))))
    mean = {(row["row"], row["against"]): row for row in rows if row["seed"] == "mean"}
    assert mean["good", "decoder"]["significant"] == "True"
    assert float(mean["good", "decoder"]["corrected_high"]) < 0
    assert float(mean["good", "decoder"]["corrected_p"]) < 0.1
    assert mean["none", "decoder"]["significant"] == "False"
    assert list(csv.DictReader(io.StringIO(report.rows_csv(found, measured))))
    lines = list(csv.DictReader(io.StringIO(report.documents_csv(documents))))
    assert [line["cluster"] for line in lines[:4]] == ["0", "0", "1", "1"]


def test_ablate_marks_what_is_not_significant_and_says_how_many_it_compares():
    parts = {"value=1": 0.4, "value=2": 0.0, "value=3": -0.4}
    seeds = _seeds({**parts, "configured": 0.0})
    systems = [System("configured", "as configured", ("configured",))]
    systems += [System("decoder", "decoder", ("base",))]
    systems += [System(name, name, (name,)) for name in parts]
    settings = _settings(reference="configured", family=sweeps.against_configured, tables=2)
    table = summarise(systems, seeds, settings)
    assert [pair["row"] for pair in table["pairs"] if pair["compared"]] == list(parts)
    alone = summarise(systems, seeds, dataclasses.replace(settings, tables=1))
    for both, one in zip(table["pairs"], alone["pairs"], strict=True):
        if both["compared"]:  # The level is divided among the sweeps of a report.
            assert both["corrected_low"] < one["corrected_low"]
    sweep = {"title": "key", "key": "key", "role": "run"}
    sweep |= sweeps.sweep_results(table, [(n, f"value={n}") for n in (1, 2, 3)])
    results = {name: table[name] for name in ("seeds", "confidence")} | {"sweeps": [sweep, sweep]}
    costs = {"sweeps": [_measured([system.key for system in systems])] * 2}
    text = sweeps.as_text(results, costs)
    lines = [line for line in text.splitlines() if line.startswith("│ ")]
    marked = [line.split()[1] for line in lines if " * " in line]
    assert marked == ["2", "2"] and "corrected for 6 comparisons" in " ".join(text.split())
    rows = list(csv.DictReader(io.StringIO(sweeps.as_csv(results, costs))))
    verdict = {r["row"]: r["significant"] for r in rows if r["seed"] == "mean"}
    assert verdict["value=1"] == "True" and verdict["value=2"] == "False"


@pytest.mark.parametrize(("last", "said"), [(0.3, ""), (0.5, ", not significant")])
def test_overfitting_compares_the_last_epoch_with_the_best(last: float, said: str):
    gains = {("decoder", 1): 0.1, ("decoder", 2): 0.501, ("decoder", 3): last}
    gains |= {(name, n): 0.1 * n for name in ("memory", "memory_alone") for n in (1, 2, 3)}
    parts = {epochs.row_key(*key): gain for key, gain in gains.items()}
    steps = {name: [1, 2, 3] for name in epochs.LABELS}
    family = epochs.last_against_best(steps)
    table = _table(parts, family=family)
    # Validation decides which epoch is best; here noise may move it from 2 to 3.
    networks = epochs.by_epoch(table, steps)
    results = {name: table[name] for name in ("seeds", "confidence", "notes")}
    results |= {"networks": networks, "reference_nats": 3.0}
    text = " ".join(epochs.as_text(results).split())
    decoder = networks["decoder"]
    compared = [(p["row"], p["against"]) for p in table["pairs"] if p["compared"]]
    if decoder["best_epoch"] < 3:
        assert compared == [("decoder_epoch_003", f"decoder_epoch_{decoder['best_epoch']:03d}")]
        assert f"are lost after it (90 % interval [{'' if said else '0'}" in text
        assert ("not significant)" in text) == bool(said)
    assert networks["memory"]["best_epoch"] == 3 and networks["memory"]["lost_after_best"] is None
    assert list(csv.DictReader(io.StringIO(epochs.as_csv(results))))
