"""Checkpoints through Orbax, with checksums of our own.

Each finished checkpoint gets a file of checksums (`training/checksums.py`); one without it,
or that does not match it, is never restored. Writing and checksums go on in the background:
training waits for the copy to the host alone, or, where a save takes longer than the interval
between two, for the one before.
"""

import contextlib
import dataclasses
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from mlpmem_jax.console import warn
from mlpmem_jax.errors import ArtifactError, RunFailed, UserError
from mlpmem_jax.failures import first_line, os_error_in
from mlpmem_jax.parallel.agreement import of_first
from mlpmem_jax.parallel.multihost import barrier, is_writer
from mlpmem_jax.store.files import check_free_space, has_locks, is_local, read_own_paths_literally
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.verification import verify_together
from mlpmem_jax.training.checksums import read_checksums, write_checksums

CHECKPOINTS = "checkpoints"
CHECKSUMS = "checksums"
_OVERHEAD_BYTES = 256 << 10  # manifests and metadata, whatever the size of the arrays
# How long a listing that process 0 does not share may be a cached one: NFS keeps a minute.
LISTING_SECS = 90.0
_LISTING_PAUSE_SECS = 0.5
# Orbax's own limit is twenty minutes, which a large state on a slow disk may take.
SAVE_SECS = 6 * 3600
read_own_paths_literally()


@dataclasses.dataclass
class _LatestScheduled:
    """Orbax's policy: the newest of the schedule, the newest of all, and the last good one.

    Orbax removes old ones as soon as it has written a new one, which counts only once it has its
    checksums: until then a kill must leave one that counts.
    """

    keep: int
    is_scheduled: Callable[[int], bool]
    last_good: int | None = None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Returns, in the order of steps, which checkpoints stay."""
        del context
        steps = [int(checkpoint.step) for checkpoint in checkpoints]
        kept = self.kept(steps)
        return [step in kept for step in steps]

    def kept(self, steps: Sequence[int]) -> set[int | None]:
        """Returns which of these steps, the newest last, stay."""
        scheduled = [step for step in steps if self.is_scheduled(step)]
        return {*scheduled[-self.keep :], *steps[-1:], self.last_good}


class Checkpoints:
    """The checkpoints of one training run.

    A checkpoint is a mapping of item names to pytrees of arrays; any subset of items can be
    restored, onto any mesh.
    """

    def __init__(
        self,
        directory: epath.Path,
        keep: int,
        item_names: tuple[str, ...],
        is_scheduled: Callable[[int], bool] = lambda step: True,
    ):
        """Opens the checkpoints of a run.

        Args:
            directory: Of the run.
            keep: Scheduled checkpoints that are kept, the newest; and the last that is known to be
                good, while the newest is not.
            is_scheduled: Whether a step is one of the run's own; others, saved on a notice
                of preemption, are kept until the next one is there.
        """
        if is_local(directory) and not has_locks(directory):
            _keep_orbax_from_locking(directory)
        self._directory = directory
        self._sums = directory / CHECKSUMS
        self._sums.mkdir(parents=True, exist_ok=True)
        self._background = ThreadPoolExecutor(1, "checksums")
        self._finishing: Future[None] | None = None
        self._policy = _LatestScheduled(keep, is_scheduled)
        self._manager = ocp.CheckpointManager(
            os.fspath(directory / CHECKPOINTS),
            options=ocp.CheckpointManagerOptions(
                enable_async_checkpointing=True,
                async_options=ocp.AsyncOptions(timeout_secs=SAVE_SECS),
                preservation_policy=self._policy,
            ),
            item_names=item_names,
        )
        # Orbax would ask JAX for notices of preemption too, with numbers of its own, and JAX
        # agrees on a moment by the number that was asked last (see parallel/preemption.py).
        self._manager.reached_preemption = lambda step: False  # type: ignore[method-assign]

    def save(self, step: int, items: Mapping[str, Any]) -> None:
        """Begins to save; returns as soon as the arrays are copied to the host.

        Raises:
            UserError: The disk has no room for it; the checkpoints before it stay.
        """
        self.wait()
        self._remove_surplus()
        # Before Orbax begins: its threads meet a full disk with tracebacks, not with an error.
        check_free_space(self._directory, _estimated_bytes(items), f"the checkpoint of step {step}")
        if step in self._manager.all_steps():  # A damaged one of that step: replace it.
            self._remove(step)
        arguments = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        if not self._manager.save(step, args=ocp.args.Composite(**arguments), force=True):
            raise RunFailed(f"{self._directory}: the checkpoint of step {step} was not saved")
        kept = frozenset(self._manager.all_steps())
        self._finishing = self._background.submit(self._finish, step, kept)

    def _remove_surplus(self) -> None:
        """Removes what stayed only until a newer one had its checksums."""
        steps = sorted(int(step) for step in self._manager.all_steps())
        kept = self._policy.kept(steps)
        for step in steps:
            if self._policy.last_good in steps and step < steps[-1] and step not in kept:
                self._remove(step)

    def _remove(self, step: int) -> None:
        if is_writer():
            self._sums_file(step).unlink(missing_ok=True)
        self._manager.delete(step)

    def poll(self) -> None:
        """Raises what has gone wrong with the last save, if it has ended. Never waits."""
        if self._finishing is not None and self._finishing.done():
            self.wait()

    def wait(self) -> None:
        """Waits until the last save is complete and has its checksums; raises its errors."""
        if self._finishing is not None:
            finishing, self._finishing = self._finishing, None
            finishing.result()

    def _finish(self, step: int, kept: frozenset[int]) -> None:
        """Waits for Orbax, then writes the checksums: in the background, next to training."""
        self._manager.wait_until_finished()
        write_checksums(self._sums_file(step), self._directory / CHECKPOINTS / str(step))
        self._policy.last_good = step
        if is_writer():
            names = (re.fullmatch(r"([0-9]+)\.json", sums.name) for sums in self._sums.iterdir())
            steps = [int(name[1]) for name in names if name]
            # Of what is older alone: after an interrupt, another start may write newer ones.
            for stale in [old for old in steps if old < step and old not in kept]:
                self._sums_file(stale).unlink(missing_ok=True)

    def _sums_file(self, step: int) -> epath.Path:
        return self._sums / f"{step}.json"

    def last_good_step(self) -> int | None:
        """Returns the newest step whose files match their checksums; names damaged ones.

        Process 0 looks, and each process verifies its share. All processes must call it.

        Raises:
            RunFailed: Another process does not see the checkpoints of process 0.
        """
        self._manager.reload()
        found = of_first(self._look() if is_writer() else None)
        self._wait_for_listing(found["steps"])
        skipped, good = [], None
        for step in reversed(found["finished"]):
            try:
                verify_step(self._directory, step)
            except ArtifactError as error:
                skipped.append(f"checkpoint of step {step} is skipped: {error}")
                continue
            good = int(step)
            break
        instead = "no other is good" if good is None else f"the newest good one is of step {good}"
        for line in skipped if is_writer() else ():
            warn(f"{line}; {instead}")
        self._policy.last_good = good
        return good

    def _look(self) -> dict[str, list[int]]:
        """Returns the steps on disk, and those of them that have checksums.

        Without them the save was killed before it ended: it proves nothing.
        """
        steps = sorted(int(step) for step in self._manager.all_steps())
        return {"steps": steps, "finished": [s for s in steps if self._sums_file(s).exists()]}

    def _wait_for_listing(self, steps: Sequence[int]) -> None:
        """Waits until this process sees what process 0 sees: Orbax acts on its own listing.

        Where that differs, processes would delete, save or restore other checkpoints.
        """
        deadline = time.monotonic() + LISTING_SECS
        while sorted(self._manager.all_steps()) != list(steps):
            if time.monotonic() > deadline:
                raise RunFailed(
                    f"{self._directory / CHECKPOINTS}: process {jax.process_index()} sees the "
                    f"steps {sorted(self._manager.all_steps())}, process 0 {list(steps)}; all "
                    "processes need the same work directory"
                )
            time.sleep(_LISTING_PAUSE_SECS)
            self._manager.reload()

    def restore(self, step: int, abstract_items: Mapping[str, Any]) -> dict[str, Any]:
        """Restores the named items.

        Args:
            step: A step that `last_good_step` returned.
            abstract_items: Pytrees of `jax.ShapeDtypeStruct` with shardings.

        Raises:
            ArtifactError: Shapes or names do not fit what was saved.
        """
        return _restored(self._manager, self._directory, step, abstract_items)

    def files(self, step: int) -> dict[str, Any]:
        """Returns bytes and CRC-32 of a checkpoint's files, by path in the artifact.

        On process 0, which writes manifests; nothing on the others, which may see them later.
        """
        if not is_writer():
            return {}
        sums = read_checksums(self._sums_file(step))
        return {f"{CHECKPOINTS}/{step}/{name}": about for name, about in sums.items()}

    def close(self) -> None:
        """Waits for what is under way, on all processes, and releases resources."""
        self.wait()
        self._remove_surplus()
        self._background.shutdown()
        barrier(f"{self._directory}: checksums")  # Process 0 writes them, all may read them next.
        self._manager.close()


def _keep_orbax_from_locking(directory: epath.Path) -> None:
    """Lets Orbax write to a file system that does not lock files, as our own arrays are written.

    There is no setting for it: the TensorStore contexts that Orbax makes are copies of these.

    Raises:
        UserError: This version of Orbax has no such place.
    """
    try:
        from orbax.checkpoint._src.serialization import tensorstore_utils

        contexts = tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT
    except (ImportError, AttributeError):
        raise UserError(
            f"{directory}: this file system does not lock files, and this version of "
            "orbax-checkpoint cannot write checkpoints without; use another workdir"
        ) from None
    for context in contexts:
        context["file_io_locking"] = {"mode": "none"}


def _estimated_bytes(items: Mapping[str, Any]) -> int:
    """Returns about what a checkpoint takes on disk: arrays, and what Orbax adds to them."""
    arrays = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(dict(items)))
    return int(1.05 * arrays) + _OVERHEAD_BYTES


def verify_step(directory: epath.Path, step: int) -> None:
    """Compares the files of a checkpoint with their checksums; all processes must call it.

    Raises:
        ArtifactError: On every process: there is none of this step, or a file is damaged.
    """
    found: dict[str, Any] = {}
    if is_writer():
        try:
            found = {"sums": read_checksums(directory / CHECKSUMS / f"{step}.json")}
        except ArtifactError as error:
            found = {"problem": str(error)}
    found = of_first(found)
    if "problem" in found:
        raise ArtifactError(found["problem"])
    verify_together(directory / CHECKPOINTS / str(step), found["sums"])


def _restored(
    manager: ocp.CheckpointManager,
    directory: epath.Path,
    step: int,
    abstract_items: Mapping[str, Any],
) -> dict[str, Any]:
    arguments = {name: ocp.args.StandardRestore(item) for name, item in abstract_items.items()}
    try:
        restored = manager.restore(step, args=ocp.args.Composite(**arguments))
    except (ValueError, KeyError, TypeError) as error:
        of_system = os_error_in(error, directory)
        if of_system is not None:
            raise of_system from None
        raise ArtifactError(
            f"{directory}/{CHECKPOINTS}/{step}: does not fit the configured network "
            f"({first_line(error)})"
        ) from None
    return {name: restored[name] for name in abstract_items}


def restore_finished(
    artifact: Artifact, abstract_items: Mapping[str, Any], step: int | None = None
) -> dict[str, Any]:
    """Restores items of the final checkpoint of a finished artifact.

    Args:
        artifact: A decoder or memory whose training is complete.
        abstract_items: Item names to pytrees of `jax.ShapeDtypeStruct` with shardings.
        step: Another step whose checkpoint was kept; the artifact need not be finished then.

    Raises:
        ArtifactError: The artifact is not finished, or a file of it is damaged (named).
    """
    if step is None:
        manifest = artifact.load()
        verify_together(artifact.path, manifest.files)
        step = int(manifest.counts["steps"])
    else:
        verify_step(artifact.path, step)
    manager = ocp.CheckpointManager(
        os.fspath(artifact.path / CHECKPOINTS),
        options=ocp.CheckpointManagerOptions(read_only=True),
        item_names=tuple(abstract_items),
    )
    with contextlib.closing(manager):
        return _restored(manager, artifact.path, step, abstract_items)
