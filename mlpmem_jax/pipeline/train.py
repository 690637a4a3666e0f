"""The MLP Memory, trained to imitate the retriever."""

import functools
from collections.abc import Mapping
from typing import Any

from mlpmem_jax.config.schema import Config
from mlpmem_jax.datastore.layout import Layout
from mlpmem_jax.pipeline.checks import check_devices
from mlpmem_jax.pipeline.execute import execute
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.stage import Completion, Stage


def recipe(config: Config) -> dict[str, Any]:
    """Returns what decides the memory, besides what it is trained on."""
    return {
        "seed": config.seed,
        "memory": config.memory.recipe(),
        "train": config.train.recipe(),
    }


def stages(config: Config) -> list[Stage]:
    """Returns the one stage of this command."""
    layout = Layout(config)
    upstream = [layout.tokens, layout.decoder, layout.targets("train"), layout.targets("valid")]
    if config.train.inputs == "stored":
        upstream += [layout.datastore("train"), layout.datastore("valid")]
    return [
        Stage(
            artifact=layout.memory,
            recipe=recipe(config),
            upstream=tuple(upstream),
            build=functools.partial(_build, config),
            check=functools.partial(check_devices, config, "train"),
            estimate=functools.partial(_estimate, config),
        )
    ]


def _estimate(config: Config) -> Mapping[str, Any]:
    from mlpmem_jax.pipeline.estimates import training_estimate

    return training_estimate(config)


def _build(config: Config) -> Completion:
    from mlpmem_jax.pipeline.training import train_task
    from mlpmem_jax.training.memory_training import MemoryTask

    return train_task(config, "train", MemoryTask, Layout(config).memory)


def main(config: Config, options: Options) -> int:
    """Runs the command."""
    return execute(stages, config, options)
