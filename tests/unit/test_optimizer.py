"""Schedules and which parameters decay."""

import jax
import numpy as np
import pytest
from flax import nnx

from mlpmem_jax.config.networks import DecoderConfig
from mlpmem_jax.config.stages import OptimizerConfig
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.training.optimizer import learning_rate_schedule, make_optimizer
from mlpmem_jax.training.state import flatten


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
