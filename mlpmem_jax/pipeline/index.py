"""The search index over the training split's keys."""

import functools
from collections.abc import Mapping
from typing import Any

from mlpmem_jax.config.schema import Config
from mlpmem_jax.parallel.hardware import Machine
from mlpmem_jax.pipeline.checks import check_retrieval
from mlpmem_jax.pipeline.execute import execute
from mlpmem_jax.pipeline.fitting import Need, RowCounter
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.layout import Layout
from mlpmem_jax.store.manifest import Completion

# Keys of `retrieval` that decide the index; the others decide what is kept of a search.
KEYS = (
    "engine",
    "num_neighbors",
    "min_recall",
    "recall_queries",
    "shard_rows",
    "num_leaves",
    "num_leaves_to_search",
    "num_reorder",
    "dims_per_block",
    "training_rows",
)


def recipe(config: Config) -> dict[str, Any]:
    """Returns what decides the index, besides the keys."""
    retrieval = config.retrieval.recipe()
    return {"seed": config.seed, "retrieval": {name: retrieval[name] for name in KEYS}}


def stages(config: Config) -> list[Stage]:
    """Returns the one stage of this command."""
    layout = Layout(config)
    return [
        Stage(
            artifact=layout.index,
            recipe=recipe(config),
            upstream=(layout.datastore("train"),),
            build=functools.partial(_build, config),
            check=functools.partial(check_retrieval, config),
            estimate=functools.partial(_estimate, config),
            need=functools.partial(_need, config),
        )
    ]


def _estimate(config: Config) -> Mapping[str, Any]:
    from mlpmem_jax.pipeline.estimates import index_estimate

    return index_estimate(config)


def _build(config: Config) -> Completion:
    from mlpmem_jax.parallel.mesh import make_mesh
    from mlpmem_jax.retrieval.index_builder import build_index

    layout, mesh = Layout(config), make_mesh(config.mesh)
    return build_index(layout.index, layout.datastore("train"), config.retrieval, config.seed, mesh)


def _need(config: Config, machine: Machine, count: RowCounter) -> Need:
    from mlpmem_jax.pipeline.needs import index_need

    return index_need(config, machine, count)


def main(config: Config, options: Options) -> int:
    """Runs the command."""
    return execute(stages, config, options)
