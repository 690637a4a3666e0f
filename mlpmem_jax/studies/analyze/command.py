"""Where a finished run helps: by token frequency, by n-gram, and how sharp it predicts."""

import functools

from mlpmem_jax.errors import ConfigError
from mlpmem_jax.pipeline.checks import check_devices, check_trained_apart, check_unchanged_text
from mlpmem_jax.pipeline.evaluate import RESULTS as EVALUATED
from mlpmem_jax.pipeline.evaluate import check_current
from mlpmem_jax.pipeline.execute import execute
from mlpmem_jax.pipeline.graph import Artifacts, Report
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.recipes import compute_dtypes
from mlpmem_jax.pipeline.reports import print_results, write_report
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.stats.bootstrap import INTERVALS
from mlpmem_jax.store.array_specs import SPLITS
from mlpmem_jax.store.files import read_json
from mlpmem_jax.store.manifest import Artifact, Completion
from mlpmem_jax.studies.analyze.table import as_csv, as_text

NAME: Report = "analyze"


def analysis(run: Artifacts) -> Artifact:
    """Returns the tables and pictures of the analysis, in `results/`."""
    config, names = run.config, ("bootstrap_samples", "confidence")
    evaluate = config.evaluate.recipe()
    recipe = {
        "seed": config.seed,
        "evaluate": {name: evaluate[name] for name in names} | {"intervals": INTERVALS},
        "analyze": config.analyze.recipe(),
        **compute_dtypes(config, "decoder", "memory"),
    }
    inputs = (
        run.tokens,
        run.decoder,
        *(run.datastore(split) for split in SPLITS),
        run.neighbors("test"),
        run.memory,
        run.results,
    )
    return run.report(NAME, recipe, inputs)


def stages(run: Artifacts) -> list[Stage]:
    """Returns the one stage of this command."""
    build, check = functools.partial(_build, run), functools.partial(_check, run)
    return [Stage(analysis(run), build, check=check)]


def _check(run: Artifacts) -> None:
    if run.config.memory.has_gate:
        raise ConfigError(
            f"memory.gate={run.config.memory.gate}: analyze mixes with one λ for all tokens "
            "(memory.gate=none)"
        )
    check_devices(run, "datastore", "evaluate")
    check_current(run)


def _build(run: Artifacts) -> Completion:
    from mlpmem_jax.parallel.mesh import make_mesh
    from mlpmem_jax.studies.analyze.picture import draw
    from mlpmem_jax.studies.analyze.study import analyze_run

    table = run.results
    table.verify()
    results = analyze_run(run, read_json(table.path / EVALUATED), make_mesh(run.config.mesh))
    files = write_report(analysis(run).path, NAME, results, as_csv(results), draw(results))
    counts = {"test_tokens": results["test"]["tokens"], "rows": results["sharpness"]["rows"]}
    return Completion(counts=counts, files=files)


def main(run: Artifacts, options: Options) -> int:
    """Runs the command."""
    check_unchanged_text(run, NAME, "n-grams are counted in the text as it was first read")
    check_trained_apart(run, NAME, "tables of joint models are made by evaluate and compare")
    return execute(
        stages, run, options, report=lambda run: print_results(analysis(run), NAME, as_text)
    )
