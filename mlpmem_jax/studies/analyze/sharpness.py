"""How sharp next-token distributions are, and how near to the retriever's.

Suffixes: C rows at once, V padded vocabulary, K neighbours, P masses, J numbers of tokens.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mlpmem_jax.retrieval.distributions import SparseDistributions


@dataclasses.dataclass(frozen=True)
class Sharpness:
    """Numbers of C distributions.

    Attributes:
        tokens_CP: int32, fewest tokens that hold each of the masses.
        mass_CJ: float32, mass of the so many most probable tokens.
        top_C: int32, the most probable token (the smaller id of equals).
        entropy_C: float32, nats.
        kl_C: float32, KL(kNN ‖ this) over all K neighbours; may be inf.
    """

    tokens_CP: np.ndarray
    mass_CJ: np.ndarray
    top_C: np.ndarray
    entropy_C: np.ndarray
    kl_C: np.ndarray


def steps_up_to(vocab_size: int) -> list[int]:
    """Returns numbers of tokens for curves: 1, 2, 3, 4, 6, 8, 12, … and the vocabulary."""
    steps = {vocab_size}
    power = 1
    while power < vocab_size:
        steps |= {power, min(vocab_size, power * 3 // 2)}
        power *= 2
    return sorted(steps)


def dense_sharpness(
    logprob_CV: jax.Array,
    knn_id_CK: jax.Array,
    knn_prob_CK: jax.Array,
    masses: Sequence[float],
    steps: Sequence[int],
) -> tuple[jax.Array, ...]:
    """Measures whole distributions on the device; the fields of :class:`Sharpness`.

    Args:
        logprob_CV: float32 log-probabilities, -inf for padding of the vocabulary.
        knn_id_CK: int32 tokens of the kNN distribution; unused places have probability 0.
        knn_prob_CK: float32 probabilities of these tokens; they sum to 1.
        masses: P masses.
        steps: J numbers of tokens.
    """
    prob_CV = jnp.exp(logprob_CV)
    sorted_CV = -jnp.sort(-prob_CV, axis=1)
    cumulated_CV = jnp.cumsum(sorted_CV, axis=1)
    below_PC = jnp.stack([(cumulated_CV < mass).sum(axis=1) for mass in masses])
    num_real = jnp.isfinite(logprob_CV).sum(axis=1)
    tokens_CP = jnp.minimum(below_PC.T + 1, num_real[:, None]).astype(jnp.int32)
    mass_CJ = cumulated_CV[:, np.asarray(steps) - 1]
    entropy_C = -jnp.where(prob_CV > 0, prob_CV * logprob_CV, 0.0).sum(axis=1)
    picked_CK = jnp.take_along_axis(logprob_CV, knn_id_CK, axis=1)
    ratio_CK = jnp.log(jnp.where(knn_prob_CK > 0, knn_prob_CK, 1.0)) - picked_CK
    kl_C = jnp.where(knn_prob_CK > 0, knn_prob_CK * ratio_CK, 0.0).sum(axis=1)
    top_C = jnp.argmax(logprob_CV, axis=1).astype(jnp.int32)
    return tokens_CP, mass_CJ, top_C, entropy_C, kl_C


def knn_sharpness(
    knn: SparseDistributions, masses: Sequence[float], steps: Sequence[int]
) -> Sharpness:
    """Measures kNN distributions, whose tokens are in order already.

    Args:
        knn: All tokens that the K neighbours name, the most probable first.
        masses: P masses.
        steps: J numbers of tokens.
    """
    prob_CK = knn.prob_QS.astype(np.float64)
    cumulated_CK = np.cumsum(prob_CK, axis=1)
    num_tokens_C = np.maximum(1, (prob_CK > 0).sum(axis=1))
    below_CP = np.stack([(cumulated_CK < mass).sum(axis=1) for mass in masses], axis=1)
    last = prob_CK.shape[1]
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy_C = -np.where(prob_CK > 0, prob_CK * np.log(prob_CK), 0.0).sum(axis=1)
    return Sharpness(
        tokens_CP=np.minimum(below_CP + 1, num_tokens_C[:, None]).astype(np.int32),
        mass_CJ=cumulated_CK[:, np.minimum(np.asarray(steps), last) - 1].astype(np.float32),
        top_C=knn.id_QS[:, 0],
        entropy_C=entropy_C.astype(np.float32),
        kl_C=np.zeros(len(prob_CK), np.float32),
    )


def concatenate(parts: Sequence[Sharpness]) -> Sharpness:
    """Joins consecutive rows."""
    names = [field.name for field in dataclasses.fields(Sharpness)]
    return Sharpness(
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    )
