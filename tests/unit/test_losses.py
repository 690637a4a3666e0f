"""The chunked losses against the dense formulas, in value, gradient and memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlpmem_jax.models.interpolation import interpolate
from mlpmem_jax.training.chunked import chunked_loss
from mlpmem_jax.training.losses import lm_loss, means, memory_loss, token_logprob

BATCH, LENGTH, WIDTH, VOCAB, PADDED, KEPT = 3, 11, 16, 70, 128, 5


def make_arrays(seed=0):
    keys = iter(jax.random.split(jax.random.key(seed), 10))
    lead = (BATCH, LENGTH)
    prob = jax.random.uniform(next(keys), (*lead, KEPT))
    # The last two kept tokens of every other row are padding: id 0, probability 0.
    real = (jnp.arange(KEPT) < 3) | (jnp.arange(LENGTH)[:, None] % 2 == 0)
    ids = jax.random.permutation(next(keys), jnp.arange(1, VOCAB))[:KEPT]
    shift = jnp.arange(LENGTH)[None, :, None]
    return {
        "hidden": jax.random.normal(next(keys), (*lead, WIDTH)),
        "head": jax.random.normal(next(keys), (PADDED, WIDTH)),
        "label": jax.random.randint(next(keys), lead, 0, VOCAB),
        "weight": (jax.random.uniform(next(keys), lead) > 0.3) * 1.5,
        "target_id": jnp.where(real, (ids + shift) % VOCAB, 0).astype(jnp.uint16)
        * jnp.ones((BATCH, 1, 1), jnp.uint16),
        "target_prob": (prob * real * 0.3).astype(jnp.float16),
        "target_mass": (jax.random.uniform(next(keys), lead) > 0.2) * 0.9,
    }


def dense_logprob(hidden, head):
    return jax.nn.log_softmax(hidden @ head[:VOCAB].T)


def dense_lm(hidden, head, a):
    picked = jnp.take_along_axis(dense_logprob(hidden, head), a["label"][..., None], -1)[..., 0]
    return -(a["weight"] * picked).sum() / a["weight"].sum()


def dense_memory(hidden, head, a, alpha):
    logprob = dense_logprob(hidden, head)
    target = jnp.zeros((BATCH, LENGTH, VOCAB))
    index = (*jnp.indices(a["target_id"].shape)[:2], a["target_id"].astype(int))
    target = target.at[index].add(a["target_prob"].astype(jnp.float32))
    target = target / jnp.maximum(target.sum(-1, keepdims=True), 1e-9)
    kl = (jax.scipy.special.xlogy(target, target) - target * logprob).sum(-1)
    ce = -jnp.take_along_axis(logprob, a["label"][..., None], -1)[..., 0]
    alpha = jnp.where(a["target_mass"] > 0, alpha, 0.0)
    return (a["weight"] * (alpha * kl + (1 - alpha) * ce)).sum() / a["weight"].sum()


@pytest.mark.parametrize("chunk", [4, 7, 1000])
def test_lm_loss_equals_dense(chunk):
    a = make_arrays()

    def sparse(hidden, head):
        total, _ = lm_loss(
            hidden, head, a["label"], a["weight"], vocab_size=VOCAB, chunk_tokens=chunk
        )
        return total / a["weight"].sum()

    got, got_grads = jax.jit(jax.value_and_grad(sparse, (0, 1)))(a["hidden"], a["head"])
    value, grads = jax.value_and_grad(dense_lm, (0, 1))(a["hidden"], a["head"], a)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    np.testing.assert_allclose(sparse(a["hidden"], a["head"]), value, rtol=1e-5)
    for x, y in zip(got_grads, grads, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    np.testing.assert_array_equal(got_grads[1][VOCAB:], 0.0)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_memory_loss_equals_dense(alpha):
    a = make_arrays()

    def sparse(hidden, head):
        total, sums = memory_loss(hidden, head, a, alpha, vocab_size=VOCAB, chunk_tokens=8)
        return total / a["weight"].sum(), sums

    (got, sums), got_grads = jax.jit(jax.value_and_grad(sparse, (0, 1), has_aux=True))(
        a["hidden"], a["head"]
    )
    value, grads = jax.value_and_grad(dense_memory, (0, 1))(a["hidden"], a["head"], a, alpha)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    for x, y in zip(got_grads, grads, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
    np.testing.assert_allclose(means(sums)["loss"], value, rtol=1e-5)
    np.testing.assert_allclose(means(sums)["ce"], dense_memory(a["hidden"], a["head"], a, 0.0),
                               rtol=1e-5)  # fmt: skip
    assert float(sums["kl_sum"]) > 0


def test_kl_is_zero_at_the_target():
    """A memory that returns the target has KL 0, so its entropy is subtracted."""
    logit_V = jnp.linspace(-1, 1, VOCAB)
    head = jnp.zeros((PADDED, 1)).at[:VOCAB, 0].set(logit_V)
    prob = jax.nn.softmax(logit_V)[None, None]
    batch = {
        "label": jnp.zeros((1, 1), int), "weight": jnp.ones((1, 1)),
        "target_id": jnp.arange(VOCAB)[None, None], "target_prob": prob * 0.5,
        "target_mass": jnp.full((1, 1), 0.5),
    }  # fmt: skip
    _, sums = memory_loss(jnp.ones((1, 1, 1)), head, batch, 0.4, vocab_size=VOCAB, chunk_tokens=4)
    np.testing.assert_allclose(means(sums)["kl"], 0.0, atol=1e-5)
    assert float(means(sums)["agreement"]) == 1.0


def test_no_target_is_plain_cross_entropy():
    a = make_arrays()
    nothing = {name: jnp.zeros_like(a[name]) for name in ("target_prob", "target_mass")}

    def loss(hidden):
        batch = a | nothing
        total, sums = memory_loss(hidden, a["head"], batch, 0.4, vocab_size=VOCAB, chunk_tokens=8)
        return total / a["weight"].sum(), sums

    (value, sums), grad = jax.value_and_grad(loss, has_aux=True)(a["hidden"])
    np.testing.assert_allclose(value, dense_lm(a["hidden"], a["head"], a), rtol=1e-5)
    assert float(sums["target_weight_sum"]) == 0 and float(means(sums)["kl"]) == 0
    assert bool(jnp.all(jnp.isfinite(grad)))


def test_top_1_agreement():
    head = jnp.eye(PADDED)[:, :4]
    hidden = jnp.array([[[0, 9.0, 0, 0], [0, 0, 9.0, 0]]])
    ids, prob = jnp.array([[[3, 1], [3, 1]]]), jnp.array([[[0.2, 0.6], [0.2, 0.6]]])
    batch = {
        "label": jnp.zeros((1, 2), int), "weight": jnp.ones((1, 2)), "target_id": ids,
        "target_prob": prob, "target_mass": jnp.ones((1, 2)),
    }  # fmt: skip
    _, sums = memory_loss(hidden, head, batch, 0.4, vocab_size=VOCAB, chunk_tokens=4)
    assert float(means(sums)["agreement"]) == 0.5


def test_token_logprob_equals_dense():
    a = make_arrays()
    got = token_logprob(a["hidden"], a["head"], a["label"], vocab_size=VOCAB, chunk_tokens=7)
    expected = jnp.take_along_axis(
        dense_logprob(a["hidden"], a["head"]), a["label"][..., None], -1
    )[..., 0]
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_accumulation_is_exact():
    """Micro-batches divided by the whole batch's weight add up to the whole batch."""
    a = make_arrays()
    total = a["weight"].sum()

    def loss(hidden, part):
        return lm_loss(
            hidden[part], a["head"], a["label"][part], a["weight"][part],
            vocab_size=VOCAB, chunk_tokens=8,
        )[0] / total  # fmt: skip

    parts = [slice(0, 1), slice(1, 3)]
    value = sum(loss(a["hidden"], part) for part in parts)
    np.testing.assert_allclose(value, dense_lm(a["hidden"], a["head"], a), rtol=1e-5)
    grad = sum(jax.grad(loss)(a["hidden"], part) for part in parts)
    expected = jax.grad(dense_lm)(a["hidden"], a["head"], a)
    np.testing.assert_allclose(grad, expected, atol=1e-6)


def test_two_heads_and_a_gate():
    """The mechanism carries a joint loss: -log(λ p_MEM + (1-λ) p_LM) with λ = sigmoid(gate)."""
    a, b = make_arrays(), make_arrays(1)
    gate = jnp.linspace(-2, 2, BATCH * LENGTH).reshape(BATCH, LENGTH)

    def token_loss(stats, gate_C, data):
        memory, decoder = (s.logprob_CX()[:, 0] for s in stats)
        loss = -(data["weight"] * interpolate(memory, decoder, jax.nn.sigmoid(gate_C))).sum()
        return loss, {"loss_sum": loss}

    def sparse(hidden, heads, gate):
        return chunked_loss(
            token_loss, hidden, heads, (a["label"][..., None],) * 2, {"weight": a["weight"]}, gate,
            vocab_size=VOCAB, chunk_tokens=8,
        )[0]  # fmt: skip

    def dense(hidden, heads, gate):
        picked = [
            jnp.take_along_axis(dense_logprob(h, w), a["label"][..., None], -1)[..., 0]
            for h, w in zip(hidden, heads, strict=True)
        ]
        return -(a["weight"] * interpolate(*picked, jax.nn.sigmoid(gate))).sum()

    args = ((a["hidden"], b["hidden"]), (a["head"], b["head"]), gate)
    got, got_grads = jax.jit(jax.value_and_grad(sparse, (0, 1, 2)))(*args)
    value, grads = jax.jit(jax.value_and_grad(dense, (0, 1, 2)))(*args)
    np.testing.assert_allclose(got, value, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(got_grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5)


@pytest.mark.parametrize("differentiate", [False, True])
def test_more_tokens_add_hidden_sized_temporaries_only(differentiate):
    """Four times the tokens at the same chunk: at most 3 more hidden-sized buffers."""
    width, vocab, chunk, kept = 64, 8192, 256, 8

    def temporaries(tokens):
        def loss(hidden, head, label, weight, ids, prob, mass):
            names = ("label", "weight", "target_id", "target_prob", "target_mass")
            batch = dict(zip(names, (label, weight, ids, prob, mass), strict=True))
            return memory_loss(hidden, head, batch, 0.4, vocab_size=vocab, chunk_tokens=chunk)[0]

        f32, i32 = jnp.float32, jnp.int32
        shapes = [
            ((1, tokens, width), f32), ((vocab, width), f32), ((1, tokens), i32),
            ((1, tokens), f32), ((1, tokens, kept), i32), ((1, tokens, kept), f32),
            ((1, tokens), f32),
        ]  # fmt: skip
        args = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
        function = jax.value_and_grad(loss, (0, 1)) if differentiate else loss
        return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes

    few, many = temporaries(1024), temporaries(4096)
    hidden_bytes = 3072 * width * 4
    id_bytes = 3072 * (kept + 1) * 4
    assert many - few <= 3 * hidden_bytes + 2 * id_bytes
    assert many < 4096 * vocab * 4 / 3  # nowhere near [tokens, V]
