"""Sums of every row and seed over drawn clusters, λ chosen anew in each draw.

Suffixes: D documents, N scored rows, C clusters, R draws, M summed columns.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np

from mlpmem_jax.evaluation.metrics import DocumentCounts
from mlpmem_jax.evaluation.systems import SeedScores, SplitParts, System
from mlpmem_jax.stats.bootstrap import (
    Draws,
    Number,
    PairedSums,
    Simultaneous,
    simultaneous,
)
from mlpmem_jax.stats.nested import choose, sum_nats

Pair = tuple[str, str]
# Rows, with their numbers, to the pairs (row, against) that verdicts are given on.
Family = Callable[[Sequence[Mapping[str, Any]]], Collection[Pair]]
# Of each seed and row.
BySeed = Mapping[int, Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How intervals are made.

    Attributes:
        bootstrap_samples: Draws of clusters.
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


def drawn_nats(
    valid: SplitParts, test: SplitParts, system: System, settings: Settings
) -> np.ndarray:
    """Returns the nats of a system over the test clusters of each draw, float64 [R]."""
    draws = draws_of(valid.counts.num_clusters, settings, "valid")
    weight_RM = choose(valid.scored(system), valid.counts_of(system).scored_cluster_N, draws)
    draws = draws_of(test.counts.num_clusters, settings, "test")
    return sum_nats(test.scored(system), test.counts_of(system).scored_cluster_N, weight_RM, draws)


@dataclasses.dataclass(frozen=True)
class Choices:
    """Rows of every seed, with the weights that validation chooses.

    Attributes:
        systems: The rows, in order; the reference among them.
        seeds: Scores of every row's parts, by seed.
        settings: How intervals are made.
    """

    systems: Sequence[System]
    seeds: Mapping[int, SeedScores]
    settings: Settings

    @functools.cached_property
    def counts(self) -> dict[str, DocumentCounts]:
        """Documents and scored rows of both splits, the same for all seeds."""
        first = next(iter(self.seeds.values()))
        return {split: first.of(split).counts for split in ("valid", "test")}

    @functools.cached_property
    def weights(self) -> BySeed:
        """Weights of a row's parts, [M]."""
        return self._each(lambda seed, system: self.seeds[seed].valid.tuned_weights(system))

    @functools.cached_property
    def drawn_weights(self) -> BySeed:
        """Weights of a row's parts in each draw, [R, M]."""
        draws = draws_of(self.counts["valid"].num_clusters, self.settings, "valid")

        def chosen(seed: int, system: System) -> np.ndarray:
            valid = self.seeds[seed].valid
            return choose(valid.scored(system), valid.counts_of(system).scored_cluster_N, draws)

        return self._each(chosen)

    @functools.cached_property
    def nats(self) -> dict[str, BySeed]:
        """Of both splits, nats of each row by document at its weights, float64 [D]."""

        def nats(split: str, seed: int, system: System) -> np.ndarray:
            weight_M = self.weights[seed][system.key]
            return self.seeds[seed].of(split).nats_by_document(system, weight_M)

        return {split: self._each(functools.partial(nats, split)) for split in self.counts}

    def _each(self, value: Callable[[int, System], np.ndarray]) -> BySeed:
        return {seed: {s.key: value(seed, s) for s in self.systems} for seed in self.seeds}


class DrawnSums:
    """Sums of every row and seed over drawn clusters.

    Args:
        split: valid or test.
        without_largest: The cluster with most tokens is left out, if there is another: shows
            what does not depend on it.
        bounded: Whether there are intervals; without them nothing is drawn.
    """

    def __init__(
        self, choices: Choices, split: str, *, without_largest: bool = False, bounded: bool = True
    ):
        self.seeds = list(choices.seeds)
        self.settings = choices.settings
        self._counts = counts = choices.counts[split]
        self._kept_C = np.ones(counts.num_clusters, bool)
        if without_largest and counts.num_clusters > 1:
            self._kept_C[np.argmax(counts.tokens_C)] = False
        nats, keys = choices.nats[split], [system.key for system in choices.systems]
        columns = [(seed, key) for seed in self.seeds for key in keys]
        self._place = {column: place for place, column in enumerate(columns)}
        values_M = [counts.by_cluster(nats[seed][key]) for seed, key in columns]
        total_M = np.array([each_C[self._kept_C].sum() for each_C in (*values_M, counts.tokens_C)])
        has_interval = bounded and int(self._kept_C.sum()) > 1
        drawn_RM = self._drawn(choices, split) if has_interval else np.empty((0, len(total_M)))
        self._sums = PairedSums(total_M, drawn_RM, self.settings.confidence, has_interval)

    def _drawn(self, choices: Choices, split: str) -> np.ndarray:
        """Returns the sums of each draw, float64 [R, M], tokens last."""
        kept_C = self._kept_C
        draws = draws_of(int(kept_C.sum()), self.settings, split)
        place_C = np.cumsum(kept_C) - 1

        def drawn(parts: SplitParts, system: System, weight_RM: np.ndarray) -> np.ndarray:
            cluster_N = parts.counts_of(system).scored_cluster_N
            row_N = kept_C[cluster_N]
            logprob_MN = parts.scored(system)[:, row_N]
            return sum_nats(logprob_MN, place_C[cluster_N[row_N]], weight_RM, draws)

        columns = [
            drawn(one.of(split), system, choices.drawn_weights[seed][system.key])
            for seed, one in choices.seeds.items()
            for system in choices.systems
        ]
        return np.stack([*columns, draws.sums(self._counts.tokens_C[kept_C, None])[:, 0]], axis=1)

    def mean_nats(self, sums: np.ndarray, key: str, seeds: Sequence[int]) -> np.ndarray:
        """Returns nats per token of a row, the mean over seeds, for sums [..., M]."""
        places = [self._place[seed, key] for seed in seeds]
        return np.asarray(sums[..., places].mean(axis=-1) / sums[..., -1])

    def nats(self, key: str, seeds: Sequence[int]) -> Number:
        """Returns nats per token."""
        return self._sums.number(lambda sums: self.mean_nats(sums, key, seeds))

    def difference(self, key: str, other: str, seeds: Sequence[int]) -> Number:
        """Returns how many nats more a row has than another."""
        return self._sums.number(lambda sums: self._difference(sums, key, other, seeds))

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
            gain = self._difference(sums, reference, full, seeds)
            found = self._difference(sums, reference, key, seeds) / gain
            return np.where(gain > 0, found, np.nan)

        # Its own share is 1 by definition.
        return self._sums.number(statistic, bounded=key != full)

    def draws_without_gain(self, reference: str, full: str) -> int:
        """Returns in how many draws a row gains nothing, so that a share of it is undefined."""
        with np.errstate(invalid="ignore"):
            gain_R = self._difference(self._sums.drawn_RM, reference, full, self.seeds)
        # Not the opposite of a gain: a label without probability leaves no number.
        return int(np.count_nonzero(~(gain_R > 0)))
