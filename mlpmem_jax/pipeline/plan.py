"""What a command would do: `--dry-run`."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from mlpmem_jax.console import say
from mlpmem_jax.corpus.row_estimates import likely_rows
from mlpmem_jax.errors import ArtifactError, StaleArtifact, UserError
from mlpmem_jax.parallel.hardware import Machine, this_machine
from mlpmem_jax.pipeline.fitting import counted, doubts
from mlpmem_jax.pipeline.forecast import Expected, Forecaster, duration
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.stage import Rebuild, Stage, check_stage
from mlpmem_jax.store import nearest
from mlpmem_jax.store.manifest import Status
from mlpmem_jax.units import human_bytes


def print_plan(run: Artifacts, stages: Sequence[Stage], rebuild: Rebuild) -> None:
    """Prints the state of each artifact and the estimates, then what this machine has."""
    config, machine = run.config, this_machine(str(run.store))
    estimates = [stage.estimate() for stage in stages]
    times = _times(run, stages, estimates, machine)
    made = {stage.artifact.relative for stage in stages}
    say(f"# plan for workdir {config.workdir}")
    for stage, estimate in zip(stages, estimates, strict=True):
        say(f"{stage.name:<28} {intention(stage, rebuild, made)}")
        for name, value in {**estimate, **needed(stage, machine)}.items():
            say(f"  {name:<34} {_shown(name, value)}")
        if stage.name in times:
            say(f"  {'time, about':<34} {duration(times[stage.name])} (estimated)")
    if not stages:
        say("nothing to make")
    for line in doubts(stages, machine):
        say(line)
    say()
    say("# this machine")
    for name, value in machine.has().items():
        say(f"  {name:<34} {_shown(name, value)}")


def _times(
    run: Artifacts,
    stages: Sequence[Stage],
    estimates: Sequence[Mapping[str, Any]],
    machine: Machine,
) -> dict[str, float]:
    """Returns the seconds of stages to come; none on accelerators, whose rates are not known."""
    if machine.platform != "cpu":
        return {}
    from mlpmem_jax.training.flops import measure_cpu_flops

    likely = likely_rows(run.config.corpus, run.tokens)
    rows = {str(split): num_rows for split, num_rows in likely.items()}
    known = rows if rows["train"] else None
    forecaster = Forecaster(run.store, measure_cpu_flops(), known, run.config.decoder.width)
    missing = [
        Expected(stage.artifact, estimate)
        for stage, estimate in zip(stages, estimates, strict=True)
        if not stage.artifact.is_complete() and skipped(stage) is None
    ]
    found = zip(missing, forecaster.seconds(missing), strict=True)
    return {one.artifact.title: seconds for one, seconds in found if seconds is not None}


def needed(stage: Stage, machine: Machine) -> dict[str, Any]:
    """Returns how a stage goes about its work, and what it needs at least of memory, most likely.

    Nothing where it is little.
    """
    need = stage.need(machine, counted(likely_rows))
    moments = need.moments
    device = max((moment.device_bytes for moment in moments), default=0)
    host = max((moment.host_bytes_on(machine) for moment in moments), default=0)
    found = {
        "bytes on disk for a time": need.temporary_bytes,
        "least bytes of each device": device,
        "least bytes of host memory": host,
    }
    if machine.platform == "cpu":
        del found["least bytes of each device"]
    return {**need.plan, **{name: size for name, size in found.items() if size}}


def skipped(stage: Stage) -> str | None:
    """Returns why an artifact is not needed; None: it is, or that is not known yet."""
    try:
        return stage.skip()
    except ArtifactError:
        return None


def intention(stage: Stage, rebuild: Rebuild, made: Collection[str] | None = None) -> str:
    """Returns what would happen to an artifact, in words.

    Args:
        stage: What makes it.
        rebuild: What happens to artifacts that are there already.
        made: What the command makes before it, by path in the store; None: all that it needs.
    """
    try:
        check_stage(stage, rebuild)
    except UserError as error:
        return f"REFUSED: {'; '.join(error.messages)}"
    reason = skipped(stage)
    if reason is not None:
        return f"not needed ({reason})"
    try:
        made_from = stage.made_from()
    except StaleArtifact as error:
        return f"REFUSED: {error}"
    except ArtifactError as error:
        inputs = {one.relative for one in stage.artifact.inputs if not one.is_complete()}
        if made is not None and not inputs <= set(made):
            return f"REFUSED: {error}"
        return "will be made, after its inputs" + nearest.in_words(stage.artifact)
    try:
        status = stage.status(made_from, rebuild)
    except ArtifactError as error:
        if rebuild is Rebuild.REFUSE:
            return f"REFUSED: {error}"
        return "stale or damaged; will be made again"
    return {
        Status.COMPLETE: "complete; will be made again"
        if rebuild is Rebuild.ALWAYS
        else "complete; nothing to do",
        Status.PARTIAL: "begun; will be continued",
        Status.MISSING: "will be made" + nearest.in_words(stage.artifact),
    }[status]


def _shown(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_shown(f'{name} {key}', item)}" for key, item in value.items())
    if isinstance(value, str):
        return value
    if "bytes" in name:
        return human_bytes(value)
    if "flops" in name:
        return f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
