"""Rows of a table over several seeds: weights from validation, numbers with intervals.

Clusters (the files or records that documents were cut from) are drawn with replacement, for
all rows and seeds at once, so that differences are paired; within a seed that gives an
interval over clusters, and for the mean of the seeds another. In each draw the clusters of
validation are drawn too and λ is chosen anew. The spread over seeds stands beside it:
clusters say how sure the numbers of these trained networks are, seeds how much another
training would change them.

Suffix: D documents.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlpmem_jax.evaluation.metrics import DocumentCounts, document_notes, score
from mlpmem_jax.evaluation.systems import SplitParts, System
from mlpmem_jax.stats.nested import choose
from mlpmem_jax.studies.tables.draws import DrawnSums, Settings, draws_of
from mlpmem_jax.studies.tables.pairs import compared_pairs, spread


@dataclasses.dataclass(frozen=True)
class SeedScores:
    """One seed: the same rows on validation and on test."""

    valid: SplitParts
    test: SplitParts


def summarise(
    systems: Sequence[System], seeds: Mapping[int, SeedScores], settings: Settings
) -> dict[str, Any]:
    """Makes the numbers of a table.

    Args:
        systems: The rows, in order; the reference among them.
        seeds: Scores of every row, by seed.
        settings: How intervals are made.

    Returns:
        JSON-ready: counts of the splits, rows (each with the mean over seeds and every
        seed), pairs, documents, notes.
    """
    weights = {
        seed: {s.key: scores.valid.tuned_weights(s) for s in systems}
        for seed, scores in seeds.items()
    }
    nats = {
        split: {
            seed: {
                s.key: getattr(scores, split).nats_by_document(s, weights[seed][s.key])
                for s in systems
            }
            for seed, scores in seeds.items()
        }
        for split in ("valid", "test")
    }
    counts = {split: getattr(next(iter(seeds.values())), split).counts for split in nats}
    valid_draws = draws_of(counts["valid"].num_clusters, settings, "valid")
    drawn = {
        seed: {
            s.key: choose(one.valid.scored(s), counts["valid"].scored_cluster_N, valid_draws)
            for s in systems
        }
        for seed, one in seeds.items()
    }

    def drawn_sums(split: str, *, without_largest: bool = False) -> DrawnSums:
        parts = {seed: getattr(one, split) for seed, one in seeds.items()}
        return DrawnSums(systems, parts, nats[split], drawn, settings, split, without_largest)

    draws = {split: drawn_sums(split) for split in nats}
    rows = [_row(s, list(seeds), weights, nats, counts, draws, settings) for s in systems]
    return {
        **{split: counts[split].summary for split in counts},
        "seeds": list(seeds),
        "confidence": settings.confidence,
        "bootstrap_samples": settings.bootstrap_samples,
        "bootstrap_seed": settings.seed,
        "reference": settings.reference,
        "rows": rows,
        "pairs": compared_pairs(
            systems, rows, draws["test"], drawn_sums("test", without_largest=True)
        ),
        "documents": {split: _documents(nats[split], counts[split]) for split in nats},
        "notes": _notes(counts, rows, weights, settings),
    }


def _row(
    system: System,
    seeds: list[int],
    weights: Mapping[int, Mapping[str, np.ndarray]],
    nats: Mapping[str, Mapping[int, Mapping[str, np.ndarray]]],
    counts: Mapping[str, DocumentCounts],
    draws: Mapping[str, DrawnSums],
    settings: Settings,
) -> dict[str, Any]:
    key = system.key
    in_table = set(nats["test"][seeds[0]])

    def numbers(chosen: Sequence[int]) -> dict[str, Any]:
        test = draws["test"]
        found: dict[str, Any] = {
            "test_nats": test.nats(key, chosen),
            "valid_nats": draws["valid"].nats(key, chosen),
            "weights": np.mean([weights[seed][key] for seed in chosen], axis=0).tolist()[1:],
        }
        if key != settings.reference:
            found["difference"] = test.difference(key, settings.reference, chosen)
            if settings.full_gain in in_table:
                share = test.share(key, settings.reference, settings.full_gain, chosen)
                if key == settings.full_gain:  # Its own share is 1 by definition.
                    share |= {"low": None, "high": None}
                found["gain_recovered"] = share
        nats_D = np.mean([nats["test"][seed][key] for seed in chosen], axis=0)
        metrics = score(nats_D, counts["test"])
        return found | {
            "token_perplexity": _finite(metrics.token_perplexity),
            "word_perplexity": _finite(metrics.word_perplexity),
            "bits_per_byte": _finite(metrics.bits_per_byte),
        }

    by_seed = {str(seed): numbers([seed]) for seed in seeds}
    mean = numbers(seeds)
    return {
        "key": key,
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


def _documents(
    nats: Mapping[int, Mapping[str, np.ndarray]], counts: DocumentCounts
) -> dict[str, Any]:
    """Returns tokens and nats of every document: what all the numbers are made from."""
    keys = list(next(iter(nats.values())))
    return {
        "tokens": counts.tokens_D.tolist(),
        "words": counts.words_D.tolist(),
        "bytes": counts.bytes_D.tolist(),
        "cluster": counts.cluster_D.tolist(),
        "nats": {
            key: {
                str(seed): [_finite(round(value, 6)) for value in nats[seed][key].tolist()]
                for seed in nats
            }
            for key in keys
        },
    }


def _notes(
    counts: Mapping[str, DocumentCounts],
    rows: Sequence[Mapping[str, Any]],
    weights: Mapping[int, Mapping[str, np.ndarray]],
    settings: Settings,
) -> list[str]:
    notes = document_notes(counts["test"], counts["valid"])
    if counts["valid"].num_clusters > 1:
        notes.append("intervals include the choice of λ on validation; τ is held fixed")
    at_ends = [
        f"{row['label']} (seed {seed})"
        for row in rows
        for seed in weights
        if len(weights[seed][row["key"]]) > 1 and np.isin(weights[seed][row["key"]], (0, 1)).any()
    ]
    if at_ends:
        notes.append(f"warning: a λ is 0 or 1 on validation: {', '.join(at_ends)}")
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


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
