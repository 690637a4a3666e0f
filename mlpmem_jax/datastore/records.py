"""The small files that say what an artifact is: read with every entry of the type it must have."""

from collections.abc import Mapping
from typing import Any

from etils import epath

from mlpmem_jax.datastore.files import read_json
from mlpmem_jax.errors import ArtifactError

_NUMBER = (int, float)
# What is not listed may be anything.
MANIFEST_TYPES: Mapping[str, Any] = {
    "kind": str,
    "recipe": dict,
    "made_from": dict,
    "counts": dict,
    "arrays": dict,
    "files": dict,
    "measured": dict,
    "fingerprint": str,
    "software": dict,
    "created": _NUMBER,
    "run": (str, type(None)),
}
BUILDING_TYPES: Mapping[str, Any] = {
    "recipe": dict,
    "made_from": dict,
    "run": (str, type(None)),
}


def read_record(file: epath.Path, types: Mapping[str, Any], artifact: str) -> dict[str, Any]:
    """Reads one.

    Args:
        file: The file.
        types: Of the entries that it must have.
        artifact: Whose it is, for the message.

    Raises:
        ArtifactError: The file is damaged; names it and the way out.
    """
    try:
        raw = read_json(file)
    except ArtifactError as error:
        raise ArtifactError(f"{error}; make {artifact} again with --rebuild") from None
    problem = _mistyped(raw, types)
    if problem is not None:
        raise damaged(file, problem, artifact)
    return dict(raw)


def damaged(file: epath.Path, problem: str, artifact: str) -> ArtifactError:
    """Returns the error of a record that is damaged: the file, what is wrong, and the way out."""
    return ArtifactError(f"{file}: damaged ({problem}); make {artifact} again with --rebuild")


def _mistyped(raw: Any, types: Mapping[str, Any]) -> str | None:
    """Says which entry is missing or of another type; None: all are as they must be."""
    if not isinstance(raw, dict):
        return "no JSON object"
    for name, wanted in types.items():
        if not isinstance(raw.get(name), wanted):
            return f"{name} is missing or of another type"
    if "made_from" in types and not all(isinstance(v, str) for v in raw["made_from"].values()):
        return "made_from holds values of another type"
    for about in raw["files"].values() if "files" in types else ():
        entries = about if isinstance(about, dict) else {}
        if not isinstance(entries.get("bytes"), int) or not isinstance(entries.get("crc32"), str):
            return "files holds values of another type"
    timed = raw["measured"] if "measured" in types else raw
    return None if isinstance(timed.get("seconds", 0), _NUMBER) else "seconds is no number"
