"""One optimiser step: gradients, summed over parts of a batch, and the update."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mlpmem_jax.config.stages import TrainingConfig
from mlpmem_jax.input.feed import Batch
from mlpmem_jax.training.losses import means
from mlpmem_jax.training.optimizer import ParameterGroup, parameter_groups
from mlpmem_jax.training.state import TrainState


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossParts:
    """Sums over the tokens of a batch.

    Attributes:
        total: float32 [], the loss summed over tokens, each times its weight.
        sums: Metrics as `losses` returns them, float32 [] each, `weight_sum` among them.
    """

    total: jax.Array
    sums: Mapping[str, jax.Array]


Metrics = dict[str, jax.Array]
TrainStep = Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]


def learning_rates(groups: Sequence[ParameterGroup], step: jax.Array) -> Metrics:
    """Returns the learning rate of each group at a step; the first group's has no prefix."""
    rates = [jnp.asarray(group.learning_rate(step), jnp.float32) for group in groups]
    names = ["learning_rate", *(f"{group.name}_learning_rate" for group in groups[1:])]
    return dict(zip(names, rates, strict=True))


def make_train_step(
    loss: Callable[[nnx.Module, Any, Batch, jax.Array], LossParts],
    graphdef: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    config: TrainingConfig,
) -> TrainStep:
    """Returns the jitted step; it consumes the state that it is given.

    Args:
        loss: (network, frozen arrays, batch, finished steps) to sums over the batch.
        graphdef: Structure of the network.
        optimizer: Of all its parameters.
        config: The section of the configuration.

    The loss is the mean over the whole batch, so cutting the batch into
    `accumulation_steps` parts changes memory and not the result (to rounding).
    """
    groups = parameter_groups(config)

    def sums_and_grads(state: TrainState, frozen: Any, batch: Batch) -> tuple[LossParts, Any]:
        def total(params: Any) -> tuple[jax.Array, LossParts]:
            parts = loss(nnx.merge(graphdef, params, state.fixed), frozen, batch, state.step)
            return parts.total, parts

        (_, parts), grads = jax.value_and_grad(total, has_aux=True)(state.params)
        return parts, grads

    def accumulated(state: TrainState, frozen: Any, batch: Batch) -> tuple[LossParts, Any]:
        count = config.accumulation_steps
        if count == 1:
            return sums_and_grads(state, frozen, batch)
        # Every count-th window: each part then lies on the devices as the batch does.
        parts_of_batch = jax.tree.map(
            lambda x: jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1), batch
        )

        def add(carry: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, sums_and_grads(state, frozen, part)), None

        first = jax.tree.map(lambda x: x[0], parts_of_batch)
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(sums_and_grads, state, frozen, first),
        )
        return jax.lax.scan(add, zeros, parts_of_batch)[0]

    def step(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        parts, grads = accumulated(state, frozen, batch)
        weight = jnp.maximum(parts.sums["weight_sum"], 1e-9)
        grads = jax.tree.map(lambda g: g / weight, grads)
        updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        metrics = {
            **means(dict(parts.sums)),
            "grad_norm": optax.tree.norm(grads),
            "update_norm": optax.tree.norm(updates),
            **learning_rates(groups, state.step),
        }
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            optimizer=optimizer_state,
        )
        return new_state, metrics

    return jax.jit(step, donate_argnums=0)
