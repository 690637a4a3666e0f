"""The joint loss of decoder and memory (docs/design.md; the paper trains the parts apart).

    w_joint · (−log p(y)) + w_lm · (−log p_LM(y)) + w_mem · [α·KL + (1−α)·CE]

with p = λ·p_MEM + (1−λ)·p_LM. Both heads go through the vocabulary once, in the same chunks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mlpmem_jax.config.schema import LossWeights
from mlpmem_jax.models.interpolation import interpolate
from mlpmem_jax.training.chunked import Metrics, chunked_loss
from mlpmem_jax.training.losses import Stats, memory_terms, memory_token_loss


class JointTerms(NamedTuple):
    """How the terms are weighted.

    Attributes:
        weights: w_joint, w_lm, w_mem.
        alpha: Weight of KL in the memory's own loss.
        prior: λ that a gate is pulled to.
        prior_weight: Weight of that pull, KL(prior ‖ λ) of two Bernoulli distributions.
    """

    weights: LossWeights
    alpha: float
    prior: float = 0.5
    prior_weight: float = 0.0


class DecoderHead(NamedTuple):
    """The decoder's part, where it runs.

    Attributes:
        hidden_BLD: States after its final norm.
        head_VD: Its output head.
        weight_BL: Weight of each label in L_LM (the separator counts there, as in
            pretraining).
    """

    hidden_BLD: jax.Array
    head_VD: jax.Array
    weight_BL: jax.Array


def joint_loss(
    hidden_BLE: jax.Array,
    head_VE: jax.Array,
    decoder: DecoderHead | jax.Array,
    interpolation_BL: jax.Array,
    batch: dict[str, jax.Array],
    terms: JointTerms,
    *,
    vocab_size: int,
    chunk_tokens: int,
) -> tuple[jax.Array, Metrics]:
    """The three terms, and the pull of the gate.

    Args:
        hidden_BLE: The memory's states after its final norm.
        head_VE: Its output head, [padded V, E].
        decoder: The decoder's states and head; or logprob_BL, its stored log p(label), when
            it does not run (then w_lm must be 0).
        interpolation_BL: λ of each token, float32 in [0, 1]; gradients flow into it.
        batch: label, weight, target_id, target_prob, target_mass, as `memory_loss` reads.
        terms: How the terms are weighted.
        chunk_tokens: Tokens on a device whose logits exist at the same time.

    Returns:
        Summed loss in nats, and sums over scored tokens: those of `memory_loss`, `joint_sum`
        (−log p), `lm_sum` (−log p_LM) and `interpolation_sum` (λ).
    """
    id_BLX, data = memory_terms(batch)
    hidden, heads, ids = [hidden_BLE], [head_VE], [id_BLX]
    if isinstance(decoder, DecoderHead):
        hidden.append(decoder.hidden_BLD)
        heads.append(decoder.head_VD)
        ids.append(id_BLX[..., :1])
        data["lm_weight"] = decoder.weight_BL.astype(jnp.float32)
    else:
        assert terms.weights.lm == 0, "a decoder that does not run learns nothing"
        data["logprob"] = decoder.astype(jnp.float32)
    return chunked_loss(
        functools.partial(_token_loss, terms=terms),
        tuple(hidden),
        tuple(heads),
        tuple(ids),
        data,
        interpolation_BL.astype(jnp.float32),
        vocab_size=vocab_size,
        chunk_tokens=chunk_tokens,
    )


def _token_loss(
    stats: Stats, interpolation_C: jax.Array, data: Metrics, *, terms: JointTerms
) -> tuple[jax.Array, Metrics]:
    weight_C = data["weight"]
    memory, sums = memory_token_loss(stats, (), data, alpha=terms.alpha)
    memory_logprob_C = stats[0].logprob_CX()[:, 0]
    decoder_C = stats[1].logprob_CX()[:, 0] if len(stats) > 1 else data["logprob"]
    joint_C = -interpolate(memory_logprob_C, decoder_C, interpolation_C)
    joint = jnp.sum(weight_C * joint_C)
    loss = terms.weights.joint * joint + terms.weights.memory * memory
    if "lm_weight" in data:
        loss += terms.weights.lm * jnp.sum(data["lm_weight"] * -decoder_C)
    if terms.prior_weight:
        prior = jnp.sum(weight_C * _pull(terms.prior, interpolation_C))
        loss += terms.prior_weight * prior
        sums = sums | {"prior_sum": prior}
    return loss, sums | {
        "loss_sum": loss,
        "joint_sum": joint,
        "lm_sum": jnp.sum(weight_C * -decoder_C),
        "interpolation_sum": jnp.sum(weight_C * interpolation_C),
    }


def _pull(prior: float, interpolation_C: jax.Array) -> jax.Array:
    """Returns KL(prior ‖ λ), finite for every λ."""
    tiny = 1e-6
    inside_C = jnp.clip(interpolation_C, tiny, 1 - tiny)
    fixed = jax.scipy.special.xlogy(prior, prior) + jax.scipy.special.xlogy(1 - prior, 1 - prior)
    return fixed - prior * jnp.log(inside_C) - (1 - prior) * jnp.log1p(-inside_C)
