"""Rows of a table over several seeds: weights from validation, numbers with intervals.

Clusters (the files or records that documents were cut from) are drawn with replacement, for
all rows and seeds at once, so that differences are paired; within a seed that gives an
interval over clusters, and for the mean of the seeds another. In each draw the clusters of
validation are drawn too and λ is chosen anew. The spread over seeds stands beside it:
clusters say how sure the numbers of these trained networks are, seeds how much another
training would change them.

Suffix: D documents.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlpmem_jax.evaluation.draws import BySeed, Choices, DrawnSums, Settings
from mlpmem_jax.evaluation.metrics import (
    DocumentCounts,
    choice_notes,
    document_notes,
    finite,
    score,
)
from mlpmem_jax.evaluation.pairs import compared_pairs, spread
from mlpmem_jax.evaluation.systems import SeedScores, System


class Table:
    """Numbers of rows over seeds.

    Args:
        systems: The rows, in order; the reference among them.
        seeds: Scores of every row's parts, by seed.
        bounds_valid: Whether the nats of validation have intervals too.
    """

    def __init__(
        self,
        systems: Sequence[System],
        seeds: Mapping[int, SeedScores],
        settings: Settings,
        *,
        bounds_valid: bool = True,
    ):
        self.choices = Choices(systems, seeds, settings)
        self.test = DrawnSums(self.choices, "test")
        self._valid = DrawnSums(self.choices, "valid", bounded=bounds_valid)

    def row(self, system: System) -> dict[str, Any]:
        """Returns the mean over seeds, its spread, and every seed."""
        seeds = list(self.choices.seeds)
        by_seed = {str(seed): self.numbers(system.key, [seed]) for seed in seeds}
        mean = self.numbers(system.key, seeds)
        return {
            "key": system.key,
            "label": system.label,
            "parts": list(system.parts),
            **mean,
            "spread": {
                name: spread([found[name]["value"] for found in by_seed.values()])
                for name in ("test_nats", "valid_nats", "difference")
                if name in mean
            },
            "by_seed": by_seed,
        }

    def numbers(self, key: str, seeds: Sequence[int]) -> dict[str, Any]:
        """Returns the numbers of a row, the mean over some seeds."""
        settings, counts = self.choices.settings, self.choices.counts["test"]
        weights = [self.choices.weights[seed][key] for seed in seeds]
        found: dict[str, Any] = {
            "test_nats": self.test.nats(key, seeds),
            "valid_nats": self._valid.nats(key, seeds),
            "weights": np.mean(weights, axis=0).tolist()[1:],
        }
        if key != settings.reference:
            found["difference"] = self.test.difference(key, settings.reference, seeds)
            if settings.full_gain in [system.key for system in self.choices.systems]:
                full = settings.full_gain
                found["gain_recovered"] = self.test.share(key, settings.reference, full, seeds)
        nats_D = np.mean([self.choices.nats["test"][seed][key] for seed in seeds], axis=0)
        return found | {name: finite(value) for name, value in score(nats_D, counts).items()}


def summarise(
    systems: Sequence[System], seeds: Mapping[int, SeedScores], settings: Settings
) -> dict[str, Any]:
    """Makes a table of several runs; arguments as of `Table`.

    Returns:
        JSON-ready: counts of the splits, rows (each with the mean over seeds and every
        seed), pairs, documents, notes.
    """
    table = Table(systems, seeds, settings)
    choices = table.choices
    rows = [table.row(system) for system in systems]
    smaller = DrawnSums(choices, "test", without_largest=True)
    return {
        **{split: counts.summary for split, counts in choices.counts.items()},
        "seeds": list(seeds),
        "confidence": settings.confidence,
        "bootstrap_samples": settings.bootstrap_samples,
        "bootstrap_seed": settings.seed,
        "reference": settings.reference,
        "rows": rows,
        "pairs": compared_pairs(systems, rows, table.test, smaller),
        "documents": {
            split: _documents(choices.nats[split], counts)
            for split, counts in choices.counts.items()
        },
        "notes": _notes(choices, rows),
    }


def _documents(nats: BySeed, counts: DocumentCounts) -> dict[str, Any]:
    """Returns tokens and nats of every document: what all the numbers are made from."""
    keys = list(next(iter(nats.values())))
    return {
        "tokens": counts.tokens_D.tolist(),
        "words": counts.words_D.tolist(),
        "bytes": counts.bytes_D.tolist(),
        "cluster": counts.cluster_D.tolist(),
        "nats": {
            key: {
                str(seed): [finite(round(value, 6)) for value in nats[seed][key].tolist()]
                for seed in nats
            }
            for key in keys
        },
    }


def _notes(choices: Choices, rows: Sequence[Mapping[str, Any]]) -> list[str]:
    counts, weights, settings = choices.counts, choices.weights, choices.settings
    notes = document_notes(counts["test"], counts["valid"]) + choice_notes(counts["valid"])
    at_ends = [
        f"{row['label']} (seed {seed})"
        for row in rows
        for seed in weights
        if len(weights[seed][row["key"]]) > 1 and np.isin(weights[seed][row["key"]], (0, 1)).any()
    ]
    if at_ends:
        notes.append(f"warning: a λ is 0 or 1 on validation: {', '.join(at_ends)}")
    test = next(iter(choices.seeds.values())).test
    own = [system.label for system in choices.systems if test.counts_of(system) is not test.counts]
    if own:
        notes.append(
            f"with tokens of their own: {', '.join(own)}; their nats, of the same text, are "
            "divided by the tokens of the other rows"
        )
    if len(rows[0]["by_seed"]) == 1:
        notes.append(
            "one seed: the intervals cover the choice of text, not how much another training run "
            "would differ"
        )
    full = next((row for row in rows if row["key"] == settings.full_gain), None)
    if full and not _gains(full):
        notes.append("the exact kNN-LM gains nothing on test: a share of it is not defined")
    elif full and any(_has_no_interval(row, settings) for row in rows):
        notes.append(
            "no intervals of shares of the exact kNN-LM's gain: in too many bootstrap draws it "
            "gains nothing"
        )
    return notes


def _gains(row: Mapping[str, Any]) -> bool:
    value = row["difference"]["value"]
    return value is not None and value < 0


def _has_no_interval(row: Mapping[str, Any], settings: Settings) -> bool:
    """Returns whether a row's share has none though its difference has one."""
    if row["key"] in (settings.reference, settings.full_gain):
        return False
    share = row["gain_recovered"]
    return share["low"] is None and row["difference"]["low"] is not None
