"""Every two rows of a table: their difference, and whether it is significant."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlpmem_jax.evaluation.draws import DrawnSums, Pair
from mlpmem_jax.evaluation.systems import System
from mlpmem_jax.stats.bootstrap import Number, Simultaneous


def compared_pairs(
    systems: Sequence[System],
    rows: Sequence[Mapping[str, Any]],
    all_: DrawnSums,
    smaller: DrawnSums,
) -> list[dict[str, Any]]:
    """Returns the difference of every two rows, and whether it is significant.

    Args:
        rows: Their numbers.
        all_: Sums over all clusters.
        smaller: Over all but the largest.
    """
    pairs = [(other.key, one.key) for one, other in itertools.combinations(systems, 2)]
    choose_family = all_.settings.family
    family = pairs if choose_family is None else choose_family(rows)
    wanted = [pair for pair in pairs if pair in family]
    of_all, of_smaller = all_.corrected(wanted), smaller.corrected(wanted)
    return [
        {
            "row": pair[0],
            "against": pair[1],
            "compared": pair in family,
            **_pair(all_, pair, of_all.get(pair)),
            "without_largest": _pair(smaller, pair, of_smaller.get(pair)),
        }
        for pair in pairs
    ]


def _pair(sums: DrawnSums, pair: Pair, together: Simultaneous | None) -> dict[str, Any]:
    """Returns a difference and the verdict on it.

    It is significant where the interval of the mean over seeds excludes 0, alone and corrected
    for the number of pairs, and every seed has its sign.
    """
    mean = sums.difference(*pair, sums.seeds)
    each = [sums.difference(*pair, [seed]) for seed in sums.seeds]
    values = [number["value"] for number in each]
    signs = {None if value is None else float(np.sign(value)) for value in values}
    alone = _excludes_zero(mean) and signs in ({1.0}, {-1.0})
    return {
        **mean,
        "by_seed": {str(seed): n for seed, n in zip(sums.seeds, each, strict=True)},
        "spread": spread(values),
        "seeds_significant": sum(_excludes_zero(number) for number in each),
        "significant_alone": alone,
        "corrected_low": together and together.interval.low,
        "corrected_high": together and together.interval.high,
        "corrected_p": together and together.p_value,
        "significant": bool(alone and together and together.interval.excludes(0.0)),
    }


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


def _excludes_zero(number: Number) -> bool:
    return bool(number["low"] is not None and (number["low"] > 0 or number["high"] < 0))
