"""λ while training: fixed, on a schedule, or of the memory's gate."""

import jax
import jax.numpy as jnp

from mlpmem_jax.config.stages import TrainConfig
from mlpmem_jax.models.memory import Memory


def at_step(train: TrainConfig, step: int) -> TrainConfig:
    """Returns the section `train` with λ as it was in the last of so many steps of training."""
    value = float(_scheduled(train, jnp.int32(step - 1)))
    return train.model_copy(update={"interpolation": value, "interpolation_final": None})


def interpolation_of(
    train: TrainConfig, memory: Memory, input_BLX: jax.Array, step: jax.Array
) -> jax.Array:
    """Returns λ of each token, float32 [B, L].

    Args:
        memory: The memory, with or without a gate.
        input_BLX: What it reads.
        step: Finished steps, int32 [].
    """
    if memory.config.gate == "learned":
        return memory.interpolation(input_BLX)
    return jnp.broadcast_to(_scheduled(train, step), input_BLX.shape[:-1])


def _scheduled(train: TrainConfig, step: jax.Array) -> jax.Array:
    first = jnp.float32(train.interpolation)
    if train.interpolation_final is None:
        return first
    # The last step trains with the λ that evaluation uses.
    share = jnp.clip(step / max(1, train.num_steps - 1), 0.0, 1.0)
    return (first + share * (train.interpolation_final - first)).astype(jnp.float32)
