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

from mlpmem_jax.evaluation.bootstrap import FEW_DOCUMENTS, bootstrap_sums, interval
from mlpmem_jax.evaluation.metrics import DocumentCounts, score
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
        **{split: counts[split].totals for split in counts},
        "seeds": list(seeds),
        "confidence": settings.confidence,
        "bootstrap_samples": settings.bootstrap_samples,
        "reference": settings.reference,
        "rows": rows,
        "pairs": _pairs(systems, draws["test"]),
        "documents": {split: _documents(nats[split], counts[split]) for split in nats},
        "notes": _notes(counts["test"], rows, settings),
    }


class _Draws:
    """Sums of every row and seed over drawn documents."""

    def __init__(
        self,
        nats: Mapping[int, Mapping[str, np.ndarray]],
        counts: DocumentCounts,
        settings: Settings,
    ):
        self.seeds = list(nats)
        self._place: dict[tuple[int, str], int] = {}
        columns: list[np.ndarray] = []
        for seed, rows in nats.items():
            for key, nats_D in rows.items():
                self._place[seed, key] = len(columns)
                columns.append(nats_D)
        columns.append(counts.tokens_D.astype(np.float64))
        values_DM = np.stack(columns, axis=1)
        self._total_M = values_DM.sum(axis=0)
        with np.errstate(invalid="ignore"):  # Infinite nats of a row spoil its column alone.
            self._sums_RM = bootstrap_sums(values_DM, settings.bootstrap_samples, settings.seed)
        self._confidence = settings.confidence
        self._has_interval = np.count_nonzero(counts.tokens_D) > 1

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


def _pairs(systems: Sequence[System], draws: _Draws) -> list[dict[str, Any]]:
    """Returns the difference of every two rows, and whether it is resolved.

    It is, where the interval of the mean over seeds excludes 0 and every seed has its sign.
    """
    pairs = []
    for one, other in itertools.combinations(systems, 2):
        mean = draws.difference(other.key, one.key, draws.seeds)
        each = [draws.difference(other.key, one.key, [seed]) for seed in draws.seeds]
        values = [number["value"] for number in each]
        low, high = mean["low"], mean["high"]
        signs = {None if value is None else float(np.sign(value)) for value in values}
        same_sign = signs in ({1.0}, {-1.0})
        pairs.append(
            {
                "row": other.key,
                "against": one.key,
                **mean,
                "by_seed": {str(seed): n for seed, n in zip(draws.seeds, each, strict=True)},
                "spread": spread(values),
                "seeds_resolved": sum(_excludes_zero(number) for number in each),
                "resolved": bool(low is not None and (low > 0 or high < 0) and same_sign),
            }
        )
    return pairs


def _excludes_zero(number: Number) -> bool:
    return number["low"] is not None and (number["low"] > 0 or number["high"] < 0)


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
    test: DocumentCounts, rows: Sequence[Mapping[str, Any]], settings: Settings
) -> list[str]:
    notes = []
    num_documents = int(np.count_nonzero(test.tokens_D))
    if num_documents < FEW_DOCUMENTS:
        notes.append(f"test has {num_documents} documents: intervals over so few are too narrow")
    if any(row["key"] == settings.full_gain for row in rows) and any(
        row.get("gain_recovered", {"value": 0})["value"] is None for row in rows
    ):
        notes.append("the exact kNN-LM gains nothing on test: a share of it is not defined")
    return notes


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
