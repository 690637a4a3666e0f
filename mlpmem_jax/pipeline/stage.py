"""A stage makes one artifact: skipped when current, continued when interrupted."""

import contextlib
import dataclasses
import enum
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from mlpmem_jax.console import say, warn
from mlpmem_jax.errors import ArtifactError, Mistakes, RunFailed
from mlpmem_jax.failures import of_stage
from mlpmem_jax.parallel.agreement import of_first, refuse_different
from mlpmem_jax.parallel.hardware import Machine
from mlpmem_jax.parallel.multihost import barrier, is_active, is_writer
from mlpmem_jax.parallel.preemption import Preempted, preempted, run_id
from mlpmem_jax.parallel.sharing import process_index
from mlpmem_jax.pipeline.fitting import Need, RowCounter, check_fit
from mlpmem_jax.pipeline.stopwatch import Stopwatch
from mlpmem_jax.store import replacement
from mlpmem_jax.store.lock import only_maker
from mlpmem_jax.store.manifest import Artifact, Completion, Manifest, Status
from mlpmem_jax.store.verification import verify_together

_VISIBLE_SECS = 120.0  # longer than file systems keep what they knew of a folder


class Builders(enum.Enum):
    """Which processes of a run make an artifact."""

    ALL = "all"  # Together, on one mesh.
    FIRST = "first"  # Process 0; the others wait.


class Rebuild(enum.Enum):
    """What happens to artifacts that are there already."""

    REFUSE = "refuse"  # A stale one is an error.
    STALE = "stale"  # A stale one is made again, and a damaged report.
    # Made again in any case, for example because it is damaged; but what this run has made or
    # begun before a preemption, it keeps.
    ALWAYS = "always"


@dataclasses.dataclass(frozen=True)
class Stage:
    """How one artifact is made.

    Attributes:
        artifact: What is made.
        build: Makes it, continuing what an interrupted start left; returns the report.
        upstream: Returns the artifacts that it is made from, once the stages before are done;
            None: the inputs of the artifact. They must be complete when it is built.
        check: Refuses what can be known to be wrong before anything is made. Called for all
            stages first, when upstream artifacts may still be missing, and for those that are
            left whenever one was made: what a later stage refuses costs no earlier one.
        estimate: Disk, memory and flops beforehand, for `--dry-run`: name to number or text.
        need: Bytes of disk and memory that it cannot do without, on a machine: what the machine
            lacks is refused before the first stage starts.
        skip: Asked once the stages before are done: why the artifact is not needed, or None.
        builders: Which processes call `build`.
        is_report: It is made of files that are read at a glance, so that they are compared with
            their checksums before a rebuild keeps it.
    """

    artifact: Artifact
    build: Callable[[], Completion]
    upstream: Callable[[], Sequence[Artifact]] | None = None
    check: Callable[[], None] = lambda: None
    estimate: Callable[[], Mapping[str, Any]] = dict
    need: Callable[[Machine, RowCounter], Need] = lambda machine, count: Need()
    skip: Callable[[], str | None] = lambda: None
    builders: Builders = Builders.ALL
    is_report: bool = False

    @property
    def name(self) -> str:
        """Role and beginning of the id of the artifact."""
        return self.artifact.title

    def made_from(self) -> dict[str, str]:
        """Returns the fingerprints of the upstream artifacts."""
        return {one.relative: one.load().fingerprint for one in self.origins()}

    def status(self, made_from: Mapping[str, str], rebuild: Rebuild) -> Status:
        """Tells how far the artifact is.

        Raises:
            ArtifactError: It is stale, or a report is damaged that a rebuild would keep.
        """
        status = self.artifact.status(made_from)
        if self.is_report and rebuild is Rebuild.STALE and status is Status.COMPLETE:
            self.artifact.verify()
        return status

    def origins(self) -> Sequence[Artifact]:
        """Returns the upstream artifacts."""
        return self.artifact.inputs if self.upstream is None else self.upstream()


def run_stages(
    stages: Sequence[Stage],
    rebuild: Rebuild = Rebuild.REFUSE,
    before_building: Callable[[], None] = lambda: None,
) -> None:
    """Makes the artifacts of the stages, in their order.

    Args:
        stages: In the order of the data flow.
        rebuild: What happens to artifacts that are there already.
        before_building: Called each time before something is made.

    Raises:
        ArtifactError: An upstream artifact is missing, or an artifact is stale.
        ConfigError: A process of the run has other text, and so means other artifacts.
    """
    _refuse_other_artifacts(stages)
    check_stages(stages, rebuild)
    check_fit(stages, everything=rebuild is Rebuild.ALWAYS)
    verified: set[str] = set()
    _verify_upstream(stages, rebuild, verified)
    for place, stage in enumerate(stages):
        reason = stage.skip()
        if reason is not None:
            say(f"{stage.name}: not needed ({reason})")
            continue
        _verify_upstream([stage], rebuild, verified)
        if run_stage(stage, rebuild, before_building):
            verified.add(str(stage.artifact.path))
            check_stages(stages[place + 1 :], rebuild)
            check_fit(stages[place + 1 :], everything=rebuild is Rebuild.ALWAYS)
            # Alone, a process that has nothing to stop tidily has ended already.
            if stages[place + 1 :] and is_active() and preempted():
                raise Preempted(f"{stage.name}: is made, what follows is not")


def _refuse_other_artifacts(stages: Sequence[Stage]) -> None:
    """Compares what ids depend on besides the configuration, for example the files of the corpus.

    Raises:
        ConfigError: On every process: a process and where it differs from the first.
    """
    meant = {}
    for artifact in (stage.artifact for stage in stages):
        inputs = {one.label: one.relative for one in artifact.inputs}
        meant[artifact.label] = {**(artifact.recipe or {}), "inputs": inputs}
    refuse_different(meant, "would make another artifact")


def check_stages(stages: Sequence[Stage], rebuild: Rebuild = Rebuild.REFUSE) -> None:
    """Asks every stage whose artifact is not there, or is made again, what it refuses.

    Raises:
        UserError: With the mistakes of all.
    """
    mistakes = Mistakes()
    for stage in stages:
        with mistakes.gather():
            check_stage(stage, rebuild)
    mistakes.refuse()


def check_stage(stage: Stage, rebuild: Rebuild) -> None:
    """Asks a stage what it refuses, unless its artifact is kept.

    Raises:
        UserError: Something is wrong, or what is not ours would be removed or overwritten.
    """
    if not stage.artifact.is_complete():
        stage.check()
    if is_writer():  # Others may see an older listing.
        removes = _is_replaced(stage, rebuild)
        if removes or not stage.artifact.is_complete():
            replacement.refuse_foreign(stage.artifact, removes=removes)


def _is_replaced(stage: Stage, rebuild: Rebuild) -> bool:
    """Returns whether a rebuild removes what is there, as far as that is known by now."""
    if rebuild is Rebuild.REFUSE or not stage.artifact.path.exists():
        return False
    if rebuild is Rebuild.ALWAYS:
        return not stage.artifact.is_of(run_id())
    try:
        stage.status(stage.made_from(), rebuild)
    except ArtifactError:
        return True
    return False


def _verify_upstream(stages: Sequence[Stage], rebuild: Rebuild, verified: set[str]) -> None:
    """Verifies what a rebuild reads and does not make itself, before it removes anything.

    Args:
        stages: Those that may be rebuilt.
        rebuild: What happens to artifacts that are there already.
        verified: Paths of what is known to be good; what is verified is added.

    Raises:
        ArtifactError: On every process: a file of it is damaged; it is named.
    """
    if rebuild is Rebuild.REFUSE:
        return
    # As process 0 sees it: the others may see an older listing, and must do the same.
    needed = _unverified(stages, rebuild, verified) if is_writer() else None
    for path, files, command in of_first(needed):
        try:
            verify_together(epath.Path(path), files)
        except ArtifactError as error:
            raise ArtifactError(
                f"{error}; it is read for what is to be rebuilt: first run `{command} --rebuild`"
            ) from None
        verified.add(path)


def _unverified(
    stages: Sequence[Stage], rebuild: Rebuild, verified: set[str]
) -> list[tuple[str, dict[str, Any], str]]:
    """Returns directory, files and command of what replaced stages read and do not make."""
    replaced = [stage for stage in stages if _is_replaced(stage, rebuild)]
    rebuilt = {str(stage.artifact.path) for stage in replaced}
    origins = {str(one.path): one for stage in replaced for one in _known_origins(stage)}
    return [
        (path, dict(one.load().files), one.command)
        for path, one in origins.items()
        if path not in verified | rebuilt
    ]


def _known_origins(stage: Stage) -> list[Artifact]:
    """Returns the upstream artifacts that are there; the others are made first."""
    try:
        origins = stage.origins()
    except ArtifactError:
        return []
    return [one for one in origins if one.is_complete()]


def run_stage(
    stage: Stage,
    rebuild: Rebuild = Rebuild.REFUSE,
    before_building: Callable[[], None] = lambda: None,
) -> bool:
    """Makes one artifact, unless it is complete and current; returns whether it was made.

    All processes of a run come here together; process 0 alone writes what there is one of.
    """
    made_from = stage.made_from()
    status = _status(stage, made_from, rebuild)
    if status is not Status.COMPLETE:
        stage.check()
        barrier(f"{stage.name}: checked")
        with only_maker(stage.artifact) as confirm, _telling_what_is_kept(stage.artifact):
            # Asked again: another run may have finished it meanwhile.
            status = _status(stage, made_from, rebuild)
            if status is None:
                _set_aside(stage, rebuild)
                status = _status(stage, made_from, Rebuild.REFUSE)
            assert status is not None
            if status is not Status.COMPLETE:
                _make(stage, made_from, status, before_building, confirm)
                return True
    if is_writer() and replacement.is_left(stage.artifact):
        # A kill came just after the new one was finished; or another run is about to remove it.
        with contextlib.suppress(ArtifactError), only_maker(stage.artifact, waits=False):
            _drop_replaced(stage.artifact)
    say(f"{stage.name}: complete ({stage.artifact.load().fingerprint})")
    return False


def _status(stage: Stage, made_from: Mapping[str, str], rebuild: Rebuild) -> Status | None:
    """Returns how far an artifact is, as process 0 sees it; None: it is to be removed."""
    seen = _seen_status(stage, made_from, rebuild) if is_writer() else None
    value = of_first(None if seen is None else seen.value)
    return None if value is None else Status(value)


def _seen_status(stage: Stage, made_from: Mapping[str, str], rebuild: Rebuild) -> Status | None:
    artifact = stage.artifact
    if rebuild is Rebuild.ALWAYS and not artifact.is_of(run_id()):
        return None
    try:
        return stage.status(made_from, rebuild)
    except ArtifactError:
        if rebuild is Rebuild.REFUSE:
            raise
        return None


def _make(
    stage: Stage,
    made_from: Mapping[str, str],
    status: Status,
    before_building: Callable[[], None],
    confirm: Callable[[], None],
) -> None:
    say(f"{stage.name}: " + ("continuing" if status is Status.PARTIAL else "making"))
    if is_writer():
        before_building()
        stage.artifact.begin(made_from, run_id())
    barrier(f"{stage.name}: begun")
    builds = stage.builders is Builders.ALL or is_writer()
    with Stopwatch(stage.artifact) as stopwatch, of_stage(stage.name):
        completion = stage.build() if builds else Completion()
        barrier(f"{stage.name}: built")
    seconds = stopwatch.seconds
    if is_writer():
        confirm()
        stage.artifact.finish(
            counts=completion.counts,
            arrays=completion.arrays,
            files=completion.files,
            measured={"seconds": round(seconds, 3), **completion.measured},
            content=completion.content,
            confirm=confirm,
        )
        _drop_replaced(stage.artifact)
    barrier(f"{stage.name}: finished")
    manifest = _load_soon(stage.artifact)
    say(f"{stage.name}: made in {seconds:.1f} s ({manifest.fingerprint})")


def _load_soon(artifact: Artifact) -> Manifest:
    """Reads a manifest that process 0 has just written; other hosts may see it later (NFS)."""
    deadline = time.monotonic() + _VISIBLE_SECS
    while not (is_writer() or artifact.is_complete() or time.monotonic() > deadline):
        time.sleep(0.5)
    if not artifact.is_complete():
        raise RunFailed(
            f"{artifact.path}: made, and not seen by process {process_index()}; all processes "
            "need the same work directory"
        )
    return artifact.load()


def _set_aside(stage: Stage, rebuild: Rebuild) -> None:
    if rebuild is Rebuild.STALE:
        say(f"{stage.name}: stale or damaged; making it again")
    if is_writer():
        replacement.set_aside(stage.artifact)
    barrier(f"{stage.name}: set aside")


@contextlib.contextmanager
def _telling_what_is_kept(artifact: Artifact) -> Iterator[None]:
    """Says, when a rebuild ends before its time, where what it replaces lies."""
    try:
        yield
    except BaseException:
        kept = replacement.replaced(artifact) if is_writer() else None
        if kept is not None:
            warn(
                f"{artifact.path}: not rebuilt; the old one is kept in {kept} until it is; to have "
                f"it again, remove the new directory and move it back"
            )
        raise


def _drop_replaced(artifact: Artifact) -> None:
    """Removes what a finished artifact has replaced; where it cannot, the new one is no worse."""
    try:
        replacement.drop_replaced(artifact)
    except (ArtifactError, OSError) as error:
        warn(f"{artifact.path}: the artifact that it replaced was not removed: {error}")
