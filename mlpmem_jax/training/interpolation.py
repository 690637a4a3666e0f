"""λ while training: fixed, on a schedule, or of the memory's gate."""

import jax
import jax.numpy as jnp

from mlpmem_jax.config.schema import Config
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.training.joint_loss import JointTerms


def joint_terms(config: Config) -> JointTerms:
    """Returns the weights of the loss as configured; the prior only where there is a gate."""
    train = config.train
    prior_weight = train.gate_prior if config.memory.gate == "learned" else 0.0
    return JointTerms(config.loss_weights, train.alpha, train.interpolation, prior_weight)


def at_step(config: Config, step: int) -> Config:
    """Returns the configuration with λ as it was in the last of so many steps of training."""
    value = float(_scheduled(config, jnp.int32(step - 1)))
    fixed = {"interpolation": value, "interpolation_final": None}
    return config.model_copy(update={"train": config.train.model_copy(update=fixed)})


def interpolation_of(
    config: Config, memory: Memory, input_BLX: jax.Array, step: jax.Array
) -> jax.Array:
    """Returns λ of each token, float32 [B, L].

    Args:
        config: The whole configuration.
        memory: The memory, with or without a gate.
        input_BLX: What it reads.
        step: Finished steps, int32 [].
    """
    if config.memory.gate == "learned":
        return memory.interpolation(input_BLX)
    return jnp.broadcast_to(_scheduled(config, step), input_BLX.shape[:-1])


def _scheduled(config: Config, step: jax.Array) -> jax.Array:
    train = config.train
    first = jnp.float32(train.interpolation)
    if train.interpolation_final is None:
        return first
    # The last step trains with the λ that evaluation uses.
    share = jnp.clip(step / max(1, train.num_steps - 1), 0.0, 1.0)
    return (first + share * (train.interpolation_final - first)).astype(jnp.float32)
