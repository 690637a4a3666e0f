"""The search index over the training split's keys."""

import functools
from collections.abc import Mapping
from typing import Any

from mlpmem_jax.parallel.hardware import Machine
from mlpmem_jax.pipeline.checks import check_retrieval
from mlpmem_jax.pipeline.fitting import Need, RowCounter
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.manifest import Completion


def stages(run: Artifacts) -> list[Stage]:
    """Returns the one stage of this command."""
    return [
        Stage(
            artifact=run.index,
            build=functools.partial(_build, run),
            check=functools.partial(check_retrieval, run),
            estimate=functools.partial(_estimate, run),
            need=functools.partial(_need, run),
        )
    ]


def _estimate(run: Artifacts) -> Mapping[str, Any]:
    from mlpmem_jax.pipeline.estimates import index_estimate

    return index_estimate(run)


def _build(run: Artifacts) -> Completion:
    from mlpmem_jax.parallel.mesh import make_mesh
    from mlpmem_jax.retrieval.index_builder import build_index

    config, mesh = run.config, make_mesh(run.config.mesh)
    return build_index(run.index, run.datastore("train"), config.retrieval, config.seed, mesh)


def _need(run: Artifacts, machine: Machine, count: RowCounter) -> Need:
    from mlpmem_jax.pipeline.needs import index_need

    return index_need(run, machine, count)
