"""Whether stages fit the machine: refused before the first of them starts, never after days.

Needs are lower bounds, so that a refusal is never wrong; that a stage is not refused does not
prove that it fits (`compile` tells whether a step does).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlpmem_jax.console import warn
from mlpmem_jax.corpus.row_estimates import Rows, least_rows, likely_rows
from mlpmem_jax.errors import ArtifactError, UserError
from mlpmem_jax.parallel.agreement import of_all
from mlpmem_jax.parallel.hardware import Machine, bytes_under, this_machine
from mlpmem_jax.units import human_bytes

if TYPE_CHECKING:
    from mlpmem_jax.config.data import CorpusConfig
    from mlpmem_jax.pipeline.graph import Artifacts
    from mlpmem_jax.pipeline.stage import Stage
    from mlpmem_jax.store.manifest import Artifact

# Rows of each split of a run, 0 where nothing can be said.
RowCounter = Callable[["Artifacts"], Rows]
RowEstimate = Callable[["CorpusConfig", "Artifact"], Rows]
_LARGEST_SHOWN = 3
_GUESSED = "(rows guessed by the size of the text; refused after `tokenize` if it is so)"


@dataclasses.dataclass(frozen=True)
class Moment:
    """What is held in memory at the same time.

    Attributes:
        what: What it is, for the message.
        way_out: What to change so that it fits.
        device_bytes: On one device, beside which it holds more.
        host_bytes: In the memory of one process, likewise.
    """

    what: str
    way_out: str
    device_bytes: int = 0
    host_bytes: int = 0

    def host_bytes_on(self, machine: Machine) -> int:
        """Returns what the host must have: on CPU the devices' memory is the host's."""
        devices = machine.local_devices if machine.platform == "cpu" else 0
        return self.host_bytes + devices * self.device_bytes


@dataclasses.dataclass(frozen=True)
class Need:
    """What a stage needs at least.

    Attributes:
        disk_bytes: What it leaves on disk.
        moments: What it holds in memory, one after the other.
        temporary_bytes: What it has on disk beside that, until it is made.
        plan: How it goes about its work on this machine, for `--dry-run`: name to number or text.
    """

    disk_bytes: int = 0
    moments: tuple[Moment, ...] = ()
    temporary_bytes: int = 0
    plan: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def check_fit(stages: Sequence["Stage"], *, everything: bool = False) -> None:
    """Refuses stages that do not fit; warns of those that most likely will not.

    Args:
        stages: Of a command; those whose artifact is complete are left out.
        everything: Whether complete ones are made again.

    Raises:
        UserError: On every process: one line for each stage, with what it needs, what there is
            and the way out.
    """
    if not stages:
        return
    missing = to_be_made(stages, everything=everything)
    machine = this_machine(str(stages[0].artifact.root))
    # All processes come here, whatever their file systems show them of artifacts.
    lines = _told(of_all(shortages(missing, machine, least_rows)))
    if lines:
        raise UserError(lines)
    for line in shortages(missing, machine, likely_rows):
        warn(f"{line} {_GUESSED}")


def to_be_made(stages: Sequence["Stage"], *, everything: bool = False) -> list["Stage"]:
    """Returns the stages whose artifact is missing and known to be needed."""

    def is_needed(stage: "Stage") -> bool:
        try:
            return stage.skip() is None
        except ArtifactError:  # Known once others are made; then it is asked again.
            return False

    return [
        stage
        for stage in stages
        if (everything or not stage.artifact.is_complete()) and is_needed(stage)
    ]


def doubts(stages: Sequence["Stage"], machine: Machine) -> list[str]:
    """Returns for `--dry-run` what would be refused, else what most likely will be."""
    missing = to_be_made(stages)
    refused = shortages(missing, machine, least_rows)
    if refused:
        return [f"REFUSED: {line}" for line in refused]
    return [f"warning: {line} {_GUESSED}" for line in shortages(missing, machine, likely_rows)]


def shortages(stages: Sequence["Stage"], machine: Machine, estimate: RowEstimate) -> list[str]:
    """Returns one line for each stage that does not fit in memory, and one for the disk."""
    needs = {stage.name: (stage, stage.need(machine, counted(estimate))) for stage in stages}
    lines = [_disk_shortage(list(needs.values()), machine)]
    lines += [_memory_shortage(name, need, machine) for name, (_, need) in needs.items()]
    return [line for line in lines if line is not None]


def counted(estimate: RowEstimate) -> RowCounter:
    """Returns an estimate of runs, with no rows where the text cannot be found: others say so."""

    def rows(run: "Artifacts") -> Rows:
        try:
            return estimate(run.config.corpus, run.tokens)
        except UserError:
            return {"train": 0, "valid": 0, "test": 0}

    return rows


def _disk_shortage(needs: Sequence[tuple["Stage", Need]], machine: Machine) -> str | None:
    if machine.disk_bytes is None:
        return None
    left: dict[str, int] = {}
    temporary = 0
    for stage, need in needs:
        if need.disk_bytes:
            held = bytes_under(stage.artifact.path)
            left[stage.name] = max(0, need.disk_bytes - held)
            most = max(0, need.disk_bytes + need.temporary_bytes - held)
            # Stages are made one after the other, and so is what they need for a time.
            temporary = max(temporary, most - left[stage.name])
    left = {name: size for name, size in left.items() if size > 0}
    total = sum(left.values()) + temporary
    if total <= machine.disk_bytes:
        return None
    largest = sorted(left, key=lambda name: -left[name])[:_LARGEST_SHOWN]
    shown = ", ".join(f"{name} {human_bytes(left[name])}" for name in largest)
    if temporary:
        shown += f", for a time {human_bytes(temporary)}"
    return (
        f"{needs[0][0].artifact.root}: the artifacts to be made need at least "
        f"{human_bytes(total)} ({shown}) and {human_bytes(machine.disk_bytes)} are free; set "
        "store or workdir to another disk or lower corpus.max_bytes"
    )


def _memory_shortage(name: str, need: Need, machine: Machine) -> str | None:
    for moment in need.moments:
        if machine.device_bytes is not None and moment.device_bytes > machine.device_bytes:
            return (
                f"{name}: {moment.what}: at least {human_bytes(moment.device_bytes)} on each of "
                f"{machine.num_devices} devices ({machine.kind}), which have "
                f"{human_bytes(machine.device_bytes)}; {moment.way_out}"
            )
        host = moment.host_bytes_on(machine)
        if machine.host_bytes is not None and host > machine.host_bytes:
            return (
                f"{name}: {moment.what}: at least {human_bytes(host)} of host memory, and "
                f"{human_bytes(machine.host_bytes)} are free; {moment.way_out}"
            )
    return None


def _told(lines_P: Sequence[Sequence[str]]) -> list[str]:
    """Returns what the processes found, each line once, with the process where they differ."""
    if all(each == lines_P[0] for each in lines_P):
        return list(lines_P[0])
    return [f"process {k}: {line}" for k, each in enumerate(lines_P) for line in each]
