"""The stored artifact that is most like one that is missing, and the keys that differ."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from etils import epath

from mlpmem_jax.errors import UserError
from mlpmem_jax.store.checked_json import as_json
from mlpmem_jax.store.contents import BUILDING, MANIFEST
from mlpmem_jax.store.differences import differences
from mlpmem_jax.store.files import read_json

if TYPE_CHECKING:
    from mlpmem_jax.store.manifest import Artifact

_SHOWN = 4
_MOST_READ = 200  # Manifests of a kind: a store of a large sweep holds thousands.
_ROLE = ("split", "by_index")  # Artifacts that differ in these are none of another's alternatives.


def in_words(artifact: "Artifact") -> str:
    """Returns "; the nearest, …, differs in …" for a message, or nothing if there is no other."""
    found = nearest(artifact)
    if found is None:
        return ""
    name, lines = found
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    return f" (the nearest is {name[:8]}: {'; '.join(lines[:_SHOWN])}{more})"


def nearest(artifact: "Artifact") -> tuple[str, list[str]] | None:
    """Returns id and differing keys of the most similar artifact of the same kind and role.

    Returns:
        None where there is no other; each difference is "key=value, now value".
    """
    found = []
    command = artifact.path.name.rpartition("-")[0]  # Reports of all commands lie together.
    for entry, record in _records(artifact.path.parent):
        beside, _, name = entry.rpartition("-")
        if entry != artifact.path.name and beside == command and _has_role(record, artifact):
            found.append((name, _lines(artifact, record)))
    return min(found, key=lambda one: len(one[1]), default=None)


def _lines(artifact: "Artifact", record: Mapping[str, Any]) -> list[str]:
    """Returns where a record differs from an artifact, its inputs and theirs included."""
    lines = differences(record["recipe"], as_json(artifact.recipe or {}))
    theirs = [name for name in record["made_from"] if name not in _names(artifact)]
    for one in artifact.inputs:
        if one.relative in record["made_from"]:
            continue
        found = [_record(one.root / name) for name in theirs if name.split("/")[0] == one.kind]
        kept = [each for each in found if each is not None and _has_role(each, one)]
        lines += _lines(one, kept[0]) if len(kept) == 1 else [f"another {one.label}"]
    return list(dict.fromkeys(lines))  # One key may decide several inputs.


def _has_role(record: Mapping[str, Any], artifact: "Artifact") -> bool:
    """Returns whether a record is one of the same split; of a given artifact that is not known."""
    recipe = artifact.recipe
    return recipe is not None and all(record["recipe"].get(k) == recipe.get(k) for k in _ROLE)


def _names(artifact: "Artifact") -> set[str]:
    return {one.relative for one in artifact.inputs}


def _records(folder: epath.Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not folder.exists():
        return
    for place, entry in enumerate(sorted(folder.iterdir(), key=lambda path: path.name)):
        if place == _MOST_READ:
            return
        record = _record(entry)
        if record is not None:
            yield entry.name, record


def _record(path: epath.Path) -> Mapping[str, Any] | None:
    for name in (MANIFEST, BUILDING):
        try:
            record = read_json(path / name)
        except (OSError, UserError):
            continue
        if isinstance(record, dict) and {"recipe", "made_from"} <= record.keys():
            return record
    return None
