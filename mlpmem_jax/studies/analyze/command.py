"""Where a finished run helps: by token frequency, by n-gram, and how sharp it predicts."""

import functools
from typing import Any

from mlpmem_jax.config.schema import Config
from mlpmem_jax.console import say
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.pipeline.checks import check_devices, check_trained_apart
from mlpmem_jax.pipeline.evaluate import RESULTS as EVALUATED
from mlpmem_jax.pipeline.evaluate import check_current
from mlpmem_jax.pipeline.execute import execute_and_report
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.reports import print_files, write_report
from mlpmem_jax.pipeline.resolve import compute_dtypes
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.stats.bootstrap import INTERVALS
from mlpmem_jax.store.array_specs import SPLITS
from mlpmem_jax.store.files import read_json
from mlpmem_jax.store.layout import Layout
from mlpmem_jax.store.manifest import Completion

NAME = "analyze"


def recipe(config: Config) -> dict[str, Any]:
    """Returns what decides the analysis, besides the run that it is about."""
    names = ("bootstrap_samples", "confidence")
    evaluate = config.evaluate.recipe()
    return {
        "seed": config.seed,
        "evaluate": {name: evaluate[name] for name in names} | {"intervals": INTERVALS},
        "analyze": config.analyze.recipe(),
        **compute_dtypes(config, "decoder", "memory"),
    }


def stages(config: Config) -> list[Stage]:
    """Returns the one stage of this command."""
    layout = Layout(config)
    upstream = (
        layout.tokens,
        layout.decoder,
        *(layout.datastore(split) for split in SPLITS),
        layout.neighbors("test"),
        layout.memory,
        layout.results,
    )
    return [
        Stage(
            artifact=layout.analysis,
            recipe=recipe(config),
            upstream=upstream,
            build=functools.partial(_build, config),
            check=functools.partial(_check, config),
        )
    ]


def _check(config: Config) -> None:
    check_trained_apart(config, NAME, "tables of joint models are made by evaluate and compare")
    if config.memory.gate == "learned":
        raise ConfigError(
            "memory.gate=learned: analyze mixes with one λ for all tokens (memory.gate=none)"
        )
    check_devices(config, "datastore", "evaluate")
    check_current(config)


def _build(config: Config) -> Completion:
    from mlpmem_jax.parallel.mesh import make_mesh
    from mlpmem_jax.studies.analyze.picture import draw
    from mlpmem_jax.studies.analyze.study import analyze_run
    from mlpmem_jax.studies.analyze.table import as_csv

    layout = Layout(config)
    layout.results.verify()
    evaluated = read_json(layout.results.path / EVALUATED)
    results = analyze_run(config, evaluated, make_mesh(config.mesh))
    files = write_report(layout.analysis.path, NAME, results, as_csv(results), draw(results))
    counts = {"test_tokens": results["test"]["tokens"], "rows": results["sharpness"]["rows"]}
    return Completion(counts=counts, files=files)


def print_report(config: Config) -> None:
    """Prints the tables of a finished analysis."""
    from mlpmem_jax.studies.analyze.table import as_text

    artifact = Layout(config).analysis
    artifact.verify()
    say()
    say(as_text(read_json(artifact.path / f"{NAME}.json")))
    print_files(artifact.path, NAME)


def main(config: Config, options: Options) -> int:
    """Runs the command."""
    return execute_and_report(stages, print_report, config, options)
