"""Mean and deviation of the memory's input, measured before its training begins."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mlpmem_jax.input.feed import Batch
from mlpmem_jax.models.memory import Memory, input_statistics
from mlpmem_jax.training.state import TrainState, split_module

Statistics = tuple[jax.Array, jax.Array]


def measured_statistics(
    inputs: Callable[[Any, Batch], jax.Array], arrays: Any, batches: Iterable[Batch]
) -> Statistics:
    """Measures the input over the scored rows of some batches.

    Args:
        inputs: (arrays, batch) to input_BLD; jitted here.
        arrays: What `inputs` reads besides.
        batches: Batches with `weight`.

    Returns:
        Mean and 1/standard deviation, [D] float32.
    """
    jitted = jax.jit(inputs)
    parts = [(jitted(arrays, batch), batch["weight"]) for batch in batches]
    states, weights = (jnp.concatenate(each) for each in zip(*parts, strict=True))
    return jax.jit(input_statistics)(states, weights)


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
