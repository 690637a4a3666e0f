"""Small files written whole or not at all, checksums, and free space."""

import json
import os
import shutil
import zlib
from typing import Any

from etils import epath

from mlpmem_jax.errors import ArtifactError, ConfigError, UserError

_BLOCK_BYTES = 1 << 20
_BUCKETS = ("gs://", "s3://")


def is_local(path: str | epath.Path) -> bool:
    """Returns whether a path lies on a local file system."""
    return "://" not in os.fspath(path)


def check_reachable(path: str | epath.Path, key: str) -> None:
    """Asks a bucket whether a path exists; does nothing for a local path.

    Args:
        path: Where a run lives.
        key: The configuration key that names it.

    Raises:
        ConfigError: The package for such paths is missing, or the bucket does not answer.
    """
    if is_local(path):
        return
    if not os.fspath(path).startswith(_BUCKETS):
        raise ConfigError(f"{key}={os.fspath(path)}: must be a local path, gs://… or s3://…")
    try:
        epath.Path(path).exists()
    except ImportError:
        raise ConfigError(
            f"{key}={os.fspath(path)}: paths in buckets need further packages "
            "(pip install -r requirements-remote.txt)"
        ) from None
    # Each of the drivers has errors of its own: HTTP, credentials, sockets.
    except Exception as error:
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{key}={os.fspath(path)}: cannot be reached ({what})") from None


def absolute(path: str | epath.Path) -> epath.Path:
    """Returns a path that does not depend on the current directory (Orbax wants that)."""
    return epath.Path(os.path.abspath(path) if is_local(path) else path)


def write_bytes(path: str | epath.Path, data: bytes) -> None:
    """Writes a file so that a kill leaves the old one or the new one, never half."""
    path = epath.Path(path)
    if not is_local(path):
        path.write_bytes(data)  # Object stores put objects atomically.
        return
    # One name a target: what a kill left is overwritten by the next start.
    temporary = f"{os.fspath(path)}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def write_json(path: str | epath.Path, value: Any) -> None:
    """Writes JSON atomically."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: str | epath.Path) -> Any:
    """Reads JSON.

    Raises:
        ArtifactError: The file is no JSON, for example because it was truncated.
    """
    try:
        return json.loads(epath.Path(path).read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: damaged, no JSON ({error})") from None


def crc32_of(path: str | epath.Path) -> tuple[int, int]:
    """Returns the size in bytes and the CRC-32 of a file, read in blocks."""
    size, crc = 0, 0
    with epath.Path(path).open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return size, crc


def check_free_space(path: str | epath.Path, needed_bytes: int, what: str) -> None:
    """Refuses to begin what will not fit on the local disk.

    Raises:
        UserError: Fewer bytes are free than needed.
    """
    if not is_local(path):
        return
    existing = os.path.abspath(path)
    while not os.path.exists(existing):
        existing = os.path.dirname(existing)
    free = shutil.disk_usage(existing).free
    if needed_bytes > free:
        raise UserError(
            f"workdir={path}: {what} needs {human_bytes(needed_bytes)} and {human_bytes(free)} "
            "are free; free some space or set workdir to another disk"
        )


def human_bytes(number: float) -> str:
    """Returns a size with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(number) < 1024 or unit == "TiB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError
