"""Losses over the vocabulary, chunk by chunk: the mechanism behind `training/losses.py`.

A loss of a token needs, of each output head, logsumexp and the logits at a few ids
(:class:`HeadStats`). Tokens go through in chunks; inside a chunk the logits are computed
once, give the loss *and* its gradients (into the states and the head), and are gone: three
matrix products in all where rematerialising needs four, and no [tokens, V] array for more
than a chunk. With a sharded vocabulary a device only ever sees its part of the logits.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mlpmem_jax.parallel.sharding import HeadLayout, current_mesh, head_layout

Metrics = dict[str, jax.Array]


class HeadStats(NamedTuple):
    """What losses read of one head's logits, float32, for the C tokens of a chunk.

    Attributes:
        logsumexp_C: Over the real vocabulary.
        logit_CX: Logits at the X ids that were asked for.
        highest_C: The largest logit.
    """

    logsumexp_C: jax.Array
    logit_CX: jax.Array
    highest_C: jax.Array

    def logprob_CX(self) -> jax.Array:
        """Returns log-probabilities of the ids."""
        return self.logit_CX - self.logsumexp_C[:, None]


# (stats of each head, differentiable extras, data) → (loss summed over the chunk, sums).
# What it gets of a token has a leading dim of C; data["weight"] is 0 where a token is padding.
TokenLoss = Callable[[tuple[HeadStats, ...], Any, Any], tuple[jax.Array, Metrics]]


class _Static(NamedTuple):
    token_loss: TokenLoss
    vocab_size: int
    chunk_tokens: int


class _Softmax(NamedTuple):
    """Unnormalised probabilities of a chunk, and their sum over the whole vocabulary."""

    weight_CV: jax.Array
    total_C: jax.Array


def chunked_loss(
    token_loss: TokenLoss,
    hidden: tuple[jax.Array, ...],
    heads: tuple[jax.Array, ...],
    ids: tuple[jax.Array, ...],
    data: dict[str, jax.Array],
    extra: Any = (),
    *,
    vocab_size: int,
    chunk_tokens: int,
) -> tuple[jax.Array, Metrics]:
    """Sums a loss over tokens.

    Args:
        token_loss: See :data:`TokenLoss`; how several heads are combined is its affair.
        hidden: Of each head, the states [B, L, D] that it reads. Differentiable.
        heads: Each [padded V, D]. Differentiable.
        ids: Of each head, the ids [B, L, X] whose logits are wanted.
        data: [B, L, ...] arrays, not differentiated; "weight" [B, L] among them.
        extra: Pytree of [B, L, ...] float arrays, differentiable (the logit of a gate).
        chunk_tokens: Tokens on a device whose logits exist at the same time.

    Returns:
        The summed loss (differentiable) and the summed metrics (not differentiable).
    """
    static = _Static(token_loss, vocab_size, chunk_tokens)
    return _summed(static, (hidden, heads, extra), (ids, data))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(static: _Static, inputs: Any, constants: Any) -> tuple[jax.Array, Metrics]:
    return _on_mesh(static, False, inputs, constants)[0]


def _summed_forward(static: _Static, inputs: Any, constants: Any) -> Any:
    return _on_mesh(static, True, inputs, constants)


def _summed_backward(static: _Static, gradients: Any, cotangents: Any) -> Any:
    scale, _ = cotangents
    return jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradients), None


_summed.defvjp(_summed_forward, _summed_backward)


def _on_mesh(static: _Static, differentiate: bool, inputs: Any, constants: Any) -> Any:
    """Returns ((loss, metrics), gradients of the inputs or None), each device doing its part."""
    hidden, heads, _ = inputs
    mesh = current_mesh()
    if mesh is None:
        return _local(static, differentiate, (None,) * len(heads), inputs, constants)
    layouts = tuple(head_layout(mesh, hidden[0].shape[0], head.shape) for head in heads)
    tokens = layouts[0].tokens
    gradients = (tokens, tuple(each.gradient for each in layouts), tokens)
    return jax.shard_map(
        functools.partial(_local, static, differentiate, layouts),
        in_specs=((tokens, tuple(each.head for each in layouts), tokens), tokens),
        out_specs=(jax.sharding.PartitionSpec(), gradients if differentiate else None),
        check_vma=False,
    )(inputs, constants)


def _local(
    static: _Static,
    differentiate: bool,
    layouts: tuple[HeadLayout | None, ...],
    inputs: Any,
    constants: Any,
) -> Any:
    """One device's tokens and part of the vocabulary, then sums over devices."""
    hidden, heads, extra = inputs
    weights = tuple(head.astype(h.dtype) for head, h in zip(heads, hidden, strict=True))
    lead = constants[1]["weight"].shape
    chunks = into_chunks((hidden, extra, *constants), len(lead), static.chunk_tokens)

    def stats_of(chunk: Any) -> list[tuple[HeadStats, _Softmax]]:
        return [
            head_stats(static.vocab_size, *each)
            for each in zip(layouts, chunk[0], weights, chunk[2], strict=True)
        ]

    def forward(chunk: Any) -> tuple[jax.Array, Metrics]:
        stats = tuple(stats for stats, _ in stats_of(chunk))
        return static.token_loss(stats, chunk[1], chunk[3])

    def step_forward(sums: Any, chunk: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, forward(chunk)), None

    def step_both(carry: Any, chunk: Any) -> tuple[Any, Any]:
        sums, d_heads = carry
        hidden, extra, ids, data = chunk
        results = stats_of(chunk)
        value_and_gradient = jax.value_and_grad(static.token_loss, argnums=(0, 1), has_aux=True)
        new_sums, (d_stats, d_extra) = value_and_gradient(
            tuple(stats for stats, _ in results), extra, data
        )
        d_logits = [
            _logit_gradient(layout, softmax, id_CX, d, h.dtype)
            for layout, (_, softmax), id_CX, d, h in zip(
                layouts, results, ids, d_stats, hidden, strict=True
            )
        ]
        d_hidden = tuple(
            _dot(d, weight, 1, 0).astype(weight.dtype)
            for d, weight in zip(d_logits, weights, strict=True)
        )
        d_heads = tuple(
            old + _dot(d, h, 0, 0) for old, d, h in zip(d_heads, d_logits, hidden, strict=True)
        )
        return (jax.tree.map(jnp.add, sums, new_sums), d_heads), (d_hidden, d_extra)

    abstract = jax.eval_shape(forward, jax.tree.map(lambda x: x[0], chunks))
    sums = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
    if not differentiate:
        sums, _ = jax.lax.scan(step_forward, sums, chunks)
        return _sum_over_tokens(sums, layouts[0]), None
    d_heads = tuple(jnp.zeros(head.shape, jnp.float32) for head in heads)
    (sums, d_heads), (d_hidden, d_extra) = jax.lax.scan(step_both, (sums, d_heads), chunks)
    d_hidden = tuple(
        _sum_over_vocab(from_chunks(d, lead), layout)
        for d, layout in zip(d_hidden, layouts, strict=True)
    )
    d_extra = jax.tree.map(lambda d: from_chunks(d, lead), d_extra)
    d_heads = tuple(
        _scatter_over_tokens(d, layout).astype(head.dtype)
        for d, layout, head in zip(d_heads, layouts, heads, strict=True)
    )
    return _sum_over_tokens(sums, layouts[0]), (d_hidden, d_heads, d_extra)


def into_chunks(tree: Any, num_lead: int, chunk_tokens: int) -> Any:
    """Turns [B, L, ...] arrays into [chunks, C, ...], padded with zeros where necessary."""

    def cut(array: jax.Array) -> jax.Array:
        flat = array.reshape(-1, *array.shape[num_lead:])
        num_chunks = max(1, -(-flat.shape[0] // chunk_tokens))
        size = -(-flat.shape[0] // num_chunks)
        missing = num_chunks * size - flat.shape[0]
        if missing:
            flat = jnp.pad(flat, [(0, missing)] + [(0, 0)] * (flat.ndim - 1))
        return flat.reshape(num_chunks, size, *flat.shape[1:])

    return jax.tree.map(cut, tree)


def from_chunks(array: jax.Array, lead: tuple[int, ...]) -> jax.Array:
    """Undoes :func:`into_chunks`."""
    flat = array.reshape(-1, *array.shape[2:])
    return flat[: functools.reduce(lambda a, b: a * b, lead, 1)].reshape(*lead, *array.shape[2:])


def head_stats(
    vocab_size: int,
    layout: HeadLayout | None,
    hidden_CD: jax.Array,
    head_VD: jax.Array,
    id_CX: jax.Array,
) -> tuple[HeadStats, _Softmax]:
    """Returns what the losses need of the logits hidden · headᵀ.

    Args:
        vocab_size: Real entries of the vocabulary; the others take no part.
        layout: How the head is cut; None: it is whole.
        hidden_CD: States of a chunk.
        head_VD: This device's part of the head, same dtype.
        id_CX: Ids (of the whole vocabulary) whose logits are wanted.
    """
    axis = layout.vocab_axis if layout else None
    logit_CV = _dot(hidden_CD, head_VD, 1, 1)
    local_id_CX, inside_CX, first = _local_ids(id_CX, logit_CV.shape[1], axis)
    if axis is not None or vocab_size < logit_CV.shape[1]:
        real_V = jnp.arange(logit_CV.shape[1]) < vocab_size - first
        logit_CV = jnp.where(real_V, logit_CV, -jnp.inf)
    picked_CX = jnp.take_along_axis(logit_CV, local_id_CX, axis=1, mode="clip")
    highest_C = jnp.max(logit_CV, axis=1)
    if axis is not None:
        highest_C = jax.lax.pmax(highest_C, axis)
        picked_CX = jax.lax.psum(jnp.where(inside_CX, picked_CX, 0.0), axis)
    weight_CV = jnp.exp(logit_CV - highest_C[:, None])
    total_C = jnp.sum(weight_CV, axis=1)
    if axis is not None:
        total_C = jax.lax.psum(total_C, axis)
    stats = HeadStats(highest_C + jnp.log(total_C), picked_CX, highest_C)
    return stats, _Softmax(weight_CV, total_C)


def _logit_gradient(
    layout: HeadLayout | None,
    softmax: _Softmax,
    id_CX: jax.Array,
    d_stats: HeadStats,
    dtype: jnp.dtype,
) -> jax.Array:
    """Returns d loss / d logits of a chunk: through logsumexp (softmax) and the picked ids."""
    num_tokens, width = softmax.weight_CV.shape
    local_id_CX, inside_CX, _ = _local_ids(id_CX, width, layout.vocab_axis if layout else None)
    scale_C1 = (d_stats.logsumexp_C / softmax.total_C)[:, None]
    d_logit_CV = softmax.weight_CV * scale_C1
    if id_CX.shape[1] == 1:
        # One id a token fuses into the product above; a scatter would be another pass.
        hit_CV = (jnp.arange(width) == local_id_CX) & inside_CX
        return jnp.where(hit_CV, d_logit_CV + d_stats.logit_CX, d_logit_CV).astype(dtype)
    row_C1 = jnp.arange(num_tokens)[:, None]
    column_CX = jnp.where(inside_CX, local_id_CX, width)
    return d_logit_CV.at[row_C1, column_CX].add(d_stats.logit_CX, mode="drop").astype(dtype)


def _local_ids(id_CX: jax.Array, width: int, axis: str | None) -> tuple[Any, Any, Any]:
    """Returns ids counted from this device's first column, whether they lie on it, and it."""
    first = 0 if axis is None else jax.lax.axis_index(axis) * width
    local_CX = id_CX.astype(jnp.int32) - first
    return local_CX, (local_CX >= 0) & (local_CX < width), first


def _dot(a: jax.Array, b: jax.Array, a_dim: int, b_dim: int) -> jax.Array:
    """Contracts one dim of each of two matrices, accumulating in float32."""
    dims = (((a_dim,), (b_dim,)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _sum_over_tokens(tree: Any, layout: HeadLayout | None) -> Any:
    return jax.lax.psum(tree, layout.token_axes) if layout and layout.token_axes else tree


def _sum_over_vocab(array: jax.Array, layout: HeadLayout | None) -> jax.Array:
    return jax.lax.psum(array, layout.vocab_axis) if layout and layout.vocab_axis else array


def _scatter_over_tokens(gradient_VD: jax.Array, layout: HeadLayout | None) -> jax.Array:
    """Sums a head's gradient over devices, once, leaving each the part that it keeps."""
    if layout is None or not layout.token_axes:
        return gradient_VD
    rest = tuple(axis for axis in layout.token_axes if axis != layout.scatter_axis)
    if layout.scatter_axis is not None:
        gradient_VD = jax.lax.psum_scatter(
            gradient_VD, layout.scatter_axis, scatter_dimension=1, tiled=True
        )
    return jax.lax.psum(gradient_VD, rest)
