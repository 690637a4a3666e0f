"""Sweeps of one key each around the configuration; only what depends on it is made again."""

import functools
from collections.abc import Mapping
from typing import Any

from mlpmem_jax.config.suite import SweepConfig
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.pipeline.checks import check_trains_memory
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.reports import print_files, write_files
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.manifest import Artifact, Completion
from mlpmem_jax.studies.ablate import sweeps
from mlpmem_jax.studies.ablate.sweeps import CONFIGURED, value_text
from mlpmem_jax.studies.tables.rows import Row
from mlpmem_jax.studies.tables.runner import (
    RowsBySeed,
    Work,
    interval_settings,
    rows_stage,
    run_suite,
)
from mlpmem_jax.studies.tables.seed_plan import SeedPlan, model_parts
from mlpmem_jax.studies.tables.variants import Variant, changed_variant, taught_variant

RESULTS = "ablate.json"
MEASURED = "measured.json"
TABLE = "ablate.csv"
_HELD_KEY = "memory.num_layers"


def check_sweeps(run: Artifacts) -> None:
    """Refuses sweeps that cannot be made, each with its place in the configuration.

    Raises:
        ConfigError: With one line for each mistake.
    """
    config, mistakes = run.config, []
    if not config.ablate.sweeps:
        mistakes.append("ablate.sweeps=[]: names no sweep (each has a key and values)")
    plan = SeedPlan(config, config.ablate.seeds[0], run.sources)
    for place, sweep in enumerate(config.ablate.sweeps):
        where = f"ablate.sweeps.{place}"
        if not sweep.values:
            mistakes.append(f"{where}.values=[]: needs at least one value of {sweep.key}")
        texts = [value_text(value) for value in sweep.values]
        if len(set(texts)) < len(texts):
            mistakes.append(f"{where}.values={texts} names a value twice")
        if sweep.hold != "none" and sweep.key != _HELD_KEY:
            mistakes.append(f"{where}.hold={sweep.hold} goes with {where}.key={_HELD_KEY} alone")
            continue
        if sweep.hold != "none" and not all(isinstance(v, int) and v > 0 for v in sweep.values):
            mistakes.append(f"{where}.values={texts} must be whole numbers of at least 1")
            continue
        variants = []
        for value in sweep.values:
            try:
                variants.append(variant_of(plan, sweep, value))
            except ConfigError as error:
                mistakes += [f"{where}: {message}" for message in error.messages]
        # Everything ends in what is trained: another artifact unless nothing is made anew.
        trained = {variant.run.trained.relative for variant in variants}
        if len(variants) > 1 and trained == {plan.base.run.trained.relative}:
            mistakes.append(f"{where}.key={sweep.key} has no effect on any artifact")
    if mistakes:
        raise ConfigError(mistakes)


def variant_of(plan: SeedPlan, sweep: SweepConfig, value: Any) -> Variant:
    """Returns the model for one value of one sweep.

    Raises:
        ConfigError: The key or the value is wrong.
    """
    overrides: dict[str, Any] = {sweep.key: value}
    label = f"{title_of(sweep)} = {value_text(value)}"
    if sweep.role == "teacher":
        return taught_variant(plan.base, overrides, label, texts=sweep.overrides)
    if sweep.hold == "memory_parameters":
        from mlpmem_jax.studies.tables.sizes import memory_shape

        config = plan.base.config
        if value != config.memory.num_layers:
            width = config.decoder.width
            overrides = memory_shape(config.memory, value, width, plan.vocab_size)
    return changed_variant(plan.base, overrides, label, texts=sweep.overrides)


def sweep_rows(plan: SeedPlan, sweep: SweepConfig) -> list[Row]:
    """Returns the rows of one sweep for one seed: configured, its decoder, every value."""
    return [
        Row(CONFIGURED, "as configured", model_parts(plan.base)),
        Row("decoder", "decoder", (plan.decoder,)),
        *(value_row(plan, sweep, value) for value in sweep.values),
    ]


def value_row(plan: SeedPlan, sweep: SweepConfig, value: Any) -> Row:
    """Returns the row of one value."""
    text = value_text(value)
    return Row(f"value={text}", text, model_parts(variant_of(plan, sweep, value)))


def title_of(sweep: SweepConfig) -> str:
    """Returns what a sweep is called."""
    title = sweep.key
    if sweep.role == "teacher":
        title += " of the teacher"
    if sweep.hold == "memory_parameters":
        title += ", equal parameters"
    return ", ".join([title, *sweep.overrides])


def works(run: Artifacts) -> list[Work]:
    """Returns the configured model and every value of every sweep, for every seed."""
    config, found = run.config, []
    for seed in config.ablate.seeds:
        plan = SeedPlan(config, seed, run.sources)
        configured = Row(CONFIGURED, "as configured", model_parts(plan.base))
        found.append(Work(f"seed {seed}, decoder", plan.decoder.stages))
        found.append(Work(f"seed {seed}, as configured", configured.stages))
        for sweep in config.ablate.sweeps:
            for value in sweep.values:
                title = f"seed {seed}, {title_of(sweep)} = {value_text(value)}"
                found.append(Work(title, functools.partial(_stages, plan, sweep, value)))
    return found


def _stages(plan: SeedPlan, sweep: SweepConfig, value: Any) -> list[Stage]:
    return value_row(plan, sweep, value).stages()


def table_stage(run: Artifacts) -> Stage:
    """Returns the stage that makes the tables."""
    config = run.config
    plans = {seed: SeedPlan(config, seed, run.sources) for seed in config.ablate.seeds}
    tables = {
        str(place): {seed: sweep_rows(plan, sweep) for seed, plan in plans.items()}
        for place, sweep in enumerate(config.ablate.sweeps)
    }
    recipe = {"sweeps": [sweep.recipe() for sweep in config.ablate.sweeps]}
    return rows_stage(run, "ablate", tables, recipe, _build)


def picture_name(place: int, sweep: SweepConfig) -> str:
    """Returns the file of a sweep's picture."""
    return f"ablate-{place}-{sweep.key}.png"


def _build(run: Artifacts, artifact: Artifact, tables: Mapping[str, RowsBySeed]) -> Completion:
    from mlpmem_jax.studies.tables.assemble import table_costs, table_results

    config = run.config
    settings = interval_settings(
        run,
        CONFIGURED,
        family=sweeps.against_configured,
        tables=len(config.ablate.sweeps),
    )
    found, costs, results = [], [], {}
    for place, sweep in enumerate(config.ablate.sweeps):
        rows = tables[str(place)]
        results = table_results(run, rows, settings)
        points = [(value, f"value={value_text(value)}") for value in sweep.values]
        found.append(
            {
                "key": sweep.key,
                "role": sweep.role,
                "hold": sweep.hold,
                "title": title_of(sweep),
                **sweeps.sweep_results(results, points),
                "documents": results["documents"]["test"],
            }
        )
        costs.append(table_costs(run, rows))
    names = ("seeds", "confidence", "bootstrap_samples", "valid", "test")
    table = {name: results[name] for name in names} | {"sweeps": found}
    measured = {"sweeps": costs}
    files = {RESULTS: table, MEASURED: measured, TABLE: sweeps.as_csv(table, measured)}
    for place, sweep in enumerate(config.ablate.sweeps):
        files[picture_name(place, sweep)] = sweeps.draw(table, found[place])
    write_files(artifact.path, files)
    return Completion(counts={"sweeps": len(found)}, files=[RESULTS], measured=measured)


def main(run: Artifacts, options: Options) -> int:
    """Runs the command."""
    check_trains_memory(run, "ablate")
    check_sweeps(run)
    table, report = functools.partial(table_stage, run), functools.partial(_print, run)
    return run_suite("ablate", run, options, works(run), table, report)


def _print(run: Artifacts, artifact: Artifact) -> None:
    measured = artifact.load().measured
    pictures = [picture_name(*each) for each in enumerate(run.config.ablate.sweeps)]
    print_files(
        artifact, (RESULTS, TABLE, *pictures), lambda found: sweeps.as_text(found, measured)
    )
