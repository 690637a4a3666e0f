"""One optimiser step: gradients, summed over parts of a batch, and the update."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mlpmem_jax.config.stages import TrainingConfig
from mlpmem_jax.input.feed import Batch
from mlpmem_jax.training.losses import means
from mlpmem_jax.training.optimizer import ParameterGroup, group_of, parameter_groups
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


class TrainStep(Protocol):
    """A jitted step; it consumes the state that it is given."""

    def __call__(
        self, state: TrainState, frozen: Any, batch: Batch, *, waiting: frozenset[str] = ...
    ) -> tuple[TrainState, Metrics]:
        """Returns the state after a step, and metrics.

        Args:
            state: Parameters and optimiser.
            frozen: Arrays that the loss reads and nothing changes.
            waiting: Names of groups that do not move yet: no gradient of theirs is computed.
        """
        ...


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
    """Returns the jitted step, compiled once for each set of groups that wait.

    Args:
        loss: (network, frozen arrays, batch, finished steps) to sums over the batch.
        graphdef: Structure of the network.
        optimizer: Of all its parameters.

    The loss is the mean over the whole batch, so cutting the batch into
    `accumulation_steps` parts changes memory and not the result (to rounding).
    """
    groups = parameter_groups(config)

    def sums_and_grads(
        state: TrainState, frozen: Any, batch: Batch, waiting: frozenset[str]
    ) -> tuple[LossParts, Any]:
        def total(params: Any) -> tuple[jax.Array, LossParts]:
            params = _held(params, waiting)
            parts = loss(nnx.merge(graphdef, params, state.fixed), frozen, batch, state.step)
            return parts.total, parts

        (_, parts), grads = jax.value_and_grad(total, has_aux=True)(state.params)
        return parts, grads

    def accumulated(
        state: TrainState, frozen: Any, batch: Batch, waiting: frozenset[str]
    ) -> tuple[LossParts, Any]:
        count = config.accumulation_steps
        if count == 1:
            return sums_and_grads(state, frozen, batch, waiting)
        # Every count-th window: each part then lies on the devices as the batch does.
        parts_of_batch = jax.tree.map(
            lambda x: jnp.swapaxes(x.reshape(-1, count, *x.shape[1:]), 0, 1), batch
        )

        def add(carry: Any, part: Batch) -> tuple[Any, None]:
            added = sums_and_grads(state, frozen, part, waiting)
            return jax.tree.map(jnp.add, carry, added), None

        first = jax.tree.map(lambda x: x[0], parts_of_batch)
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(
                functools.partial(sums_and_grads, waiting=waiting), state, frozen, first
            ),
        )
        return jax.lax.scan(add, zeros, parts_of_batch)[0]

    def step(
        state: TrainState, frozen: Any, batch: Batch, *, waiting: frozenset[str] = frozenset()
    ) -> tuple[TrainState, Metrics]:
        parts, grads = accumulated(state, frozen, batch, waiting)
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

    return jax.jit(step, donate_argnums=0, static_argnames="waiting")


def waiting_groups(config: TrainingConfig, step: int) -> frozenset[str]:
    """Returns the names of the groups that do not move yet after a number of finished steps."""
    return frozenset(group.name for group in parameter_groups(config) if step < group.freeze_steps)


def _held(params: Any, waiting: frozenset[str]) -> Any:
    """Returns parameters through which no gradient comes to the groups that wait."""
    if not waiting:
        return params

    def hold(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
        return jax.lax.stop_gradient(leaf) if group_of(path) in waiting else leaf

    return jax.tree_util.tree_map_with_path(hold, params)
