"""Schedules and which parameters decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mlpmem_jax.config.networks import DecoderConfig, MemoryConfig
from mlpmem_jax.config.stages import OptimizerConfig, PretrainConfig, TrainConfig
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.training.optimizer import (
    group_optimizer,
    learning_rate_schedule,
    make_optimizer,
    parameter_groups,
)
from mlpmem_jax.training.state import flatten
from mlpmem_jax.training.step import learning_rates


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    [("cosine", 0.55, 0.1), ("linear", 0.55, 0.1), ("constant", 1, 1)],
)
def test_schedules(schedule, middle, last):
    config = OptimizerConfig(
        learning_rate=1.0, schedule=schedule, warmup_steps=10, final_fraction=0.1
    )
    rate = learning_rate_schedule(config, 110)
    assert 0 < rate(0) < rate(5) < rate(10) == pytest.approx(1.0)
    assert rate(60) == pytest.approx(middle)
    assert rate(110) == pytest.approx(last)


@pytest.mark.parametrize(("num_steps", "warmup"), [(600, 50), (100, 50), (99, 49), (8, 4), (1, 0)])
def test_the_default_warmup_fits_short_runs(num_steps, warmup):
    """The schedule and the recipe are those of the number written out."""
    default, written = (OptimizerConfig(**w) for w in ({}, {"warmup_steps": warmup}))
    rates = [learning_rate_schedule(config, num_steps) for config in (default, written)]
    steps = np.arange(num_steps + 1)
    np.testing.assert_array_equal(*(jax.vmap(rate)(steps) for rate in rates))
    configs = [PretrainConfig(num_steps=num_steps, optimizer=each) for each in (default, written)]
    assert configs[0].recipe() == configs[1].recipe()


def test_the_default_warmup_is_of_the_steps_in_which_a_group_moves():
    config = TrainConfig(mode="joint", num_steps=40, decoder_freeze_steps=30)
    recipe = config.recipe()
    assert recipe["optimizer"]["warmup_steps"] == 20
    assert recipe["decoder_optimizer"]["warmup_steps"] == 5
    group = parameter_groups(config)[1]
    rates = jax.vmap(group.learning_rate)(jnp.arange(40))
    assert np.argmax(rates) == 35
    assert rates[35] == pytest.approx(config.decoder_optimizer.learning_rate)


def _moved(updates):
    flat = flatten(updates).items()
    return {name.removesuffix("/value") for name, update in flat if np.abs(update).max() > 0}


_DECAYED_DECODER = {"blocks/query", "blocks/key", "blocks/value", "blocks/out", "blocks/up",
                    "blocks/gate", "blocks/down", "head"}  # fmt: skip
_DECAYED_MEMORY = {"blocks/up", "blocks/down", "head", "projection/projection"}
_GPT2 = {"norm": "layer", "positions": "learned", "activation": "gelu", "biases": "all"}


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (Decoder(DecoderConfig(width=16, num_layers=2, num_heads=2), 300, rngs=nnx.Rngs(0)),
         _DECAYED_DECODER),
        (Decoder(DecoderConfig(width=16, num_layers=2, num_heads=2, head="tied", **_GPT2), 300,
                 rngs=nnx.Rngs(0)),
         _DECAYED_DECODER - {"blocks/gate", "head"}),
        (Memory(MemoryConfig(width=8, num_layers=2, gate="learned"), 16, 300, rngs=nnx.Rngs(0)),
         _DECAYED_MEMORY | {"blocks/gate"}),  # of SwiGLU; "gate" alone makes λ of each token
        (Memory(MemoryConfig(width=8, num_layers=2, block="gelu", input_norm="rms"), 16, 300,
                rngs=nnx.Rngs(0)),
         _DECAYED_MEMORY),
    ],
)  # fmt: skip
def test_matrices_decay_and_norms_biases_embeddings_and_gates_do_not(network, expected):
    params = jax.tree.map(jnp.ones_like, nnx.state(network, nnx.Param))
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.5, warmup_steps=0), 10)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert _moved(updates) == expected


def test_a_gate_does_not_decay_in_joint_training():
    memory = Memory(MemoryConfig(width=8, num_layers=2, gate="learned"), 16, 300, rngs=nnx.Rngs(0))
    decoder = Decoder(DecoderConfig(width=16, num_layers=2, num_heads=2), 300, rngs=nnx.Rngs(0))
    groups = parameter_groups(
        TrainConfig(mode="joint", optimizer=OptimizerConfig(weight_decay=0.5, warmup_steps=0))
    )
    params = {"memory": nnx.state(memory, nnx.Param), "decoder": nnx.state(decoder, nnx.Param)}
    params = jax.tree.map(jnp.ones_like, params)
    optimizer = group_optimizer(groups)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert {name for name in _moved(updates) if name.startswith("memory/")} == {
        f"memory/{name}" for name in _DECAYED_MEMORY | {"blocks/gate"}
    }


def _two_groups(num_steps=6, **changes):
    optimizer = {"warmup_steps": 0, "weight_decay": 0.1}
    config = TrainConfig(
        mode="joint",
        num_steps=num_steps,
        optimizer=OptimizerConfig(learning_rate=0.1, **optimizer),
        decoder_optimizer=OptimizerConfig(learning_rate=0.01, clip_norm=None, **optimizer),
        **changes,
    )
    groups = parameter_groups(config)
    kernel = nnx.Param(jnp.ones(3), role="matrix")
    params = {"decoder": {"kernel": kernel}, "memory": {"kernel": kernel}}
    return groups, group_optimizer(groups), params


def test_each_group_has_its_own_learning_rate_and_clipping():
    groups, optimizer, params = _two_groups()
    gradient = jax.tree.map(lambda x: x * 1e3, params)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    rates = learning_rates(groups, jnp.int32(0))
    assert rates["learning_rate"] == pytest.approx(0.1)
    assert rates["decoder_learning_rate"] == pytest.approx(0.01)
    # Adam's first step is one learning rate, and decay a tenth of it.
    np.testing.assert_allclose(updates["memory"]["kernel"], -0.11, rtol=1e-4)
    np.testing.assert_allclose(updates["decoder"]["kernel"], -0.011, rtol=1e-4)


@pytest.mark.parametrize("frozen", ["decoder", "memory"])
def test_a_frozen_group_does_not_move_and_begins_as_if_it_had_waited(frozen):
    groups, optimizer, params = _two_groups(**{f"{frozen}_freeze_steps": 4})
    _, plain, _ = _two_groups(num_steps=2)
    state, at_start = optimizer.init(params), params
    for step in range(4):
        updates, state = optimizer.update(params, state, params)
        params = optax.apply_updates(params, updates)
        name = "learning_rate" if frozen == "memory" else "decoder_learning_rate"
        assert float(learning_rates(groups, jnp.int32(step))[name]) == 0
    other = "memory" if frozen == "decoder" else "decoder"
    np.testing.assert_array_equal(params[frozen]["kernel"], at_start[frozen]["kernel"])
    assert not np.array_equal(params[other]["kernel"], at_start[other]["kernel"])
    # From here on: as a fresh run of the two steps that are left.
    plain_params, plain_state = at_start, plain.init(at_start)
    for _ in range(2):
        updates, state = optimizer.update(at_start, state, params)
        params = optax.apply_updates(params, updates)
        updates, plain_state = plain.update(at_start, plain_state, plain_params)
        plain_params = optax.apply_updates(plain_params, updates)
    np.testing.assert_allclose(params[frozen]["kernel"], plain_params[frozen]["kernel"], rtol=1e-6)
