"""The decoder, trained on the corpus."""

import functools
from collections.abc import Mapping
from typing import Any

from mlpmem_jax.config.schema import Config
from mlpmem_jax.parallel.hardware import Machine
from mlpmem_jax.pipeline.checks import check_devices
from mlpmem_jax.pipeline.execute import execute
from mlpmem_jax.pipeline.fitting import Need, RowCounter
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.layout import Layout
from mlpmem_jax.store.manifest import Completion


def recipe(config: Config) -> dict[str, Any]:
    """Returns what decides the decoder, besides the tokens."""
    return {
        "seed": config.seed,
        "corpus": {"attention": config.corpus.attention},
        "decoder": config.decoder.recipe(),
        "pretrain": config.pretrain.recipe(),
    }


def stages(config: Config) -> list[Stage]:
    """Returns the one stage of this command."""
    layout = Layout(config)
    return [
        Stage(
            artifact=layout.decoder,
            recipe=recipe(config),
            upstream=(layout.tokens,),
            build=functools.partial(_build, config),
            check=functools.partial(check_devices, config, "pretrain"),
            estimate=functools.partial(_estimate, config),
            need=functools.partial(_need, config),
        )
    ]


def _estimate(config: Config) -> Mapping[str, Any]:
    from mlpmem_jax.pipeline.estimates import pretraining_estimate

    return pretraining_estimate(config)


def _build(config: Config) -> Completion:
    from mlpmem_jax.pipeline.network_stage import train_task
    from mlpmem_jax.training.pretraining import PretrainTask

    return train_task(config, "pretrain", PretrainTask, Layout(config).decoder)


def _need(config: Config, machine: Machine, count: RowCounter) -> Need:
    from mlpmem_jax.pipeline.needs import pretraining_need

    return pretraining_need(config, machine, count)


def main(config: Config, options: Options) -> int:
    """Runs the command."""
    return execute(stages, config, options)
