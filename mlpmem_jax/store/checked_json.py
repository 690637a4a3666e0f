"""JSON files that carry their own checksum: what a later start or stage reads is never believed."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.store.files import read_json, write_json

CHECKSUM = "checksum"
SHARDS = "shards"  # The digests, in what manifests record of an array.
START_AGAIN = "delete it and start the same command again"


def fingerprint_of(value: Any) -> str:
    """Returns 16 hexadecimal digits that identify a JSON-ready value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def as_json(value: Any) -> Any:
    """Returns a value as it is after it was written and read."""
    return json.loads(json.dumps(value))


def write_checked_json(path: str | epath.Path, content: Mapping[str, Any]) -> None:
    """Writes a mapping, atomically, with a checksum of all of it."""
    value = as_json(content)
    write_json(path, value | {CHECKSUM: fingerprint_of(value)})


def read_checked_json(path: str | epath.Path, way_out: str = START_AGAIN) -> dict[str, Any]:
    """Reads what `write_checked_json` wrote.

    Args:
        way_out: What the user can do where it is damaged.

    Raises:
        ArtifactError: It is missing, or not as it was written.
    """
    if not epath.Path(path).exists():
        raise ArtifactError(f"{path}: missing; {way_out}")
    try:
        value = read_json(path)
    except ArtifactError as error:
        raise ArtifactError(f"{error}; {way_out}") from None
    return without_checksum(path, value, way_out)


def without_checksum(path: str | epath.Path, value: Any, way_out: str) -> dict[str, Any]:
    """Returns the content of a file that was read, compared with its checksum.

    Raises:
        ArtifactError: They do not match, or there is no checksum.
    """
    if isinstance(value, dict):
        content = {name: each for name, each in value.items() if name != CHECKSUM}
        if value.get(CHECKSUM) == fingerprint_of(content):
            return content
    raise ArtifactError(f"{path}: damaged (it does not match its own checksum); {way_out}")
