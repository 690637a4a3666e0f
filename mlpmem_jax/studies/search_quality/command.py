"""Every setting of search through index, targets and memory, then one table."""

import functools
from collections.abc import Mapping
from typing import Any

from mlpmem_jax.errors import ConfigError
from mlpmem_jax.pipeline import embed, index, needs, pretrain, retrieve, tokenize, train
from mlpmem_jax.pipeline.checks import (
    check_devices,
    check_trained_apart,
    check_trains_memory,
    check_unchanged_text,
)
from mlpmem_jax.pipeline.execute import execute
from mlpmem_jax.pipeline.graph import Artifacts, Report
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.recipes import compute_dtypes
from mlpmem_jax.pipeline.reports import print_results, write_report
from mlpmem_jax.pipeline.stage import Rebuild, Stage
from mlpmem_jax.stats.bootstrap import INTERVALS
from mlpmem_jax.store.array_specs import SPLITS
from mlpmem_jax.store.manifest import Artifact, Completion
from mlpmem_jax.studies.search_quality.settings import with_setting
from mlpmem_jax.studies.search_quality.table import as_csv, as_text
from mlpmem_jax.studies.tables.variants import made_by

NAME: Report = "search-quality"
_SEARCHED = (index, retrieve, train)


def comparison(run: Artifacts) -> Artifact:
    """Returns the tables and pictures of the comparison, in `results/`."""
    config, names = run.config, ("bootstrap_samples", "confidence", "knn_valid_rows")
    evaluate = config.evaluate.recipe()
    recipe = {
        "seed": config.seed,
        "evaluate": {name: evaluate[name] for name in names} | {"intervals": INTERVALS},
        "search_quality": config.search_quality.recipe(),
        **compute_dtypes(config, "decoder", "memory"),
    }
    inputs = [run.tokens, run.decoder, *(run.datastore(split) for split in SPLITS)]
    for one in _parts(run):
        inputs += [one.index, one.targets("train"), one.targets("valid"), one.memory]
    return run.report(NAME, recipe, inputs)


def _parts(run: Artifacts) -> list[Artifacts]:
    return [with_setting(run, setting) for setting in run.config.search_quality.settings]


def stages(run: Artifacts) -> list[Stage]:
    """Returns the stages: the datastore, then index, targets and memory of each setting."""
    first = [stage for command in (tokenize, pretrain, embed) for stage in command.stages(run)]
    # Equal artifacts are one: the exact neighbours, for example, are those of all settings.
    of_settings = [
        stage for one in _parts(run) for command in _SEARCHED for stage in command.stages(one)
    ]
    report = Stage(
        artifact=comparison(run),
        build=functools.partial(_build, run),
        check=functools.partial(_check, run),
        estimate=functools.partial(_estimate, run),
        need=functools.partial(needs.search_quality_need, run),
        is_report=True,
    )
    return [*made_by([*first, *of_settings]), report]


def _check(run: Artifacts) -> None:
    """Refuses settings whose engine is not installed, and targets that no search makes.

    Raises:
        ConfigError: Names the setting and the way out.
    """
    from mlpmem_jax.retrieval.engine import is_approximate_installed

    config = run.config
    if config.targets.teacher != "knn":
        raise ConfigError(
            f"targets.teacher={config.targets.teacher}: {NAME} is about targets that are searched "
            "for (targets.teacher=knn)"
        )
    asked = [one.name for one in config.search_quality.settings if one.engine == "scann"]
    if asked and not is_approximate_installed():
        raise ConfigError(
            f"search_quality.settings: {', '.join(asked)} need the package scann, which is not "
            "installed (pip install scann; Linux only)"
        )
    check_devices(run, "evaluate")


def _estimate(run: Artifacts) -> Mapping[str, Any]:
    count = len(run.config.search_quality.settings)
    return {"indices to build and memories to train": count}


def _build(run: Artifacts) -> Completion:
    from mlpmem_jax.parallel.mesh import make_mesh
    from mlpmem_jax.studies.search_quality.picture import draw
    from mlpmem_jax.studies.search_quality.study import measure_settings

    path = comparison(run).path
    results = measure_settings(run, make_mesh(run.config.mesh), path)
    files = write_report(path, NAME, results, as_csv(results), draw(results))
    return Completion(counts={"settings": len(results["settings"])}, files=files)


def main(run: Artifacts, options: Options) -> int:
    """Runs the command."""
    check_trained_apart(run, NAME, "joint models are compared by compare")
    check_trains_memory(run, NAME)
    teacher = run.config.targets.workdir
    if teacher is not None:
        raise ConfigError(
            f"targets.workdir={teacher}: {NAME} makes the targets of each setting itself; drop the "
            "key"
        )
    if run.config.retrieval.keep_train == "all":
        why = "kept neighbours follow from those before: use retrieval.keep_train=none"
        check_unchanged_text(run, NAME, why)
    return execute(
        stages,
        run,
        options,
        Rebuild.STALE,
        lambda run: print_results(comparison(run), NAME, as_text),
    )
