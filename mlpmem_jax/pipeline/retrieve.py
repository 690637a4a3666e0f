"""Neighbours of every row, and the next-token distributions that they imply."""

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlpmem_jax.config.schema import Config
from mlpmem_jax.parallel.hardware import Machine
from mlpmem_jax.pipeline.checks import check_retrieval
from mlpmem_jax.pipeline.execute import execute
from mlpmem_jax.pipeline.fitting import Need, RowCounter
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.array_specs import Split
from mlpmem_jax.store.layout import Layout
from mlpmem_jax.store.manifest import Artifact, Completion

if TYPE_CHECKING:
    from mlpmem_jax.retrieval.index_builder import ExactCache
    from mlpmem_jax.retrieval.search import Search
    from mlpmem_jax.retrieval.targets import TargetInputs


def stages(config: Config) -> list[Stage]:
    """Returns the stages: neighbours of valid and test, then targets of train and valid.

    Valid and test are searched exactly, whatever the engine: they tune and score the
    explicit kNN-LM that the memory is held against. Train is searched by the engine.
    """
    from mlpmem_jax.retrieval.index_builder import ExactCache

    layout = Layout(config)
    train = layout.datastore("train")
    exact = ExactCache(train, config.retrieval.key_chunk_rows, config.mesh)
    check = functools.partial(check_retrieval, config)
    kept = [
        Stage(
            artifact=layout.neighbors(split),
            recipe=_exact_recipe(config),
            upstream=(train, layout.datastore(split)),
            build=functools.partial(_build_neighbors, config, split, exact),
            check=check,
            estimate=functools.partial(_estimate, config, split),
            need=functools.partial(_need, config, split),
        )
        for split in ("valid", "test")
    ]
    if config.retrieval.keep_train == "all":
        kept.append(
            Stage(
                artifact=layout.neighbors("train"),
                recipe=_searched_recipe(config),
                upstream=(train, layout.index),
                build=functools.partial(_build_neighbors, config, "train", exact),
                check=check,
                estimate=functools.partial(_estimate, config, "train"),
                need=functools.partial(_need, config, "train"),
            )
        )
    if config.targets.workdir is not None:
        return kept  # The teacher's targets are read, never made here.
    valid = (layout.datastore("valid"), layout.neighbors("valid"))
    searched = layout.neighbors("train") if config.retrieval.keep_train == "all" else layout.index
    return [
        *kept,
        Stage(
            artifact=layout.targets("train"),
            recipe=_targets_recipe(config),
            upstream=(layout.tokens, train, searched, *valid),
            build=functools.partial(_build_train_targets, config, exact),
            check=check,
            estimate=functools.partial(_estimate_targets, config, "train"),
            need=functools.partial(_targets_need, config, "train"),
        ),
        Stage(
            artifact=layout.targets("valid"),
            recipe=_targets_recipe(config),
            upstream=(layout.tokens, train, *valid, layout.targets("train")),
            build=functools.partial(_build_valid_targets, config),
            check=check,
            estimate=functools.partial(_estimate_targets, config, "valid"),
            need=functools.partial(_targets_need, config, "valid"),
        ),
    ]


def _exact_recipe(config: Config) -> dict[str, Any]:
    return {
        "retrieval": {"num_neighbors": config.retrieval.num_neighbors},
        "datastore": {
            "shard_rows": config.datastore.shard_rows,
            "chunk_rows": config.datastore.chunk_rows,
        },
    }


def _searched_recipe(config: Config) -> dict[str, Any]:
    """Returns what decides the engine's neighbours, and whether its recall suffices."""
    names = ("num_neighbors", "min_recall", "recall_queries")
    retrieval = config.retrieval.recipe()
    return {
        **_exact_recipe(config),
        "seed": config.seed,
        "retrieval": {name: retrieval[name] for name in names},
    }


def _targets_recipe(config: Config) -> dict[str, Any]:
    return {**_searched_recipe(config), "targets": config.targets.recipe()}


def _estimate(config: Config, split: Split) -> Mapping[str, Any]:
    from mlpmem_jax.pipeline.estimates import neighbors_estimate

    return neighbors_estimate(config, split)


def _estimate_targets(config: Config, split: Split) -> Mapping[str, Any]:
    from mlpmem_jax.pipeline.estimates import targets_estimate

    return targets_estimate(config, split)


def _need(config: Config, split: Split, machine: Machine, count: RowCounter) -> Need:
    from mlpmem_jax.pipeline.needs import neighbors_need

    return neighbors_need(config, split, machine, count)


def _targets_need(config: Config, split: Split, machine: Machine, count: RowCounter) -> Need:
    from mlpmem_jax.pipeline.needs import targets_need

    return targets_need(config, split, machine, count)


def _build_neighbors(config: Config, split: Split, exact: "ExactCache") -> Completion:
    from mlpmem_jax.retrieval.search import keep_neighbors

    layout = Layout(config)
    index = layout.index if split == "train" else None
    return keep_neighbors(
        layout.neighbors(split),
        layout.datastore(split),
        split,
        config.datastore,
        _search(config, index, exact),
    )


def _build_train_targets(config: Config, exact: "ExactCache") -> Completion:
    from mlpmem_jax.retrieval.targets import make_train_targets

    layout = Layout(config)
    kept = layout.neighbors("train") if config.retrieval.keep_train == "all" else None
    search = _search(config, layout.index, exact)
    return make_train_targets(layout.targets("train"), _target_inputs(config), search, kept)


def _build_valid_targets(config: Config) -> Completion:
    from mlpmem_jax.retrieval.targets import make_valid_targets

    layout = Layout(config)
    train = layout.datastore("train"), layout.targets("train")
    return make_valid_targets(layout.targets("valid"), _target_inputs(config), *train)


def _search(config: Config, index: Artifact | None, exact: "ExactCache") -> "Search":
    from mlpmem_jax.retrieval.search import Search

    return Search(Layout(config).datastore("train"), index, exact, config.retrieval, config.seed)


def _target_inputs(config: Config) -> "TargetInputs":
    from mlpmem_jax.retrieval.targets import TargetInputs

    layout = Layout(config)
    return TargetInputs(
        tokens=layout.tokens,
        valid=layout.datastore("valid"),
        valid_neighbors=layout.neighbors("valid"),
        targets=config.targets,
        chunking=config.datastore,
    )


def main(config: Config, options: Options) -> int:
    """Runs the command."""
    return execute(stages, config, options)
