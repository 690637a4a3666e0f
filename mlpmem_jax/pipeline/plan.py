"""What a command would do: `--dry-run`."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlpmem_jax.config.load import dump_config
from mlpmem_jax.config.schema import Config
from mlpmem_jax.console import say
from mlpmem_jax.corpus.row_estimates import likely_rows
from mlpmem_jax.errors import ArtifactError, MadeOtherwise, UserError
from mlpmem_jax.parallel.hardware import Machine, this_machine
from mlpmem_jax.pipeline.fitting import counted, doubts
from mlpmem_jax.pipeline.stage import Rebuild, Stage, check_stage
from mlpmem_jax.store.manifest import Status
from mlpmem_jax.units import human_bytes


def print_plan(config: Config, stages: Sequence[Stage], rebuild: Rebuild) -> None:
    """Prints the resolved configuration, the state of each artifact and the estimates."""
    say("# resolved configuration")
    say(dump_config(config).rstrip())
    say()
    machine = this_machine(config.workdir)
    say("# this machine")
    for name, value in machine.has().items():
        say(f"  {name:<34} {_shown(name, value)}")
    say()
    say(f"# plan for workdir {config.workdir}")
    for stage in stages:
        say(f"{stage.name:<28} {intention(stage, rebuild)}")
        for name, value in {**stage.estimate(), **needed(stage, machine)}.items():
            say(f"  {name:<34} {_shown(name, value)}")
    for line in doubts(stages, machine):
        say(line)


def needed(stage: Stage, machine: Machine) -> dict[str, int]:
    """Returns what a stage needs at least of memory, most likely; nothing where it is little."""
    moments = stage.need(machine, counted(likely_rows)).moments
    device = max((moment.device_bytes for moment in moments), default=0)
    host = max((moment.host_bytes_on(machine) for moment in moments), default=0)
    found = {"least bytes of each device": device, "least bytes of host memory": host}
    if machine.platform == "cpu":
        del found["least bytes of each device"]
    return {name: size for name, size in found.items() if size}


def skipped(stage: Stage) -> str | None:
    """Returns why an artifact is not needed; None: it is, or that is not known yet."""
    try:
        return stage.skip()
    except ArtifactError:
        return None


def intention(stage: Stage, rebuild: Rebuild) -> str:
    """Returns what would happen to an artifact, in words."""
    try:
        check_stage(stage, rebuild)
    except UserError as error:
        return f"REFUSED: {'; '.join(error.messages)}"
    reason = skipped(stage)
    if reason is not None:
        return f"not needed ({reason})"
    try:
        made_from = stage.made_from()
    except MadeOtherwise as error:
        return f"REFUSED: {error}"
    except ArtifactError:
        return "will be made, after what it is made from"
    try:
        status = stage.status(made_from, rebuild)
    except ArtifactError as error:
        if rebuild is Rebuild.REFUSE:
            return f"REFUSED: {error}"
        return "was made otherwise or is damaged; will be made again"
    return {
        Status.COMPLETE: "complete; will be made again"
        if rebuild is Rebuild.ALWAYS
        else "complete; nothing to do",
        Status.PARTIAL: "begun; will be continued",
        Status.MISSING: "will be made",
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
