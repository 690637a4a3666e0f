"""What the commands that make many runs share: plan, forecast, progress, and the end.

Work is planned lazily: what one piece is sized by may be measured by the one before.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mlpmem_jax.console import say
from mlpmem_jax.evaluation.draws import Family, Settings
from mlpmem_jax.parallel.hardware import this_machine
from mlpmem_jax.pipeline import tokenize
from mlpmem_jax.pipeline.execute import check_config_file, record, write_run
from mlpmem_jax.pipeline.fitting import check_fit, doubts
from mlpmem_jax.pipeline.forecast import Expected, Forecast, Forecaster, duration
from mlpmem_jax.pipeline.graph import Artifacts, Report
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.plan import intention, skipped
from mlpmem_jax.pipeline.stage import Rebuild, Stage, run_stages
from mlpmem_jax.stats.bootstrap import INTERVALS
from mlpmem_jax.store.array_specs import SPLITS
from mlpmem_jax.store.manifest import Artifact, Completion
from mlpmem_jax.studies.tables.part_scores import SCORED
from mlpmem_jax.studies.tables.rows import Row
from mlpmem_jax.studies.tables.texts import refuse_other_documents
from mlpmem_jax.studies.tables.variants import made_by

_PEAK_SECONDS = 2.0
# Of the forecast before the machine is measured; a dry run makes nothing.
_DRY_PEAK_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class Work:
    """One piece of a suite.

    Attributes:
        title: For people, for example "seed 0, + memory".
        stages: Returns its stages; asked for when it is its turn.
        uses_costs: Whether they change as costs become known.
    """

    title: str
    stages: Callable[[], list[Stage]]
    uses_costs: bool = False


RowsBySeed = dict[int, list[Row]]


def rows_stage(
    run: Artifacts,
    command: Report,
    tables: Mapping[str, RowsBySeed],
    recipe: Mapping[str, Any],
    build: Callable[[Artifacts, Artifact, Mapping[str, RowsBySeed]], Completion],
) -> Stage:
    """Returns the stage that makes tables from the finished scores of their rows.

    Args:
        tables: The rows, by table and seed.
        recipe: What else decides the content.
        build: Makes them.
    """
    rows = [row for table in tables.values() for of_seed in table.values() for row in of_seed]
    scores = {
        part.scores(split).relative: part.scores(split)
        for row in rows
        for part in row.parts
        for split in SCORED
    }
    named = {
        name: {
            # A list: tables show labels, and have an order.
            str(seed): [
                [row.key, row.label, [part.scores("test").relative for part in row.parts]]
                for row in of_seed
            ]
            for seed, of_seed in table.items()
        }
        for name, table in tables.items()
    }
    evaluate = run.config.evaluate.recipe()
    keys = ("bootstrap_samples", "confidence")
    intervals = {key: evaluate[key] for key in keys} | {"intervals": INTERVALS}
    whole = {"seed": run.config.seed, "rows": named, "evaluate": intervals, **recipe}
    artifact = run.report(command, whole, (run.tokens, *scores.values()))
    return Stage(
        artifact=artifact,
        upstream=lambda: (*artifact.inputs, run.machine),
        build=functools.partial(build, run, artifact, tables),
    )


def interval_settings(
    run: Artifacts,
    reference: str,
    full_gain: str = "",
    family: Family | None = None,
    tables: int = 1,
) -> Settings:
    """Returns how intervals are made, as configured; the rest is as in `Settings`."""
    return Settings(
        bootstrap_samples=run.config.evaluate.bootstrap_samples,
        confidence=run.config.evaluate.confidence,
        seed=run.config.seed,
        reference=reference,
        full_gain=full_gain,
        family=family,
        tables=tables,
    )


def machine_stage(run: Artifacts) -> Stage:
    """Returns the stage that measures the machine, once, so that costs stay the same."""
    peak = functools.partial(cpu_peak_flops, _PEAK_SECONDS)
    return Stage(artifact=run.machine, build=lambda: Completion(counts={"peak_flops": peak()}))


def cpu_peak_flops(seconds: float) -> float:
    """Returns the float32 flop/s of this machine's CPU, where searches run."""
    import jax

    from mlpmem_jax.training.flops import measure_cpu_flops

    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return measure_cpu_flops(seconds)


def run_suite(
    command: str,
    run: Artifacts,
    options: Options,
    works: Sequence[Work],
    table: Callable[[], Stage],
    report: Callable[[Artifact], None],
) -> int:
    """Plans or does all the work, makes the table and prints it; returns the exit code.

    Args:
        works: The pieces, in an order in which each finds what it is sized by.
        table: Returns the last stage.
        report: Prints the finished table.
    """
    rebuild = Rebuild.STALE if options.rebuild else Rebuild.REFUSE
    check_config_file(run)
    tokens = tokenize.stages(run)
    # Planned once before anything is made, so that a mistake costs a second, not an hour.
    planned = [work.stages() for work in works]
    if options.dry_run:
        _print_plan(command, run, [*tokens, machine_stage(run)], works, table, rebuild)
        return 0

    def make(stages: Sequence[Stage], rebuild: Rebuild = rebuild) -> None:
        run_stages(stages, rebuild, before_building=lambda: write_run(run, stages))
        record(run, stages)

    check_fit([*tokens, *_each_once(planned)])
    text = [one for one in _each_once(planned) if one.artifact.kind in ("tokenizer", "tokens")]
    make([*made_by([*tokens, *text]), machine_stage(run)])
    refuse_other_documents(run, _each_once(planned))
    # Again, and before networks are trained: the vocabulary is known now.
    planned = [work.stages() for work in works]
    check_fit(_each_once(planned))
    peak = float(run.machine.load().counts["peak_flops"])
    done: dict[str, None] = {}
    estimates = Estimates()
    for place, work in enumerate(works):
        for later in range(place, len(works)):
            if later == place or works[later].uses_costs:
                planned[later] = works[later].stages()
        stages = [one for one in made_by(planned[place]) if one.artifact.relative not in done]
        rest = [stage for later in planned[place:] for stage in later]
        forecast = _forecast(run, made_by(rest), peak, estimates, done)
        if place == 0:
            say(f"{command}: {_in_words(forecast)}")
        if forecast.num_missing:
            left = duration(forecast.total_seconds)
            say(f"{command}: {place + 1} of {len(works)}, {work.title}; {left} left (estimated)")
        make(stages)
        done |= dict.fromkeys(stage.artifact.relative for stage in stages)
    last = table()
    make([last], _of_table(rebuild))
    report(last.artifact)
    return 0


def _of_table(rebuild: Rebuild) -> Rebuild:
    """Returns what happens to a table that is there: it takes seconds, and may be damaged."""
    return Rebuild.ALWAYS if rebuild is Rebuild.STALE else rebuild


def _each_once(planned: Sequence[Sequence[Stage]]) -> list[Stage]:
    return made_by([stage for piece in planned for stage in piece])


class Estimates:
    """The estimates of stages, asked once for each artifact: to trace networks takes time."""

    def __init__(self) -> None:
        self._known: dict[str, Mapping[str, Any]] = {}

    def of(self, stage: Stage) -> Expected:
        """Returns a stage's artifact with its estimate, if it is not finished."""
        if stage.artifact.is_complete():
            return Expected(stage.artifact, {})
        key = str(stage.artifact.path)
        if key not in self._known or "model flops" not in self._known[key]:
            self._known[key] = stage.estimate()
        return Expected(stage.artifact, self._known[key])


def _forecast(
    run: Artifacts,
    stages: Sequence[Stage],
    peak: float,
    estimates: Estimates,
    others: Iterable[str] = (),
) -> Forecast:
    num_rows: dict[str, int] | None = None
    if run.tokens.is_complete():
        counts = run.tokens.load().counts
        num_rows = {split: int(counts[f"{split}_tokens"]) - 1 for split in SPLITS}
    forecaster = Forecaster(run.store, peak, num_rows, run.config.decoder.width)
    needed = [stage for stage in stages if skipped(stage) is None]
    return forecaster.forecast([estimates.of(stage) for stage in needed], others)


def _in_words(forecast: Forecast) -> str:
    text = f"{forecast.num_artifacts} artifacts, {forecast.num_missing} to be made"
    if not forecast.num_missing:
        return text
    text += (
        f"; networks {forecast.flops:.3g} model flops; about "
        f"{duration(forecast.total_seconds)} in all (estimated)"
    )
    if forecast.unknown:
        unknown = ", ".join(forecast.unknown)
        text += f", and {unknown}, known once there are tokens (command `tokenize`)"
    return text


def _print_plan(
    command: str,
    run: Artifacts,
    first: Sequence[Stage],
    works: Sequence[Work],
    table: Callable[[], Stage],
    rebuild: Rebuild,
) -> None:
    peak = cpu_peak_flops(_DRY_PEAK_SECONDS)
    say(f"# plan of {command} for workdir {run.config.workdir}")
    everything = made_by([*first, *(stage for work in works for stage in work.stages())])
    for stage in everything:
        say(f"{stage.name:<44} {intention(stage, rebuild)}")
    last = table()
    say(f"{last.name:<44} {intention(last, _of_table(rebuild))}")
    for line in doubts(everything, this_machine(str(run.store))):
        say(line)
    forecast = _forecast(run, everything, peak, Estimates())
    say()
    for kind, seconds in forecast.seconds.items():
        say(f"  {kind:<12} {duration(seconds)} (estimated)")
    say(f"{command}: {_in_words(forecast)}")
