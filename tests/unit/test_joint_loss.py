"""The joint loss against its dense formula, in value and in every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlpmem_jax.config.networks import DecoderConfig, MemoryConfig
from mlpmem_jax.config.schema import LossWeights
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.models.joint import Joint, scale_gradient
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.tasks import joint_task
from mlpmem_jax.roofline.blank import abstract_batch
from mlpmem_jax.training.joint_loss import DecoderHead, JointTerms, joint_loss
from mlpmem_jax.training.losses import means

BATCH, LENGTH, WIDTH, VOCAB, PADDED, KEPT = 3, 7, 16, 70, 128, 5
TERMS = JointTerms(LossWeights(0.7, 1.3, 0.6), 0.4, prior=0.3, prior_weight=0.2)


def make_arrays():
    keys = iter(jax.random.split(jax.random.key(1), 12))
    lead = (BATCH, LENGTH)
    weight = (jax.random.uniform(next(keys), lead) > 0.3) * 1.0
    batch = {
        "label": jax.random.randint(next(keys), lead, 0, VOCAB),
        "weight": weight,
        "lm_weight": jnp.maximum(weight, (jax.random.uniform(next(keys), lead) > 0.5) * 1.0),
        "target_id": jax.random.randint(next(keys), (*lead, KEPT), 0, VOCAB),
        "target_prob": jax.random.uniform(next(keys), (*lead, KEPT)),
        "target_mass": (jax.random.uniform(next(keys), lead) > 0.2) * 0.9,
    }
    inputs = {
        "memory": jax.random.normal(next(keys), (*lead, WIDTH)),
        "memory_head": jax.random.normal(next(keys), (PADDED, WIDTH)),
        "decoder": jax.random.normal(next(keys), (*lead, 8)),
        "decoder_head": jax.random.normal(next(keys), (PADDED, 8)),
        "gate": jax.random.normal(next(keys), lead),
    }
    return inputs, batch


def picked(logprob, batch):
    return jnp.take_along_axis(logprob, batch["label"][..., None], -1)[..., 0]


def dense(inputs, batch, terms):
    """The formula of docs/design.md, with every distribution whole."""
    memory = jax.nn.log_softmax(inputs["memory"] @ inputs["memory_head"][:VOCAB].T)
    decoder = jax.nn.log_softmax(inputs["decoder"] @ inputs["decoder_head"][:VOCAB].T)
    share = jax.nn.sigmoid(inputs["gate"])
    mixed = share[..., None] * jnp.exp(memory) + (1 - share[..., None]) * jnp.exp(decoder)
    target = jnp.zeros((BATCH, LENGTH, VOCAB))
    index = (*jnp.indices(batch["target_id"].shape)[:2], batch["target_id"])
    target = target.at[index].add(batch["target_prob"])
    target = target / target.sum(-1, keepdims=True)
    # Ids may repeat here: the entropy is that of the list, as the loss sees it.
    listed = batch["target_prob"] / batch["target_prob"].sum(-1, keepdims=True)
    kl = (listed * jnp.log(listed)).sum(-1) - (target * memory).sum(-1)
    alpha = jnp.where(batch["target_mass"] > 0, terms.alpha, 0.0)
    own = alpha * kl - (1 - alpha) * picked(memory, batch)
    prior = terms.prior
    pull = prior * jnp.log(prior / share) + (1 - prior) * jnp.log((1 - prior) / (1 - share))
    weight, weights = batch["weight"], terms.weights
    total = (weight * -jnp.log(picked(mixed, batch))).sum() * weights.joint
    total += (batch["lm_weight"] * -picked(decoder, batch)).sum() * weights.lm
    total += (weight * own).sum() * weights.memory
    total += (weight * pull).sum() * terms.prior_weight
    return total / weight.sum()


def sparse(inputs, batch, terms, chunk):
    head = DecoderHead(inputs["decoder"], inputs["decoder_head"], batch["lm_weight"])
    total, sums = joint_loss(
        inputs["memory"], inputs["memory_head"], head, jax.nn.sigmoid(inputs["gate"]), batch,
        terms, vocab_size=VOCAB, chunk_tokens=chunk,
    )  # fmt: skip
    return total / batch["weight"].sum(), sums


@pytest.mark.parametrize("chunk", [4, 1000])
def test_value_and_gradients_equal_dense(chunk):
    inputs, batch = make_arrays()
    # Compiled whole: each operation apart takes longer.
    expected, expected_gradient = jax.jit(jax.value_and_grad(lambda x: dense(x, batch, TERMS)))(
        inputs
    )
    (loss, _), gradient = jax.jit(
        jax.value_and_grad(lambda x: sparse(x, batch, TERMS, chunk), has_aux=True)
    )(inputs)
    assert loss == pytest.approx(float(expected), rel=1e-5)
    assert set(gradient) == {"memory", "memory_head", "decoder", "decoder_head", "gate"}
    for name, value in expected_gradient.items():
        assert float(jnp.abs(value).max()) > 1e-3, name
        np.testing.assert_allclose(gradient[name], value, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("weights", [(1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_each_term_moves_only_what_it_is_about(weights):
    inputs, batch = make_arrays()
    terms = JointTerms(LossWeights(*map(float, weights)), 0.4)
    gradient = jax.grad(lambda x: sparse(x, batch, terms, 4)[0])(inputs)
    moved = {name for name, value in gradient.items() if float(jnp.abs(value).max()) > 0}
    memory, decoder = {"memory", "memory_head"}, {"decoder", "decoder_head"}
    assert moved == [memory | decoder | {"gate"}, decoder, memory][weights.index(1)]


def test_a_stored_logprob_stands_for_the_decoder():
    inputs, batch = make_arrays()
    terms = JointTerms(LossWeights(0.7, 0.0, 0.6), 0.4)
    decoder = jax.nn.log_softmax(inputs["decoder"] @ inputs["decoder_head"][:VOCAB].T)
    stored, sums = joint_loss(
        inputs["memory"], inputs["memory_head"], picked(decoder, batch),
        jax.nn.sigmoid(inputs["gate"]), batch, terms, vocab_size=VOCAB, chunk_tokens=4,
    )  # fmt: skip
    running, expected = sparse(inputs, batch, terms, 4)
    mean = float(stored / batch["weight"].sum())
    assert mean == pytest.approx(float(running), rel=1e-6)
    assert {k: float(v) for k, v in means(sums).items()} == pytest.approx(
        {k: float(v) for k, v in means(expected).items()}, rel=1e-5
    )


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_the_ends_of_interpolation_are_finite(value):
    inputs, batch = make_arrays()

    def loss(inputs):
        head = DecoderHead(inputs["decoder"], inputs["decoder_head"], batch["lm_weight"])
        fixed = jnp.full((BATCH, LENGTH), value)
        return joint_loss(
            inputs["memory"] * 100, inputs["memory_head"], head, fixed, batch,
            TERMS, vocab_size=VOCAB, chunk_tokens=4,
        )[0]  # fmt: skip

    result, gradient = jax.value_and_grad(loss)(inputs)
    assert np.isfinite(result)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.parametrize(("start", "floor"), [(0.3, 0.0), (0.5, 0.1), (0.9, 0.05)])
@pytest.mark.parametrize("norm", ["none", "rms", "standardize"])
def test_the_gate_begins_at_the_fixed_value(start, floor, norm):
    config = MemoryConfig(width=8, num_layers=1, gate="learned", gate_floor=floor, input_norm=norm)
    memory = Memory(config, 16, 40, gate_start=start, rngs=nnx.Rngs(0))
    states = jax.random.normal(jax.random.key(0), (2, 5, 16)) * 10
    np.testing.assert_allclose(memory.interpolation(states), start, rtol=1e-5)
    memory.gate[...] = jnp.full((16,), 100.0)
    moved = np.asarray(memory.interpolation(states))
    assert moved.min() >= floor - 1e-6
    assert moved.max() <= 1 - floor + 1e-6
    assert moved.max() - moved.min() > 0.5


@pytest.mark.parametrize("factor", [0.0, 0.25, 1.0])
def test_the_gradient_into_the_decoder_is_scaled(factor):
    x = jnp.arange(4.0)
    value, gradient = jax.value_and_grad(lambda x: jnp.sum(scale_gradient(x, factor) ** 2))(x)
    assert float(value) == 14.0
    np.testing.assert_allclose(gradient, factor * 2 * x)


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_without_gradient_the_memory_does_not_move_the_decoder(make_config, head):
    overrides = ("train.decoder_gradient=0", "train.lm_weight=0", f"memory.head={head}")
    warmup = "train.decoder_optimizer.warmup_steps=2"
    config = make_config("train.mode=joint", warmup, *overrides, "train.joint_weight=0")
    mesh = single_device_mesh()
    task = joint_task(Artifacts(config), mesh, blank=True)
    network = nnx.jit(lambda: task.build(nnx.Rngs(0)))()
    key = jax.random.key(0)
    shapes = abstract_batch(task.source, config.train.batch_size, mesh)
    batch = {
        name: jax.random.randint(key, one.shape, 0, 2).astype(one.dtype)
        if jnp.issubdtype(one.dtype, jnp.integer)
        else jnp.full(one.shape, 0.5, one.dtype)
        for name, one in shapes.items()
    }
    with jax.set_mesh(mesh):
        gradient = nnx.grad(lambda net: task.loss(net, task.frozen, batch, jnp.int32(0)).total)
        grads = nnx.jit(gradient)(network)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(nnx.state(grads["decoder"])))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(nnx.state(grads["memory"])))


def test_a_joint_network_begins_as_its_parts_do():
    config = DecoderConfig(width=16, num_layers=1, num_heads=2, context_tokens=8)

    def decoder(rngs):
        return Decoder(config, 40, rngs=rngs)

    def memory(rngs):
        return Memory(MemoryConfig(width=8, num_layers=1), 16, 40, rngs=rngs)

    joint = Joint(decoder, memory, rngs=nnx.Rngs(3))
    alone = jax.tree.leaves(nnx.state(decoder(nnx.Rngs(3))))
    for a, b in zip(jax.tree.leaves(nnx.state(joint.decoder)), alone, strict=True):
        np.testing.assert_array_equal(a, b)
