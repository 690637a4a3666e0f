"""Schedules and which parameters decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mlpmem_jax.config.networks import DecoderConfig
from mlpmem_jax.config.stages import OptimizerConfig, TrainConfig
from mlpmem_jax.models.decoder import Decoder
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


def test_matrices_decay_and_norms_biases_and_embeddings_do_not():
    config = DecoderConfig(
        width=16, num_layers=2, num_heads=2, norm="layer", positions="learned", biases="all"
    )
    params = nnx.split(Decoder(config, 300, rngs=nnx.Rngs(0)), nnx.Param, ...)[1]
    optimizer = make_optimizer(OptimizerConfig(weight_decay=0.5, warmup_steps=0), 10)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    moved = {name for name, update in flatten(updates).items() if np.abs(update).max() > 0}
    kept = set(flatten(params)) - moved
    matrices = {"query", "key", "value", "out", "up", "down", "gate", "head"}
    assert all(any(part in matrices for part in name.split("/")) for name in moved)
    assert all(any(matrix in name.split("/") for name in moved) for matrix in matrices)
    assert any("norm_scale" in name for name in kept) and any("bias" in name for name in kept)
    assert any("embedding" in name for name in kept) and any("position" in name for name in kept)


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
    params = {"decoder": {"kernel": jnp.ones(3)}, "memory": {"kernel": jnp.ones(3)}}
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
