"""Rows of a table over several seeds: weights from validation, numbers with intervals.

Documents are drawn with replacement, for all rows and seeds at once, so that differences
are paired; within a seed that gives an interval over documents, and for the mean of the
seeds another. The spread over seeds stands beside it: documents say how sure the numbers
of these trained networks are, seeds how much another training would change them.

Suffixes: D documents, R draws, M summed columns.
"""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from mlpmem_jax.evaluation.bootstrap import bootstrap_sums, interval
from mlpmem_jax.evaluation.metrics import DocumentCounts, document_notes, score
from mlpmem_jax.evaluation.systems import SplitParts, System

Number = dict[str, Any]
Statistic = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class SeedScores:
    """One seed: the same rows on validation and on test."""

    valid: SplitParts
    test: SplitParts


@dataclasses.dataclass(frozen=True)
class Settings:
    """How intervals are made.

    Attributes:
        bootstrap_samples: Draws of documents.
        confidence: Level of the intervals.
        seed: Of the draws.
        reference: Key of the row that the others are held against.
        full_gain: Key of the row whose gain is 100 %, if it is in the table.
    """

    bootstrap_samples: int
    confidence: float
    seed: int
    reference: str
    full_gain: str


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
    draws = {split: _Draws(nats[split], counts[split], settings) for split in nats}
    rows = [_row(s, list(seeds), weights, nats, counts, draws, settings) for s in systems]
    return {
        **{split: counts[split].summary for split in counts},
        "seeds": list(seeds),
        "confidence": settings.confidence,
        "bootstrap_samples": settings.bootstrap_samples,
        "bootstrap_seed": settings.seed,
        "reference": settings.reference,
        "rows": rows,
        "pairs": _pairs(
            systems,
            draws["test"],
            _Draws(nats["test"], counts["test"], settings, without_largest=True),
        ),
        "documents": {split: _documents(nats[split], counts[split]) for split in nats},
        "notes": _notes(counts, rows, settings),
    }


class _Draws:
    """Sums of every row and seed over drawn documents.

    Args:
        nats: Of every seed and row, by document.
        counts: The documents.
        settings: How intervals are made.
        without_largest: The document with most tokens is left out, if there is another: shows
            what does not depend on it.
    """

    def __init__(
        self,
        nats: Mapping[int, Mapping[str, np.ndarray]],
        counts: DocumentCounts,
        settings: Settings,
        *,
        without_largest: bool = False,
    ):
        self.seeds = list(nats)
        tokens_D = counts.tokens_D.astype(np.float64)
        if without_largest and np.count_nonzero(tokens_D) > 1:
            drawn_D = np.arange(len(tokens_D)) != np.argmax(tokens_D)
        else:
            drawn_D = np.ones(len(tokens_D), bool)
        self._place: dict[tuple[int, str], int] = {}
        columns: list[np.ndarray] = []
        for seed, rows in nats.items():
            for key, nats_D in rows.items():
                self._place[seed, key] = len(columns)
                columns.append(nats_D)
        columns.append(tokens_D)
        values_DM = np.stack(columns, axis=1)[drawn_D]
        self._total_M = values_DM.sum(axis=0)
        self._sums_RM = bootstrap_sums(values_DM, settings.bootstrap_samples, settings.seed)
        self._confidence = settings.confidence
        self._has_interval = np.count_nonzero(tokens_D[drawn_D]) > 1

    def mean_nats(self, sums: np.ndarray, key: str, seeds: Sequence[int]) -> np.ndarray:
        """Returns nats per token of a row, the mean over seeds, for sums [..., M]."""
        places = [self._place[seed, key] for seed in seeds]
        return np.asarray(sums[..., places].mean(axis=-1) / sums[..., -1])

    def number(self, statistic: Statistic) -> Number:
        """Returns a statistic and its interval; None where it is not defined."""
        with np.errstate(divide="ignore", invalid="ignore"):
            value = float(statistic(self._total_M))
        # Without a probability left for some label it is infinite, or not a number.
        if not np.isfinite(value):
            return {"value": None, "low": None, "high": None}
        found = interval(statistic, self._sums_RM, self._confidence) if self._has_interval else None
        return {
            "value": value,
            "low": found.low if found else None,
            "high": found.high if found else None,
        }

    def nats(self, key: str, seeds: Sequence[int]) -> Number:
        """Returns nats per token."""
        return self.number(lambda sums: self.mean_nats(sums, key, seeds))

    def difference(self, key: str, other: str, seeds: Sequence[int]) -> Number:
        """Returns how many nats more a row has than another."""
        return self.number(
            lambda sums: self.mean_nats(sums, key, seeds) - self.mean_nats(sums, other, seeds)
        )

    def share(self, key: str, reference: str, full: str, seeds: Sequence[int]) -> Number:
        """Returns the share of another row's gain that a row has; None where that has none."""

        def statistic(sums: np.ndarray) -> np.ndarray:
            base = self.mean_nats(sums, reference, seeds)
            gain = base - self.mean_nats(sums, full, seeds)
            found = (base - self.mean_nats(sums, key, seeds)) / gain
            return np.where(gain > 0, found, np.nan)

        return self.number(statistic)


def spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Returns the least, the greatest and the standard deviation (of the sample) over seeds."""
    finite = [value for value in values if value is not None]
    if len(finite) < len(values):
        return {"min": None, "max": None, "std": None}
    return {
        "min": min(finite),
        "max": max(finite),
        "std": float(np.std(finite, ddof=1)) if len(finite) > 1 else None,
    }


def _row(
    system: System,
    seeds: list[int],
    weights: Mapping[int, Mapping[str, np.ndarray]],
    nats: Mapping[str, Mapping[int, Mapping[str, np.ndarray]]],
    counts: Mapping[str, DocumentCounts],
    draws: Mapping[str, _Draws],
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


def _pairs(systems: Sequence[System], draws: _Draws, smaller: _Draws) -> list[dict[str, Any]]:
    """Returns the difference of every two rows, and whether it is resolved.

    Args:
        systems: The rows.
        draws: Of all documents.
        smaller: Of all but the largest.
    """
    return [
        {
            "row": other.key,
            "against": one.key,
            **_pair(draws, other.key, one.key),
            "without_largest": _pair(smaller, other.key, one.key),
        }
        for one, other in itertools.combinations(systems, 2)
    ]


def _pair(draws: _Draws, row: str, against: str) -> dict[str, Any]:
    """Returns a difference, resolved where the interval of the mean over seeds excludes 0 and
    every seed has its sign.
    """
    mean = draws.difference(row, against, draws.seeds)
    each = [draws.difference(row, against, [seed]) for seed in draws.seeds]
    values = [number["value"] for number in each]
    signs = {None if value is None else float(np.sign(value)) for value in values}
    return {
        **mean,
        "by_seed": {str(seed): n for seed, n in zip(draws.seeds, each, strict=True)},
        "spread": spread(values),
        "seeds_resolved": sum(_excludes_zero(number) for number in each),
        "resolved": _excludes_zero(mean) and signs in ({1.0}, {-1.0}),
    }


def _excludes_zero(number: Number) -> bool:
    return bool(number["low"] is not None and (number["low"] > 0 or number["high"] < 0))


def _documents(
    nats: Mapping[int, Mapping[str, np.ndarray]], counts: DocumentCounts
) -> dict[str, Any]:
    """Returns tokens and nats of every document: what all the numbers are made from."""
    keys = list(next(iter(nats.values())))
    return {
        "tokens": counts.tokens_D.tolist(),
        "words": counts.words_D.tolist(),
        "bytes": counts.bytes_D.tolist(),
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
    settings: Settings,
) -> list[str]:
    notes = document_notes(counts["test"], counts["valid"])
    if len(rows[0]["by_seed"]) == 1:
        notes.append(
            "one seed: intervals are over documents, how much another training would change is not "
            "in them"
        )
    full = next((row for row in rows if row["key"] == settings.full_gain), None)
    if full and not _gains(full):
        notes.append("the exact kNN-LM gains nothing on test: a share of it is not defined")
    elif full and any(_has_no_interval(row, settings) for row in rows):
        notes.append("the exact kNN-LM's gain is too uncertain for intervals of shares of it")
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
