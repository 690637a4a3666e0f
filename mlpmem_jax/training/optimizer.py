"""AdamW with warm-up, decay and clipping, from optax."""

from typing import Any

import jax
import optax

from mlpmem_jax.config.stages import OptimizerConfig


def learning_rate_schedule(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Returns the learning rate as a function of the step.

    A linear warm-up to the peak, then `config.schedule` down to `final_fraction` of it.
    """
    peak = config.learning_rate
    rest = max(1, num_steps - config.warmup_steps)
    decays: dict[str, optax.Schedule] = {
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=config.final_fraction),
        "linear": optax.linear_schedule(peak, peak * config.final_fraction, rest),
        "constant": optax.constant_schedule(peak),
    }
    # The warm-up starts above zero: a first step of zero would teach nothing.
    start = peak / (config.warmup_steps + 1)
    warmup = optax.linear_schedule(start, peak, max(1, config.warmup_steps))
    return optax.join_schedules([warmup, decays[config.schedule]], [config.warmup_steps])


def _decayed(path: tuple[Any, ...]) -> bool:
    """Whether a parameter is a matrix that weight decay applies to.

    Norm scales, biases and embeddings (of tokens and positions) are not decayed.
    """
    name = jax.tree_util.keystr(path).lower()
    return not any(word in name for word in ("norm", "bias", "scale", "embed", "position"))


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Returns the optimiser: clipping of the global norm, then AdamW."""

    def mask(params: optax.Params) -> Any:
        return jax.tree_util.tree_map_with_path(lambda path, _: _decayed(path), params)

    adamw = optax.adamw(
        learning_rate_schedule(config, num_steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        mask=mask,
    )
    clip = (
        optax.identity()
        if config.clip_norm is None
        else optax.clip_by_global_norm(config.clip_norm)
    )
    return optax.chain(clip, adamw)
