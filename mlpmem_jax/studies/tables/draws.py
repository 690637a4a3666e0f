"""Sums of every row and seed over drawn clusters, λ chosen anew in each draw.

Suffixes: D documents, N scored rows, C clusters, R draws, M summed columns.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from mlpmem_jax.evaluation.systems import SplitParts, System
from mlpmem_jax.stats.bootstrap import (
    Draws,
    Number,
    PairedSums,
    Simultaneous,
    Statistic,
    simultaneous,
)
from mlpmem_jax.stats.nested import sum_nats

Pair = tuple[str, str]
# Rows, with their numbers, to the pairs (row, against) that verdicts are given on.
Family = Callable[[Sequence[Mapping[str, Any]]], Collection[Pair]]
# For each seed and row, weights of the row's parts in each draw, [R, parts].
DrawnWeights = Mapping[int, Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How intervals are made.

    Attributes:
        bootstrap_samples: Draws of clusters.
        confidence: Level of the intervals.
        seed: Of the draws.
        reference: Key of the row that the others are held against.
        full_gain: Key of the row whose gain is 100 %, if it is in the table.
        family: Pairs that verdicts are given on, corrected for their number; None: all.
        tables: How many such families stand in one report.
    """

    bootstrap_samples: int
    confidence: float
    seed: int
    reference: str
    full_gain: str
    family: Family | None = None
    tables: int = 1


def draws_of(num_clusters: int, settings: Settings, split: str) -> Draws:
    """Returns the draws of a split; those of validation and test are independent."""
    seed = (settings.seed, 1) if split == "valid" else settings.seed
    return Draws(num_clusters, settings.bootstrap_samples, seed)


class DrawnSums:
    """Sums of every row and seed over drawn clusters.

    Args:
        systems: The rows.
        parts: Scores of one split, by seed.
        nats: Of every seed and row, by document, at the weights chosen on validation.
        weights: Of every seed and row, as chosen in each draw.
        settings: How intervals are made.
        split: valid or test.
        without_largest: The cluster with most tokens is left out, if there is another: shows
            what does not depend on it.
    """

    def __init__(
        self,
        systems: Sequence[System],
        parts: Mapping[int, SplitParts],
        nats: Mapping[int, Mapping[str, np.ndarray]],
        weights: DrawnWeights,
        settings: Settings,
        split: str,
        without_largest: bool,
    ):
        self.seeds = list(nats)
        self.settings = settings
        counts = next(iter(parts.values())).counts
        tokens_C = counts.tokens_C
        kept_C = np.ones(len(tokens_C), bool)
        if without_largest and len(tokens_C) > 1:
            kept_C[np.argmax(tokens_C)] = False
        drawn = draws_of(int(kept_C.sum()), settings, split)
        row_N = kept_C[counts.scored_cluster_N]
        cluster_N = (np.cumsum(kept_C) - 1)[counts.scored_cluster_N[row_N]]
        self._place: dict[tuple[int, str], int] = {}
        totals: list[float] = []
        columns: list[np.ndarray] = []
        for seed in self.seeds:
            for system in systems:
                key = system.key
                self._place[seed, key] = len(columns)
                totals.append(counts.by_cluster(nats[seed][key])[kept_C].sum())
                logp_MN = parts[seed].scored(system)[:, row_N]
                columns.append(sum_nats(logp_MN, cluster_N, weights[seed][key], drawn))
        tokens_R = drawn.sums(tokens_C[kept_C][:, None])[:, 0]
        self._sums = PairedSums(
            np.array([*totals, tokens_C[kept_C].sum()]),
            np.stack([*columns, tokens_R], axis=1),
            settings.confidence,
            has_interval=int(np.count_nonzero(kept_C)) > 1,
        )

    def mean_nats(self, sums: np.ndarray, key: str, seeds: Sequence[int]) -> np.ndarray:
        """Returns nats per token of a row, the mean over seeds, for sums [..., M]."""
        places = [self._place[seed, key] for seed in seeds]
        return np.asarray(sums[..., places].mean(axis=-1) / sums[..., -1])

    def number(self, statistic: Statistic) -> Number:
        """Returns a statistic and its interval; None where it is not defined."""
        return self._sums.number(statistic)

    def nats(self, key: str, seeds: Sequence[int]) -> Number:
        """Returns nats per token."""
        return self.number(lambda sums: self.mean_nats(sums, key, seeds))

    def difference(self, key: str, other: str, seeds: Sequence[int]) -> Number:
        """Returns how many nats more a row has than another."""
        return self.number(lambda sums: self._difference(sums, key, other, seeds))

    def _difference(
        self, sums: np.ndarray, key: str, other: str, seeds: Sequence[int]
    ) -> np.ndarray:
        return self.mean_nats(sums, key, seeds) - self.mean_nats(sums, other, seeds)

    def corrected(self, family: Collection[Pair]) -> dict[Pair, Simultaneous]:
        """Returns intervals that hold for all pairs together, of those that have one each."""
        level = 1 - (1 - self.settings.confidence) / self.settings.tables
        known: dict[Pair, tuple[float, np.ndarray]] = {}
        for pair in family if self._sums.has_interval else ():
            value = float(self._difference(self._sums.total_M, *pair, self.seeds))
            drawn_R = self._difference(self._sums.drawn_RM, *pair, self.seeds)
            if np.isfinite(value) and np.isfinite(drawn_R).all():
                known[pair] = value, drawn_R
        if not known:
            return {}
        values, draws = zip(*known.values(), strict=True)
        found = simultaneous(np.array(values), np.stack(draws, axis=1), level)
        return dict(zip(known, found, strict=True))

    def share(self, key: str, reference: str, full: str, seeds: Sequence[int]) -> Number:
        """Returns the share of another row's gain that a row has; None where that has none."""

        def statistic(sums: np.ndarray) -> np.ndarray:
            base = self.mean_nats(sums, reference, seeds)
            gain = base - self.mean_nats(sums, full, seeds)
            found = (base - self.mean_nats(sums, key, seeds)) / gain
            return np.where(gain > 0, found, np.nan)

        return self.number(statistic)
