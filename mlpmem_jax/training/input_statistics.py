"""Mean and deviation of the memory's input, measured before its training begins.

Suffix: X width of what the memory reads.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mlpmem_jax.input.feed import Batch
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.training.state import TrainState, split_module

Statistics = tuple[jax.Array, jax.Array]


class Moments(NamedTuple):
    """Weight, mean, and weighted squares around the mean, of some inputs."""

    weight: jax.Array
    mean_X: jax.Array
    square_X: jax.Array


def moments(input_BLX: jax.Array, weight_BL: jax.Array) -> Moments:
    """Returns the moments of each feature.

    Args:
        input_BLX: [..., X] inputs, any float dtype.
        weight_BL: [...] weight of each, 0 for padding.
    """
    input_NX = input_BLX.reshape(-1, input_BLX.shape[-1]).astype(jnp.float32)
    weight_N1 = weight_BL.reshape(-1, 1).astype(jnp.float32)
    weight = jnp.sum(weight_N1)
    mean_X = jnp.sum(weight_N1 * input_NX, axis=0) / jnp.maximum(weight, 1e-9)
    return Moments(weight, mean_X, jnp.sum(weight_N1 * jnp.square(input_NX - mean_X), axis=0))


def together(one: Moments, other: Moments) -> Moments:
    """Returns the moments of both (Chan et al., 1979)."""
    weight = one.weight + other.weight
    share = other.weight / jnp.maximum(weight, 1e-9)
    away_X = other.mean_X - one.mean_X
    between_X = jnp.square(away_X) * one.weight * share
    mean_X = one.mean_X + share * away_X
    return Moments(weight, mean_X, one.square_X + other.square_X + between_X)


def statistics(measured: Moments, epsilon: float = 1e-6) -> Statistics:
    """Returns mean and 1/standard deviation, [X] float32 each; epsilon goes to the variance."""
    variance_X = measured.square_X / jnp.maximum(measured.weight, 1e-9)
    return measured.mean_X, jax.lax.rsqrt(variance_X + epsilon)


def measured_statistics(
    inputs: Callable[[Any, Batch], jax.Array], arrays: Any, batches: Iterable[Batch]
) -> Statistics:
    """Measures the input over the scored rows of some batches, one batch in memory at a time.

    Args:
        inputs: (arrays, batch) to input_BLX; jitted here.
        arrays: What `inputs` reads besides.
        batches: Batches with `weight`.

    Returns:
        Mean and 1/standard deviation, [X] float32.
    """

    @jax.jit
    def of_batch(arrays: Any, batch: Batch) -> Moments:
        return moments(inputs(arrays, batch), batch["weight"])

    parts = (of_batch(arrays, batch) for batch in batches)
    return jax.jit(statistics)(functools.reduce(jax.jit(together), parts))


def with_statistics(
    state: TrainState, network: nnx.Module, memory: Memory, measured: Statistics
) -> TrainState:
    """Returns the state with measured statistics.

    Args:
        state: A fresh state.
        network: Made of that state; it is changed.
        memory: The memory in that network, or the network itself.
        measured: What `measured_statistics` returned.
    """
    memory.set_input_statistics(*measured)
    fixed = split_module(network)[2]
    placed = jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), fixed, state.fixed)
    return dataclasses.replace(state, fixed=placed)
