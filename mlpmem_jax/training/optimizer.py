"""AdamW with warm-up, decay and clipping, from optax; one for each group of parameters."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from mlpmem_jax.config.stages import OptimizerConfig, TrainConfig, TrainingConfig
from mlpmem_jax.models.layers import Role

DECAYED: tuple[Role, ...] = ("matrix", "head")


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    A linear warm-up to the peak, then `config.schedule` down to `final_fraction` of it.
    """
    peak = config.learning_rate
    warmup_steps = config.warmup_of(num_steps)
    rest = max(1, num_steps - warmup_steps)
    decays: dict[str, optax.Schedule] = {
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction),
        "linear": optax.linear_schedule(peak, peak * config.final_fraction, rest),
        "constant": optax.constant_schedule(peak),
    }
    # The warm-up starts above zero: a first step of zero would teach nothing.
    start = peak / (warmup_steps + 1)
    warmup = optax.linear_schedule(start, peak, max(1, warmup_steps))
    return optax.join_schedules([warmup, decays[config.schedule]], [warmup_steps])


def decayed(params: Any) -> Any:
    """Returns for each parameter whether weight decay applies to it: to matrices and heads alone.

    Norms, biases, vectors (the gate) and embeddings do not decay.

    Args:
        params: nnx.Variables, whose metadata names their role (`layers.parameter`).
    """

    def of(leaf: nnx.Variable) -> nnx.Variable:
        if not hasattr(leaf.get_raw_value(), "shape"):
            return leaf  # Of another group of parameters: optax masks it, there is no array.
        return leaf.replace(leaf.get_metadata()["role"] in DECAYED)

    return jax.tree.map(of, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Returns the optimiser: clipping of the global norm, then AdamW."""
    adamw = optax.adamw(
        learning_rate_schedule(config, num_steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=decayed,
    )
    clip = (
        optax.identity()
        if config.clip_norm is None
        else optax.clip_by_global_norm(config.clip_norm)
    )
    return optax.chain(clip, adamw)


class ParameterGroup(NamedTuple):
    """Parameters that share an optimiser.

    Attributes:
        name: First part of their path in the network ("decoder", "memory").
        config: Their optimiser.
        freeze_steps: Steps before they move; moments and schedule begin then.
        num_steps: Steps of the run.
    """

    name: str
    config: OptimizerConfig
    freeze_steps: int
    num_steps: int

    def learning_rate(self, step: jax.Array) -> jax.Array:
        """Returns the learning rate at a step of the run; 0 while frozen."""
        moving = learning_rate_schedule(self.config, self.num_steps - self.freeze_steps)
        rate = moving(jnp.maximum(step - self.freeze_steps, 0))
        return jnp.where(step < self.freeze_steps, 0.0, rate)

    def optimizer(self) -> optax.GradientTransformation:
        """Returns the group's optimiser, which does nothing while the group is frozen."""
        inner = make_optimizer(self.config, self.num_steps - self.freeze_steps)
        if self.freeze_steps == 0:
            return inner
        frozen = self.freeze_steps
        return optax.conditionally_mask(inner, lambda step: step >= frozen)


def parameter_groups(config: TrainingConfig) -> tuple[ParameterGroup, ...]:
    """Returns the groups of a training section; joint training has two, others one ("")."""
    steps = config.num_steps
    if isinstance(config, TrainConfig) and config.mode == "joint":
        memory, decoder = config.memory_freeze_steps, config.decoder_freeze_steps
        return (
            ParameterGroup("memory", config.optimizer, memory, steps),
            ParameterGroup("decoder", config.decoder_optimizer, decoder, steps),
        )
    return (ParameterGroup("", config.optimizer, 0, steps),)


def group_of(path: tuple[Any, ...]) -> str:
    """Returns the name of the group that a parameter belongs to, where there are several."""
    return jax.tree_util.keystr(path[:1], simple=True)


def group_optimizer(groups: tuple[ParameterGroup, ...]) -> optax.GradientTransformation:
    """Returns one optimiser for a network of several groups: a group is clipped by itself."""
    if len(groups) == 1:
        return groups[0].optimizer()

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: group_of(path), params)

    return optax.partition({group.name: group.optimizer() for group in groups}, labels)
