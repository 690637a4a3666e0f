"""Removing and replacing artifacts: only what is ours, the old one once the new one is whole.

On a local disk an artifact that is rebuilt is renamed to `.replaced.NAME` beside it, and removed
when the new one is finished. What is removed is renamed to `.discarded.NAME` first, so that a kill
in the middle leaves nothing that looks like an artifact. Buckets cannot rename: there it is removed
before the new one is begun, and `building.json` says so until all of it is gone.
"""

import os
import shutil
from typing import TYPE_CHECKING

from etils import epath

from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.store.checked_json import write_checked_json
from mlpmem_jax.store.contents import BUILDING, MANIFEST, foreign_file
from mlpmem_jax.store.files import is_local

if TYPE_CHECKING:
    from mlpmem_jax.store.manifest import Artifact

REMOVING = {"removing": True}  # What `building.json` holds while objects of a bucket are removed.
_REPLACED = ".replaced."
_DISCARDED = ".discarded."


def refuse_foreign(artifact: "Artifact", *, removes: bool) -> None:
    """Refuses a directory that is not an artifact of ours, or holds what is not ours.

    Args:
        artifact: What is about to be made.
        removes: Whether what is there is removed for it; else it is continued, or there is nothing.

    Raises:
        ArtifactError: Names the file, the link or the directory.
    """
    path = artifact.path
    is_link = is_local(path) and os.path.islink(path)
    if is_link and (removes or not path.exists()):
        raise ArtifactError(
            f"{path}: is a symbolic link, which is neither followed nor replaced; remove it, or "
            "use another workdir"
        )
    if not path.exists():
        return
    if not path.is_dir():
        raise ArtifactError(
            f"{path}: is a file, and a directory of this name is to hold the {artifact.kind}; move "
            "it away, or use another workdir"
        )
    is_ours = any((path / name).exists() for name in (MANIFEST, BUILDING))
    found = None
    if not is_ours:
        found = foreign_file(path, kind=None)
    elif removes:
        found = foreign_file(path, artifact.kind)
    if found is not None:
        why = "" if is_ours else f" ({path} has no {MANIFEST} or {BUILDING})"
        raise ArtifactError(
            f"{path / found}: not written by this program{why}; nothing is removed or overwritten: "
            "move it away, or use another workdir"
        )


def replaced(artifact: "Artifact") -> epath.Path | None:
    """Returns where the artifact lies that this one replaces; None: there is none."""
    place = _beside(artifact.path, _REPLACED)
    return place if is_local(place) and place.exists() else None


def is_left(artifact: "Artifact") -> bool:
    """Returns whether a kill left something that a finished artifact has replaced."""
    places = [_beside(artifact.path, prefix) for prefix in (_REPLACED, _DISCARDED)]
    return is_local(artifact.path) and any(place.exists() for place in places)


def set_aside(artifact: "Artifact") -> None:
    """Makes room for a new artifact; the old one is kept until the new one is finished.

    Raises:
        ArtifactError: It holds what is not ours, or cannot be renamed.
    """
    refuse_foreign(artifact, removes=True)
    if not artifact.path.exists():
        return
    kept = replaced(artifact)
    if not is_local(artifact.path) or (kept is not None and not artifact.is_complete()):
        _discard(artifact.path)  # An attempt to replace what is still kept.
        return
    if kept is not None:
        drop_replaced(artifact)
    _rename(artifact.path, _beside(artifact.path, _REPLACED))


def drop_replaced(artifact: "Artifact") -> None:
    """Removes what a finished artifact has replaced.

    Raises:
        ArtifactError: Something was put into it that is not ours.
        OSError: It cannot be removed.
    """
    kept = replaced(artifact)
    if kept is not None:
        found = foreign_file(kept, artifact.kind)
        if found is not None:
            raise ArtifactError(f"{kept / found}: not written by this program; {kept} is kept")
        _rename(kept, _beside(artifact.path, _DISCARDED), replace=True)
    if is_local(artifact.path):
        _remove_tree(_beside(artifact.path, _DISCARDED))


def remove(artifact: "Artifact") -> None:
    """Removes an artifact for good; what it replaced stays.

    Raises:
        ArtifactError: It holds what is not ours.
    """
    refuse_foreign(artifact, removes=True)
    if artifact.path.exists():
        _discard(artifact.path)


def finish_removal(path: epath.Path) -> None:
    """Removes all objects of an artifact in a bucket; `building.json`, which says so, last."""
    for entry in path.iterdir():
        if entry.is_dir():
            entry.rmtree()
        elif entry.name != BUILDING:
            entry.unlink()
    (path / BUILDING).unlink(missing_ok=True)


def _beside(path: epath.Path, prefix: str) -> epath.Path:
    return path.parent / f"{prefix}{path.name}"


def _discard(path: epath.Path) -> None:
    if is_local(path):
        target = _beside(path, _DISCARDED)
        _rename(path, target, replace=True)
        _remove_tree(target)
    else:
        write_checked_json(path / BUILDING, REMOVING)
        (path / MANIFEST).unlink(missing_ok=True)
        finish_removal(path)


def _rename(path: epath.Path, target: epath.Path, replace: bool = False) -> None:
    if replace:
        _remove_tree(target)
    try:
        os.rename(path, target)
    except OSError as error:
        raise ArtifactError(
            f"{path}: cannot be moved to {target.name} ({error.strerror}); move it away yourself, "
            "or use another workdir"
        ) from None


def _remove_tree(path: epath.Path) -> None:
    if path.exists():
        shutil.rmtree(os.fspath(path))
