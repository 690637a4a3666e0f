"""The temperature τ that serves the explicit kNN-LM best on validation.

An untuned τ can make a kNN-LM worse than its decoder; for each τ the best λ is exact
(:mod:`mlpmem_jax.evaluation.mixing`), so one dimension is left.
"""

import dataclasses
import math

import numpy as np
from scipy import optimize

from mlpmem_jax.evaluation import mixing
from mlpmem_jax.retrieval.distributions import LabelEvidence

# τ lies between these multiples of the typical spread of distances: below, the nearest
# neighbour takes all; above, all neighbours count the same.
_LOWEST = 1 / 64
_HIGHEST = 64.0
_LOG_TOLERANCE = 2e-3


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The kNN-LM that fits best.

    Attributes:
        temperature: τ.
        weight: λ, the weight of the neighbours against the decoder.
        nats: Mean −log p of the mixture.
        decoder_nats: Mean −log p of the decoder alone, on the same rows.
    """

    temperature: float
    weight: float
    nats: float
    decoder_nats: float


def tune(evidence: LabelEvidence, decoder_logprob_N: np.ndarray) -> Tuned:
    """Chooses τ and λ together.

    Args:
        evidence: Neighbours of the scored rows of validation.
        decoder_logprob_N: log p_LM(label) of the same rows.
    """
    assert len(evidence) == len(decoder_logprob_N) > 0
    decoder_nats = -float(np.mean(decoder_logprob_N, dtype=np.float64))
    scale = evidence.typical_spread
    if not scale > 0:  # All neighbours equally far: τ changes nothing.
        return fixed(evidence, decoder_logprob_N, 1.0)

    def nats(log_temperature: float) -> float:
        return fixed(evidence, decoder_logprob_N, math.exp(log_temperature)).nats

    found = optimize.minimize_scalar(
        nats,
        bounds=(math.log(scale * _LOWEST), math.log(scale * _HIGHEST)),
        method="bounded",
        options={"xatol": _LOG_TOLERANCE},
    )
    # Four digits: what is printed is what is used.
    temperature = float(f"{math.exp(found.x):.4g}")
    tuned = fixed(evidence, decoder_logprob_N, temperature)
    return dataclasses.replace(tuned, decoder_nats=decoder_nats)


def fixed(evidence: LabelEvidence, decoder_logprob_N: np.ndarray, temperature: float) -> Tuned:
    """Chooses λ for a given τ."""
    mixture = mixing.solve(evidence.logprob(temperature), decoder_logprob_N)
    decoder_nats = -float(np.mean(decoder_logprob_N, dtype=np.float64))
    return Tuned(temperature, mixture.weight, mixture.nats, decoder_nats)
