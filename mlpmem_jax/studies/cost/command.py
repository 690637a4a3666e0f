"""Cost against the size of the datastore; on request quality too."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from mlpmem_jax.errors import ArtifactError, ConfigError
from mlpmem_jax.pipeline import index, recipes, retrieve, train
from mlpmem_jax.pipeline.checks import (
    check_devices,
    check_trained_apart,
    check_trains_memory,
    check_unchanged_text,
)
from mlpmem_jax.pipeline.evaluate import RESULTS as EVALUATED
from mlpmem_jax.pipeline.evaluate import check_current
from mlpmem_jax.pipeline.execute import execute
from mlpmem_jax.pipeline.fitting import Need
from mlpmem_jax.pipeline.graph import Artifacts, Report
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.reports import print_results, write_report
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.array_specs import SPLITS, Split, datastore_arrays
from mlpmem_jax.store.files import read_json
from mlpmem_jax.store.manifest import Artifact, Completion
from mlpmem_jax.studies.cost.table import as_csv, as_text

NAME: Report = "cost"


def measurement(run: Artifacts) -> Artifact:
    """Returns the tables and pictures of the measurement, in `results/`."""
    config = run.config
    recipe = {
        "index": recipes.index(config),
        "cost": config.cost.recipe(),
        **recipes.compute_dtypes(config, "decoder", "memory"),
    }
    inputs = (
        run.tokens,
        run.decoder,
        run.datastore("train"),
        run.memory,
        run.results,
        *(part.memory for _, part in _parts(run)[:-1]),
    )
    return run.report(NAME, recipe, inputs)


def stages(run: Artifacts) -> list[Stage]:
    """Returns the stages: parts of the datastore with their memories if wanted, the report."""
    parts = [stage for rows, part in _parts(run)[:-1] for stage in _part_stages(run, part, rows)]
    report = Stage(
        artifact=measurement(run),
        build=functools.partial(_build, run),
        check=functools.partial(_check, run),
        estimate=functools.partial(_estimate, run),
    )
    return [*parts, report]


def _sizes(run: Artifacts) -> list[int]:
    from mlpmem_jax.studies.cost.measurements import sizes

    rows = int(run.datastore("train").load().counts["rows"])
    return sizes(rows, run.config.cost.doublings, run.config.retrieval.num_neighbors)


def _parts(run: Artifacts) -> list[tuple[int, Artifacts]]:
    """Returns rows and artifacts of the parts that get a memory; last the run itself."""
    if run.config.cost.quality == "none":
        return [(0, run)]
    from mlpmem_jax.studies.cost.quality import with_rows

    sizes = _sizes(run)
    return [*((rows, with_rows(run, rows)) for rows in sizes[:-1]), (sizes[-1], run)]


def _part_stages(run: Artifacts, part: Artifacts, rows: int) -> list[Stage]:
    copies = [
        Stage(
            artifact=part.datastore(split),
            build=functools.partial(_copy, run, part, split, rows),
        )
        for split in SPLITS
    ]
    made = [*copies, *index.stages(part), *retrieve.stages(part), *train.stages(part)]
    # Of fewer rows than the run's tokens have, by which needs are counted; the run itself fits.
    return [dataclasses.replace(stage, need=lambda machine, count: Need()) for stage in made]


def _copy(run: Artifacts, part: Artifacts, split: Split, rows: int) -> Completion:
    from mlpmem_jax.store.copies import copy_rows

    config, source = run.config, run.datastore(split)
    num_rows = rows if split == "train" else int(source.load().counts["rows"])
    specs = datastore_arrays(config.datastore, config.decoder.width)
    arrays = copy_rows(source, part.datastore(split), specs, num_rows)
    return Completion(counts={"rows": num_rows}, arrays=arrays)


def _check(run: Artifacts) -> None:
    """Refuses what is known to fail: no ScaNN, a prompt that does not fit, too few rows.

    Raises:
        ConfigError: Names the key, its value and what is allowed.
    """
    from mlpmem_jax.retrieval.engine import is_approximate_installed

    config = run.config
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
    if cost.quality == "train" and config.targets.teacher != "knn":
        raise ConfigError(
            f"cost.quality=train makes the targets of each part from its own rows, and "
            f"targets.teacher={config.targets.teacher} makes them from all tokens: use "
            "cost.quality=none"
        )
    _sizes(run)
    for one in (run.memory, run.results):  # Before parts of the datastore are copied.
        one.load()
    check_current(run)
    if cost.quality == "train":
        check_devices(run, "evaluate")


def _estimate(run: Artifacts) -> Mapping[str, Any]:
    try:
        sizes = _sizes(run)
    except ArtifactError:
        return {"sizes": "known once the datastore exists"}
    config = run.config
    specs = datastore_arrays(config.datastore, config.decoder.width)
    return {
        "rows of each size": ", ".join(f"{rows:,}" for rows in sizes),
        "times that a size is measured": config.cost.rounds,
        "memories to train": len(_parts(run)) - 1,
        "bytes of the largest keys": sizes[-1] * specs["key"].row_bytes,
    }


def _build(run: Artifacts) -> Completion:
    from mlpmem_jax.parallel.mesh import make_mesh
    from mlpmem_jax.studies.cost.picture import draw
    from mlpmem_jax.studies.cost.quality import measure_quality
    from mlpmem_jax.studies.cost.study import measure_growth

    mesh, table, path = make_mesh(run.config.mesh), run.results, measurement(run).path
    table.verify()
    results = measure_growth(run, read_json(table.path / EVALUATED), mesh, path)
    if run.config.cost.quality == "train":
        results["quality"] = measure_quality(run, _parts(run), mesh)
    files = write_report(path, NAME, results, as_csv(results), draw(results))
    return Completion(counts={"sizes": len(results["rows"])}, files=files)


def main(run: Artifacts, options: Options) -> int:
    """Runs the command."""
    check_trained_apart(run, NAME, "the time that a joint model takes is in evaluate")
    if run.config.cost.quality == "train":
        check_trains_memory(run, "cost.quality=train")
        why = "its parts are the first rows of the text as it was first read: use cost.quality=none"
        check_unchanged_text(run, "cost.quality=train", why)
    return execute(
        stages, run, options, report=lambda run: print_results(measurement(run), NAME, as_text)
    )
