"""The main table: the memory beside its baselines and controls, several seeds."""

import functools
from collections.abc import Mapping

from mlpmem_jax.config.suite import CompareConfig, RowName
from mlpmem_jax.console import say
from mlpmem_jax.pipeline.checks import check_trained_apart, check_trains_memory
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.reports import print_files, write_files
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.manifest import Artifact, Completion
from mlpmem_jax.studies.tables.rows import check_recipes, planned_row, row_recipe
from mlpmem_jax.studies.tables.runner import (
    RowsBySeed,
    Work,
    interval_settings,
    rows_stage,
    run_suite,
)
from mlpmem_jax.studies.tables.seed_plan import SeedPlan

RESULTS = "compare.json"
MEASURED = "measured.json"
TABLE = "compare.csv"
PAIRS = "pairs.csv"
DOCUMENTS = "documents.csv"
PICTURE = "compare.png"

REFERENCE: RowName = "decoder"
FULL_GAIN: RowName = "knn"


def row_names(compare: CompareConfig) -> list[str]:
    """Returns the rows of the table, the reference always among them."""
    chosen = compare.rows
    own = [recipe.name for recipe in compare.recipes]
    return [*([] if REFERENCE in chosen else [REFERENCE]), *chosen, *own]


def works(run: Artifacts) -> list[Work]:
    """Returns the rows of every seed, those last that are sized by what the memory cost."""
    config, found = run.config, []
    for seed in config.compare.seeds:
        plan = SeedPlan(config, seed, run.sources)
        names = row_names(config.compare)
        if (
            any(row_recipe(config.compare, name).uses_costs for name in names)
            and "memory" not in names
        ):
            names.append("memory")
        recipes = {name: row_recipe(config.compare, name) for name in names}
        for name in sorted(names, key=lambda name: recipes[name].uses_costs):
            title = f"seed {seed}, {recipes[name].label}"
            stages = functools.partial(_row_stages, plan, name)
            found.append(Work(title, stages, recipes[name].uses_costs))
    return found


def _say_what_is_missing(run: Artifacts) -> None:
    config = run.config
    plan = SeedPlan(config, config.compare.seeds[0], run.sources)
    for name in row_names(config.compare):
        if planned_row(plan, name) is None:
            recipe = row_recipe(config.compare, name)
            say(f"compare: row {recipe.label!r} is left out: {recipe.missing}")


def _row_stages(plan: SeedPlan, name: str) -> list[Stage]:
    row = planned_row(plan, name)
    return row.stages() if row else []


def rows_by_seed(run: Artifacts) -> RowsBySeed:
    """Returns the rows as they are planned now, by seed."""
    config = run.config
    return {
        seed: [
            row
            for name in row_names(config.compare)
            if (row := planned_row(SeedPlan(config, seed, run.sources), name)) is not None
        ]
        for seed in config.compare.seeds
    }


def table_stage(run: Artifacts) -> Stage:
    """Returns the stage that makes the table from finished scores."""
    return rows_stage(run, "compare", {"compare": rows_by_seed(run)}, {}, _build)


def _build(run: Artifacts, artifact: Artifact, tables: Mapping[str, RowsBySeed]) -> Completion:
    from mlpmem_jax.studies.tables import report
    from mlpmem_jax.studies.tables.assemble import table_costs, table_results
    from mlpmem_jax.studies.tables.picture import draw

    rows = tables["compare"]
    results = table_results(run, rows, interval_settings(run, REFERENCE, FULL_GAIN))
    documents = results.pop("documents")
    measured = table_costs(run, rows)
    files = {
        RESULTS: results,
        MEASURED: measured,
        TABLE: report.rows_csv(results, measured),
        PAIRS: report.pairs_csv(results),
        DOCUMENTS: report.documents_csv(documents),
        PICTURE: draw(results, measured),
    }
    write_files(artifact.path, files)
    counts = {"test_tokens": results["test"]["tokens"], "rows": len(results["rows"])}
    return Completion(counts, files=[RESULTS, PAIRS, DOCUMENTS], measured=measured)


def print_report(artifact: Artifact) -> None:
    """Prints the finished table and where its files lie."""
    from mlpmem_jax.studies.tables.report import as_text

    measured, names = artifact.load().measured, (RESULTS, TABLE, PAIRS, DOCUMENTS, PICTURE)
    print_files(artifact, names, lambda results: as_text(results, measured))


def main(run: Artifacts, options: Options) -> int:
    """Runs the command."""
    check_trained_apart(
        run, "compare", "joint training is a row of it: joint, joint_gate, compare.recipes"
    )
    check_trains_memory(run, "compare")
    check_recipes(run)
    _say_what_is_missing(run)
    table = functools.partial(table_stage, run)
    return run_suite("compare", run, options, works(run), table, print_report)
