"""Cost against the size of the datastore; on request quality too."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from mlpmem_jax.config.schema import Config
from mlpmem_jax.console import say
from mlpmem_jax.errors import ArtifactError, ConfigError
from mlpmem_jax.pipeline import embed, index, retrieve, train
from mlpmem_jax.pipeline.checks import check_devices, check_trained_apart
from mlpmem_jax.pipeline.evaluate import RESULTS as EVALUATED
from mlpmem_jax.pipeline.evaluate import check_current
from mlpmem_jax.pipeline.execute import execute_and_report
from mlpmem_jax.pipeline.fitting import Need
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.reports import print_files, write_report
from mlpmem_jax.pipeline.resolve import compute_dtypes
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.array_specs import SPLITS, Split, datastore_arrays
from mlpmem_jax.store.files import read_json
from mlpmem_jax.store.layout import Layout
from mlpmem_jax.store.manifest import Completion

NAME = "cost"


def recipe(config: Config) -> dict[str, Any]:
    """Returns what decides the measurement, besides the run that it is about."""
    retrieval = config.retrieval.recipe()
    return {
        "seed": config.seed,
        "retrieval": {name: retrieval[name] for name in index.KEYS},
        "cost": config.cost.recipe(),
        **compute_dtypes(config, "decoder", "memory"),
    }


def stages(config: Config) -> list[Stage]:
    """Returns the stages: parts of the datastore with their memories if wanted, the report."""
    layout = Layout(config)
    parts = _parts(config)
    stages_ = [stage for rows, part in parts[:-1] for stage in _part_stages(config, part, rows)]
    upstream = (
        layout.tokens,
        layout.decoder,
        layout.datastore("train"),
        layout.memory,
        layout.results,
        *(Layout(part).memory for _, part in parts[:-1]),
    )
    report = Stage(
        artifact=layout.cost,
        recipe=recipe(config),
        upstream=upstream,
        build=functools.partial(_build, config),
        check=functools.partial(_check, config),
        estimate=functools.partial(_estimate, config),
    )
    return [*stages_, report]


def _sizes(config: Config) -> list[int]:
    from mlpmem_jax.studies.cost.measurements import sizes

    rows = int(Layout(config).datastore("train").load().counts["rows"])
    return sizes(rows, config.cost.doublings, config.retrieval.num_neighbors)


def _parts(config: Config) -> list[tuple[int, Config]]:
    """Returns rows and configuration of the parts that get a memory; last the run itself."""
    if config.cost.quality == "none":
        return [(0, config)]
    from mlpmem_jax.studies.cost.quality import with_rows

    sizes = _sizes(config)
    return [*((rows, with_rows(config, rows)) for rows in sizes[:-1]), (sizes[-1], config)]


def _part_stages(config: Config, part: Config, rows: int) -> list[Stage]:
    whole, layout = Layout(config), Layout(part)
    # The same origin for all splits: retrieval compares them.
    upstream = (whole.tokens, whole.decoder, *(whole.datastore(split) for split in SPLITS))
    copies = [
        Stage(
            artifact=layout.datastore(split),
            recipe={**embed.recipe(part), "first_rows": rows},
            upstream=upstream,
            build=functools.partial(_copy, config, part, split, rows),
        )
        for split in SPLITS
    ]
    made = [*copies, *index.stages(part), *retrieve.stages(part), *train.stages(part)]
    # Of fewer rows than the run's tokens have, by which needs are counted; the run itself fits.
    return [dataclasses.replace(stage, need=lambda machine, count: Need()) for stage in made]


def _copy(config: Config, part: Config, split: Split, rows: int) -> Completion:
    from mlpmem_jax.store.copies import copy_rows

    source, layout = Layout(config).datastore(split), Layout(part)
    num_rows = rows if split == "train" else int(source.load().counts["rows"])
    arrays = copy_rows(
        source,
        layout.datastore(split),
        datastore_arrays(config.datastore, config.decoder.width),
        num_rows,
    )
    return Completion(counts={"rows": num_rows}, arrays=arrays)


def _check(config: Config) -> None:
    """Refuses what is known to fail: no ScaNN, a prompt that does not fit, too few rows.

    Raises:
        ConfigError: Names the key, its value and what is allowed.
    """
    from mlpmem_jax.retrieval.engine import is_approximate_installed

    check_trained_apart(config, NAME, "the time that a joint model takes is in evaluate")
    cost, context = config.cost, config.decoder.context_tokens
    if "scann" in cost.engines and not is_approximate_installed():
        raise ConfigError(
            "cost.engines holds scann: the package scann is not installed (pip install scann; "
            "Linux only); cost.engines='[exact]' needs no package"
        )
    if cost.prompt_tokens > context:
        raise ConfigError(
            f"cost.prompt_tokens={cost.prompt_tokens} is longer than "
            f"decoder.context_tokens={context}"
        )
    _sizes(config)
    check_current(config)
    if cost.quality == "train":
        check_devices(config, "evaluate")
        _refuse_other_settings(config)


def _refuse_other_settings(config: Config) -> None:
    """Refuses to train parts otherwise than the run was, which is the largest of them.

    Raises:
        ArtifactError: Names the artifact and what differs.
    """
    for command in (embed, index, retrieve, train):
        for stage in command.stages(config):
            if stage.artifact.is_complete():
                stage.artifact.status(stage.recipe, stage.made_from())


def _estimate(config: Config) -> Mapping[str, Any]:
    try:
        sizes = _sizes(config)
    except ArtifactError:
        return {"sizes": "known once the datastore exists"}
    specs = datastore_arrays(config.datastore, config.decoder.width)
    return {
        "rows of each size": ", ".join(f"{rows:,}" for rows in sizes),
        "times that a size is measured": config.cost.rounds,
        "memories to train": len(_parts(config)) - 1,
        "bytes of the largest keys": sizes[-1] * specs["key"].row_bytes,
    }


def _build(config: Config) -> Completion:
    from mlpmem_jax.parallel.mesh import make_mesh
    from mlpmem_jax.studies.cost.picture import draw
    from mlpmem_jax.studies.cost.quality import measure_quality
    from mlpmem_jax.studies.cost.study import measure_growth
    from mlpmem_jax.studies.cost.table import as_csv

    layout, mesh = Layout(config), make_mesh(config.mesh)
    layout.results.verify()
    evaluated = read_json(layout.results.path / EVALUATED)
    results = measure_growth(config, evaluated, mesh, layout.cost.path)
    if config.cost.quality == "train":
        results["quality"] = measure_quality(config, _parts(config), mesh)
    files = write_report(layout.cost.path, NAME, results, as_csv(results), draw(results))
    return Completion(counts={"sizes": len(results["rows"])}, files=files)


def print_report(config: Config) -> None:
    """Prints the tables of a finished measurement."""
    from mlpmem_jax.studies.cost.table import as_text

    artifact = Layout(config).cost
    artifact.verify()
    say()
    say(as_text(read_json(artifact.path / f"{NAME}.json")))
    print_files(artifact.path, NAME)


def main(config: Config, options: Options) -> int:
    """Runs the command."""
    return execute_and_report(stages, print_report, config, options)
