"""The losses: next-token cross-entropy, and the MLP Memory's α·KL + (1-α)·CE (Eq. 4-6).

None of them holds [tokens, V] for a batch: see `training/chunked.py`.
"""

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from mlpmem_jax.parallel.sharding import HeadLayout, current_mesh, head_layout
from mlpmem_jax.training.chunked import (
    HeadStats,
    Metrics,
    chunked_loss,
    from_chunks,
    head_stats,
    into_chunks,
)

Stats = tuple[HeadStats, ...]


def lm_loss(
    hidden_BLD: jax.Array,
    head_VD: jax.Array,
    label_BL: jax.Array,
    weight_BL: jax.Array,
    *,
    vocab_size: int,
    chunk_tokens: int,
) -> tuple[jax.Array, Metrics]:
    """Next-token cross-entropy.

    Args:
        hidden_BLD: States after the final norm.
        head_VD: Output head, [padded V, D].
        label_BL: int32 next tokens.
        weight_BL: Weight of each token; 0 leaves it out.
        chunk_tokens: Tokens on a device whose logits exist at the same time.

    Returns:
        Summed loss in nats, and sums over tokens: `loss_sum`, `weight_sum`, `correct_sum`.
    """
    data = {"weight": weight_BL.astype(jnp.float32)}
    return chunked_loss(
        _lm_token_loss,
        (hidden_BLD,),
        (head_VD,),
        (label_BL[..., None],),
        data,
        vocab_size=vocab_size,
        chunk_tokens=chunk_tokens,
    )


def memory_loss(
    hidden_BLE: jax.Array,
    head_VE: jax.Array,
    batch: Mapping[str, jax.Array],
    alpha: float,
    *,
    vocab_size: int,
    chunk_tokens: int,
) -> tuple[jax.Array, Metrics]:
    """α·KL(p_kNN ‖ p_MEM) + (1-α)·CE (paper, Eq. 4-6); CE alone where there is no target.

    Args:
        hidden_BLE: The memory's states after its final norm.
        head_VE: Its output head, [padded V, E].
        batch: `label` [B, L], int32 next tokens; `weight` [B, L], 0 leaves a token out;
            `target_id` [B, L, S], kept tokens of p_kNN, any integer dtype, padding is id 0;
            `target_prob` [B, L, S], their probabilities, padding is 0, renormalised here in
            float32; `target_mass` [B, L], the mass that was kept, 0 where there is no target.
        alpha: α, the weight of the KL term.
        chunk_tokens: Tokens on a device whose logits exist at the same time.

    Returns:
        Summed loss in nats, and sums over tokens: `loss_sum`, `weight_sum`, `ce_sum`; over
        tokens with a target: `kl_sum`, `agreement_sum` (the memory's most probable token is
        the retriever's), `target_weight_sum`.
    """
    id_BLX, data = memory_terms(batch)
    return chunked_loss(
        functools.partial(memory_token_loss, alpha=alpha),
        (hidden_BLE,),
        (head_VE,),
        (id_BLX,),
        data,
        vocab_size=vocab_size,
        chunk_tokens=chunk_tokens,
    )


def memory_terms(batch: Mapping[str, jax.Array]) -> tuple[jax.Array, Metrics]:
    """Returns the ids that a memory's loss looks up [B, L, 1 + S], the label first; and its data.

    Args:
        batch: As `memory_loss` reads it.
    """
    label_BL1 = batch["label"][..., None].astype(jnp.int32)
    id_BLX = jnp.concatenate([label_BL1, batch["target_id"].astype(jnp.int32)], axis=-1)
    weight_BL = batch["weight"].astype(jnp.float32)
    return id_BLX, {"weight": weight_BL, "prob": batch["target_prob"], "mass": batch["target_mass"]}


def means(metrics: Metrics) -> Metrics:
    """Turns the sums of the losses above into means over the tokens that they are about."""
    result = {}
    for name, value in metrics.items():
        base = name.removesuffix("_sum")
        if base in ("weight", "target_weight"):
            continue
        weight = "target_weight_sum" if base in ("kl", "agreement") else "weight_sum"
        result[base] = value / jnp.maximum(metrics[weight], 1e-9)
    return result


def token_logprob(
    hidden_BLD: jax.Array,
    head_VD: jax.Array,
    label_BL: jax.Array,
    *,
    vocab_size: int,
    chunk_tokens: int,
) -> jax.Array:
    """Returns log p(label) of each token, [B, L] float32; no gradient runs through it.

    Args:
        hidden_BLD: States after the final norm.
        head_VD: Output head, [padded V, D].
        label_BL: int32 next tokens.
        chunk_tokens: Tokens on a device whose logits exist at the same time.
    """

    def local(
        layout: HeadLayout | None, hidden: jax.Array, head: jax.Array, label: jax.Array
    ) -> jax.Array:
        head = head.astype(hidden.dtype)

        def of_chunk(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
            stats, _ = head_stats(vocab_size, layout, chunk[0], head, chunk[1][:, None])
            return stats.logprob_CX()[:, 0]

        chunks = into_chunks((hidden, label), label.ndim, chunk_tokens)
        return from_chunks(jax.lax.map(of_chunk, chunks), label.shape)

    hidden_BLD, head_VD = jax.lax.stop_gradient((hidden_BLD, head_VD))
    mesh = current_mesh()
    if mesh is None:
        return local(None, hidden_BLD, head_VD, label_BL)
    layout = head_layout(mesh, hidden_BLD.shape[0], head_VD.shape)
    return jax.shard_map(
        functools.partial(local, layout),
        in_specs=(layout.tokens, layout.head, layout.tokens),
        out_specs=layout.tokens,
        check_vma=False,
    )(hidden_BLD, head_VD, label_BL)


def _lm_token_loss(stats: Stats, _: object, data: Metrics) -> tuple[jax.Array, Metrics]:
    weight_C = data["weight"]
    logprob_C = stats[0].logprob_CX()[:, 0]
    correct_C = stats[0].logit_CX[:, 0] >= stats[0].highest_C
    loss = -jnp.sum(weight_C * logprob_C)
    return loss, {
        "loss_sum": loss,
        "weight_sum": jnp.sum(weight_C),
        "correct_sum": jnp.sum(weight_C * correct_C),
    }


def memory_token_loss(
    stats: Stats, _: object, data: Metrics, *, alpha: float
) -> tuple[jax.Array, Metrics]:
    """The loss of :func:`memory_loss`, summed over a chunk; the memory is the first head."""
    weight_C = data["weight"]
    prob_CS = data["prob"].astype(jnp.float32)
    total_C = jnp.sum(prob_CS, axis=1)
    has_target_C = (data["mass"] > 0) & (total_C > 0)
    prob_CS = prob_CS / jnp.where(has_target_C, total_C, 1.0)[:, None]
    logprob_CX = stats[0].logprob_CX()
    ce_C = -logprob_CX[:, 0]
    # p·log p is 0 at p = 0 (padding).
    entropy_C = -jnp.sum(jax.scipy.special.xlogy(prob_CS, prob_CS), axis=1)
    kl_C = -jnp.sum(prob_CS * logprob_CX[:, 1:], axis=1) - entropy_C
    alpha_C = jnp.where(has_target_C, alpha, 0.0)
    loss = jnp.sum(weight_C * (alpha_C * kl_C + (1 - alpha_C) * ce_C))
    top_C1 = jnp.argmax(prob_CS, axis=1)[:, None]
    top_logit_C = jnp.take_along_axis(stats[0].logit_CX[:, 1:], top_C1, axis=1)[:, 0]
    target_weight_C = jnp.where(has_target_C, weight_C, 0.0)
    return loss, {
        "loss_sum": loss,
        "weight_sum": jnp.sum(weight_C),
        "ce_sum": jnp.sum(weight_C * ce_C),
        "kl_sum": jnp.sum(target_weight_C * kl_C),
        "agreement_sum": jnp.sum(target_weight_C * (top_logit_C >= stats[0].highest_C)),
        "target_weight_sum": jnp.sum(target_weight_C),
    }
