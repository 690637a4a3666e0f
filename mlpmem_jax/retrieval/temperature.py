"""The temperature τ that serves the explicit kNN-LM best on validation.

An untuned τ can make a kNN-LM worse than its decoder; for each τ the best λ is exact
(:mod:`mlpmem_jax.stats.mixing`), so one dimension is left.
"""

import dataclasses
import math

import numpy as np
from scipy import optimize

from mlpmem_jax.retrieval.distributions import LabelEvidence
from mlpmem_jax.stats import mixing

# τ lies between these multiples of the typical spread of distances: below, the nearest
# neighbour takes all; above, all neighbours count the same.
_LOWEST = 1 / 64
_HIGHEST = 64.0
_LOG_TOLERANCE = 2e-3
# A coarse grid over the whole range, a factor of 4 apart, finds a second minimum.
_GRID_POINTS = 7
# Lower by less than this many nats is not another minimum.
_SAME_NATS = 1e-6


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The kNN-LM that fits best.

    Attributes:
        temperature: τ.
        weight: λ, the weight of the neighbours against the decoder.
        nats: Mean −log p of the mixture.
        decoder_nats: Mean −log p of the decoder alone, on the same rows.
        at_bound: Which end of its range τ reached, "lower" or "upper"; None: neither, or τ was
            given.
    """

    temperature: float
    weight: float
    nats: float
    decoder_nats: float
    at_bound: str | None = None

    @property
    def notes(self) -> list[str]:
        """What is to be said of the choice: τ at an end of its range, λ at 0 or 1."""
        return [*temperature_notes(self.temperature, self.at_bound), *weight_notes(self.weight)]


def temperature_notes(temperature: float, at_bound: str | None) -> list[str]:
    """Returns the warning that τ reached an end of its range, if it did."""
    if at_bound is None:
        return []
    effect = {
        "lower": "only the nearest neighbours matter",
        "upper": "all neighbours have almost equal weight",
    }[at_bound]
    return [
        f"warning: τ = {temperature:g} is at the {at_bound} bound of the values tried: {effect}, "
        "and the best τ may lie beyond"
    ]


def weight_notes(weight: float, system: str = "knn") -> list[str]:
    """Returns the warning that a λ chosen on validation is 0 or 1, if it is."""
    name = {"knn": "kNN-LM"}.get(system, system)
    effect = {
        0.0: f"the {name} does not improve on the decoder there",
        1.0: "the decoder does not improve on it there",
    }
    if weight not in effect:
        return []
    return [f"warning: λ of the {name} is {weight:g} on validation: {effect[weight]}"]


def tune(evidence: LabelEvidence, decoder_logprob_N: np.ndarray) -> Tuned:
    """Chooses τ and λ together.

    Brent's search assumes a single minimum; where a point of a coarse grid is lower than what
    it found, it is repeated around that point.

    Args:
        evidence: Neighbours of the scored rows of validation.
        decoder_logprob_N: log p_LM(label) of the same rows.
    """
    assert len(evidence) == len(decoder_logprob_N) > 0
    scale = evidence.typical_spread
    if not scale > 0:  # All neighbours equally far: τ has no effect.
        return fixed(evidence, decoder_logprob_N, 1.0)

    def nats(log_temperature: float) -> float:
        return fixed(evidence, decoder_logprob_N, math.exp(log_temperature)).nats

    def search(low: float, high: float) -> tuple[float, float]:
        found = optimize.minimize_scalar(
            nats, bounds=(low, high), method="bounded", options={"xatol": _LOG_TOLERANCE}
        )
        return float(found.fun), float(found.x)

    grid = np.linspace(math.log(scale * _LOWEST), math.log(scale * _HIGHEST), _GRID_POINTS)
    low, high = float(grid[0]), float(grid[-1])
    best = search(low, high)
    lowest, place = min((nats(point), place) for place, point in enumerate(grid.tolist()))
    if lowest < best[0] - _SAME_NATS:
        around = grid[max(0, place - 1)], grid[min(len(grid) - 1, place + 1)]
        best = min(best, (lowest, float(grid[place])), search(*map(float, around)))
    ends = {"lower": best[1] - low, "upper": high - best[1]}
    reached = [name for name, distance in ends.items() if distance < 2 * _LOG_TOLERANCE]
    # Four digits: what is printed is what is used.
    temperature = float(f"{math.exp(best[1]):.4g}")
    tuned = fixed(evidence, decoder_logprob_N, temperature)
    return dataclasses.replace(tuned, at_bound=reached[0] if reached else None)


def fixed(evidence: LabelEvidence, decoder_logprob_N: np.ndarray, temperature: float) -> Tuned:
    """Chooses λ for a given τ."""
    mixture = mixing.solve(evidence.logprob(temperature), decoder_logprob_N)
    decoder_nats = -float(np.mean(decoder_logprob_N, dtype=np.float64))
    return Tuned(temperature, mixture.weight, mixture.nats, decoder_nats)
