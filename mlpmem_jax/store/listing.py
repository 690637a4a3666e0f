"""What a store holds: every artifact, its size, and the work directories that use it."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

from etils import epath

from mlpmem_jax.errors import ArtifactError, UserError
from mlpmem_jax.store.contents import BUILDING, MANIFEST
from mlpmem_jax.store.files import is_local, read_json
from mlpmem_jax.store.lock import BeingMade, only_maker
from mlpmem_jax.store.manifest import Artifact, Manifest
from mlpmem_jax.store.run_record import RUNS, RunRecord, store_of


@dataclasses.dataclass(frozen=True)
class Entry:
    """One artifact of a store.

    Attributes:
        manifest: Its manifest; None: it is not finished, or its manifest is damaged.
        num_bytes: Of its files.
        users: "WORKDIR: ROLE" of each work directory that uses it, or uses what is made from it.
    """

    artifact: Artifact
    manifest: Manifest | None
    num_bytes: int
    users: tuple[str, ...]


def entries(
    store: epath.Path,
    workdir: epath.Path,
    kept_by: Callable[[epath.Path], Mapping[str, str]] = lambda workdir: {},
) -> list[Entry]:
    """Returns the artifacts of a store, by kind and age.

    Args:
        workdir: A work directory that may use it unregistered, since it was moved or copied.
        kept_by: Returns what a work directory cannot do without, by role, whatever its record says.

    Raises:
        ArtifactError: The record of a work directory that uses the store is damaged.
    """
    found = {one.relative: (one, _manifest(one)) for one in _artifacts(store)}
    inputs = {name: _inputs(one) for name, (one, _) in found.items()}
    records = [
        dataclasses.replace(one, roles={**kept_by(one.workdir), **one.roles})
        for one in _records(store, workdir)
    ]
    users = _users(records, inputs)
    listed = [
        Entry(artifact, manifest, _bytes_of(artifact.path), tuple(users.get(name, ())))
        for name, (artifact, manifest) in found.items()
    ]
    return sorted(listed, key=lambda one: (one.artifact.kind, _created(one)))


def remove_unused(listed: Sequence[Entry]) -> list[Entry]:
    """Removes the artifacts that no work directory uses, but for those being made; returns them.

    Raises:
        ArtifactError: One holds what is not ours; those before it are removed.
    """
    removed = []
    for one in listed:
        if one.users:
            continue
        with contextlib.suppress(BeingMade), only_maker(one.artifact, waits=False):
            one.artifact.remove()
            removed.append(one)
    return removed


def _artifacts(store: epath.Path) -> Iterator[Artifact]:
    if not store.exists():
        return
    for kind in sorted(path for path in store.iterdir() if _is_shown(path)):
        for path in sorted(entry for entry in kind.iterdir() if _is_shown(entry)):
            if any((path / name).exists() for name in (MANIFEST, BUILDING)):
                yield Artifact(store, f"{kind.name}/{path.name}", kind.name)


def _is_shown(path: epath.Path) -> bool:
    return not path.name.startswith(".") and path.is_dir()


def _manifest(artifact: Artifact) -> Manifest | None:
    try:
        return artifact.load()
    except ArtifactError:
        return None


def _inputs(artifact: Artifact) -> Collection[str]:
    """Returns the inputs of an artifact, also of one that is not finished."""
    for name in (MANIFEST, BUILDING):
        with contextlib.suppress(OSError, UserError):
            return list(read_json(artifact.path / name)["made_from"])
    return ()


def _users(
    records: Iterable[RunRecord], inputs: Mapping[str, Collection[str]]
) -> dict[str, dict[str, None]]:
    """Returns the users of each artifact, those of its successors included."""
    users: dict[str, dict[str, None]] = {}
    for record in records:
        for role, relative in record.roles.items():
            todo = [relative]
            while todo:
                name = todo.pop()
                of_name = users.setdefault(name, {})
                user = f"{record.workdir}: {role}" if name == relative else f"{record.workdir}"
                if user not in of_name:
                    of_name[user] = None
                    todo += inputs.get(name, ())
    return users


def _records(store: epath.Path, workdir: epath.Path) -> Iterator[RunRecord]:
    """Yields the records of the work directories that use a store."""
    folder = store / RUNS
    files = sorted(folder.iterdir()) if folder.exists() else ()
    registered = [RunRecord.registered(file) for file in files if file.suffix == ".json"]
    records = [*(one for one in registered if one is not None), RunRecord.read(workdir)]
    for record in {str(one.workdir): one for one in records}.values():
        if record.roles and _is_same(store_of(record.workdir, record.store), store):
            yield record


def _is_same(one: epath.Path, other: epath.Path) -> bool:
    """Returns whether two paths are one directory, links to it included."""
    if not (is_local(one) and is_local(other)):
        return one == other
    return os.path.realpath(one) == os.path.realpath(other)


def _bytes_of(path: epath.Path) -> int:
    total, folders = 0, [path]
    while folders:
        for entry in folders.pop().iterdir():
            if entry.is_dir():
                folders.append(entry)
            else:
                total += entry.stat().length
    return total


def _created(one: Entry) -> float:
    return 0.0 if one.manifest is None else one.manifest.created
