"""The search index over the training split's keys."""

import functools

from mlpmem_jax.pipeline import estimates, needs
from mlpmem_jax.pipeline.checks import check_retrieval
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
            estimate=functools.partial(estimates.index_estimate, run),
            need=functools.partial(needs.index_need, run),
        )
    ]


def _build(run: Artifacts) -> Completion:
    from mlpmem_jax.parallel.mesh import make_mesh
    from mlpmem_jax.retrieval.index_builder import build_index

    config, mesh = run.config, make_mesh(run.config.mesh)
    return build_index(run.index, run.datastore("train"), config.retrieval, config.seed, mesh)
