"""Every setting of search through index, targets and memory, then one table."""

import functools
from collections.abc import Mapping
from typing import Any

from mlpmem_jax.config.schema import Config
from mlpmem_jax.console import say
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.parallel.hardware import Machine
from mlpmem_jax.pipeline import embed, index, pretrain, retrieve, tokenize, train
from mlpmem_jax.pipeline.checks import check_devices, check_trained_apart
from mlpmem_jax.pipeline.execute import execute_and_report
from mlpmem_jax.pipeline.fitting import Need, RowCounter
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.reports import print_files, write_report
from mlpmem_jax.pipeline.resolve import compute_dtypes
from mlpmem_jax.pipeline.stage import Rebuild, Stage
from mlpmem_jax.stats.bootstrap import INTERVALS
from mlpmem_jax.store.array_specs import SPLITS
from mlpmem_jax.store.files import read_json
from mlpmem_jax.store.layout import Layout
from mlpmem_jax.store.manifest import Completion

NAME = "search-quality"


def recipe(config: Config) -> dict[str, Any]:
    """Returns what decides the comparison, besides what is compared."""
    names = ("bootstrap_samples", "confidence", "knn_valid_rows")
    evaluate = config.evaluate.recipe()
    return {
        "seed": config.seed,
        "num_neighbors": config.retrieval.num_neighbors,
        "evaluate": {name: evaluate[name] for name in names} | {"intervals": INTERVALS},
        "search_quality": config.search_quality.recipe(),
        **compute_dtypes(config, "decoder", "memory"),
    } | (
        {"interpolation": config.trained_interpolation, "gate": config.memory.gate}
        if config.brings_interpolation
        else {}
    )


def stages(config: Config) -> list[Stage]:
    """Returns the stages: the datastore, then index, targets and memory of each setting."""
    from mlpmem_jax.studies.search_quality.settings import with_setting

    layout = Layout(config)
    parts = [with_setting(config, setting) for setting in config.search_quality.settings]
    made: dict[str, Stage] = {}
    commands = (tokenize, pretrain, embed)
    for stage in [stage for command in commands for stage in command.stages(config)]:
        made[stage.name] = stage
    for part in parts:
        for stage in [s for command in (index, retrieve, train) for s in command.stages(part)]:
            made.setdefault(stage.name, stage)  # The exact neighbours are those of all.
    upstream = [layout.tokens, layout.decoder, *(layout.datastore(split) for split in SPLITS)]
    for one in map(Layout, parts):
        upstream += [one.index, one.targets("train"), one.targets("valid"), one.memory]
    report = Stage(
        artifact=layout.search_quality,
        recipe=recipe(config),
        upstream=tuple(upstream),
        build=functools.partial(_build, config),
        check=functools.partial(_check, config),
        estimate=functools.partial(_estimate, config),
        need=functools.partial(_need, config),
        is_report=True,
    )
    return [*made.values(), report]


def _check(config: Config) -> None:
    """Refuses settings whose engine is not installed.

    Raises:
        ConfigError: Names the setting and the way out.
    """
    from mlpmem_jax.retrieval.engine import is_approximate_installed

    check_trained_apart(config, NAME, "joint models are compared by compare")
    asked = [one.name for one in config.search_quality.settings if one.engine == "scann"]
    if asked and not is_approximate_installed():
        raise ConfigError(
            f"search_quality.settings: {', '.join(asked)} need the package scann, which is not "
            "installed (pip install scann; Linux only)"
        )
    check_devices(config, "evaluate")


def _estimate(config: Config) -> Mapping[str, Any]:
    count = len(config.search_quality.settings)
    return {"indices to build and memories to train": count}


def _build(config: Config) -> Completion:
    from mlpmem_jax.parallel.mesh import make_mesh
    from mlpmem_jax.studies.search_quality.picture import draw
    from mlpmem_jax.studies.search_quality.study import measure_settings
    from mlpmem_jax.studies.search_quality.table import as_csv

    artifact = Layout(config).search_quality
    results = measure_settings(config, make_mesh(config.mesh), artifact.path)
    files = write_report(artifact.path, NAME, results, as_csv(results), draw(results))
    return Completion(counts={"settings": len(results["settings"])}, files=files)


def print_report(config: Config) -> None:
    """Prints the tables of a finished comparison."""
    from mlpmem_jax.studies.search_quality.table import as_text

    artifact = Layout(config).search_quality
    artifact.verify()
    say()
    say(as_text(read_json(artifact.path / f"{NAME}.json")))
    print_files(artifact.path, NAME)


def _need(config: Config, machine: Machine, count: RowCounter) -> Need:
    from mlpmem_jax.pipeline.needs import search_quality_need

    return search_quality_need(config, machine, count)


def main(config: Config, options: Options) -> int:
    """Runs the command."""
    return execute_and_report(stages, print_report, config, options, Rebuild.STALE)
