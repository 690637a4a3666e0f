"""Small files written whole or not at all, checksums, and free space."""

import contextlib
import errno
import fcntl
import functools
import glob
import itertools
import json
import os
import tempfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from etils import epath

from mlpmem_jax.config.keys import holds_path
from mlpmem_jax.errors import ArtifactError, ConfigError, UserError
from mlpmem_jax.failures import first_line, of_file
from mlpmem_jax.parallel.hardware import free_disk
from mlpmem_jax.units import human_bytes

# Of what is written before it gets its name: no name that a user gives a file.
TEMPORARY = ".mlpmem-tmp"
_BLOCK_BYTES = 1 << 20
# What file systems answer that do not lock files.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}
_has_locks: dict[int, bool] = {}  # By device.
_BUCKETS = ("gs://", "s3://")
_CHECKPOINT_BUCKETS = ("gs://",)  # Orbax 0.12 refuses s3:// ("path should be absolute").


def is_foreign(name: str) -> bool:
    """Returns whether a file is one that systems and editors leave in any folder."""
    hidden = name.startswith(".")  # .DS_Store, ._name, .nfs0123, .name.swp
    return hidden or name.endswith("~") or name.lower() in ("thumbs.db", "desktop.ini")


def read_own_paths_literally() -> None:
    """Makes `glob` of etils' paths take the path itself as it is, as pathlib does.

    It joins path and pattern, so that in a folder named `a[1]` nothing is found; Orbax finds the
    parts of a checkpoint that way, and without them saves one that cannot be read.
    """
    paths: Any = next(cls for cls in type(epath.Path("/")).__mro__ if "glob" in vars(cls))
    original = vars(paths)["glob"]
    if getattr(original, "is_literal", False):
        return

    @functools.wraps(original)
    def literal(self: epath.Path, pattern: str) -> Iterator[epath.Path]:
        return original(type(self)(glob.escape(os.fspath(self))), pattern)

    literal.is_literal = True  # type: ignore[attr-defined]
    paths.glob = literal


def is_local(path: str | epath.Path) -> bool:
    """Returns whether a path lies on a local file system."""
    return "://" not in os.fspath(path)


def check_reachable(settings: Mapping[str, Any], read: Collection[str] | None = None) -> None:
    """Asks the buckets that a configuration names whether they answer.

    Args:
        settings: A configuration, JSON-ready.
        read: The sections and keys that are read; the paths of others are not looked at. None:
            all are.

    Raises:
        ConfigError: One line for each key and bucket that cannot be used: what is wrong with
            the path, the package that is missing, or what the bucket answers.
    """
    remote: dict[tuple[str, str], str] = {}
    for key, path in _named_paths(settings):
        if not is_local(path) and _is_read(key, read):
            # A thousand texts of one bucket are one question.
            remote.setdefault((key, _bucket_of(path)), path)
    mistakes: list[str] = []
    answers: dict[str, str | None] = {}
    for (key, bucket), path in remote.items():
        problem = _misplaced(key, path)
        if problem is None:
            if bucket not in answers:
                answers[bucket] = _answer(path)
            problem = answers[bucket]
        if problem is not None:
            mistakes.append(f"{key}={path}: {problem}")
    if mistakes:
        raise ConfigError(mistakes)


def _named_paths(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields the keys that name files or directories, dotted, with each of their values."""
    for name, value in settings.items():
        key = f"{prefix}{name}"
        if holds_path(key):
            paths = [value] if isinstance(value, str) else value or ()
            yield from ((key, path) for path in paths)
        elif isinstance(value, Mapping):
            yield from _named_paths(value, f"{key}.")
        elif isinstance(value, list):
            for number, entry in enumerate(value):
                if isinstance(entry, Mapping):
                    yield from _named_paths(entry, f"{key}.{number}.")


def _is_read(key: str, read: Collection[str] | None) -> bool:
    return read is None or any(f"{key}.".startswith(f"{one}.") for one in read)


def _bucket_of(path: str) -> str:
    return "/".join(path.split("/", 3)[:3])


def _misplaced(key: str, path: str) -> str | None:
    """Says why nothing of this kind can lie there, or None where it can."""
    if not path.startswith(_BUCKETS):
        return "must be a local path, gs://… or s3://…"
    if key.split(".")[-1] == "workdir" and glob.has_magic(path):
        # fsspec would remove, below `a[1]`, what lies below `a1`.
        return "a work directory in a bucket may hold none of * ? [ in its path"
    if key == "workdir" and not path.startswith(_CHECKPOINT_BUCKETS):
        return (
            "checkpoints cannot be written there (Orbax writes to local paths and gs://…); texts "
            "and tokenizer may lie in s3://…"
        )
    return None


def _answer(path: str) -> str | None:
    """Asks a bucket whether a path, or the folder of a glob, exists; returns what failed."""
    _see_what_others_write()
    fixed = list(itertools.takewhile(lambda part: not glob.has_magic(part), path.split("/")))
    try:
        epath.Path("/".join(fixed)).exists()
    # Each of the drivers has errors of its own: HTTP, credentials, sockets.
    except Exception as error:
        return unreachable(error)
    return None


def unreachable(error: Exception) -> str:
    """Says why a bucket cannot be read, whatever its driver raised."""
    if isinstance(error, ImportError):
        return "paths in buckets need further packages (pip install -r requirements-remote.txt)"
    return f"cannot be reached ({first_line(error)})"


def _see_what_others_write() -> None:
    """Keeps the drivers from remembering listings for ever, as they do by default.

    TensorStore and the other processes of a run write past them: files would be missing from
    listings, or be cut at the length that they had before.
    """
    with contextlib.suppress(ImportError):
        import fsspec.config  # type: ignore[import-untyped]

        for protocol in ("gs", "gcs", "s3"):
            options = fsspec.config.conf.setdefault(protocol, {})
            options.setdefault("use_listings_cache", False)


def absolute(path: str | epath.Path) -> epath.Path:
    """Returns a path that does not depend on the current directory (Orbax wants that)."""
    return epath.Path(os.path.abspath(path) if is_local(path) else path)


def write_bytes(path: str | epath.Path, data: bytes) -> None:
    """Writes a file so that a kill leaves the old one or the new one, never half.

    Raises:
        UserError: A bucket does not take it.
        OSError: A local disk does not.
    """
    path = epath.Path(path)
    if not is_local(path):
        _put(path, data)
        return
    # One name a target: what a kill left is overwritten by the next start.
    temporary = f"{os.fspath(path)}{TEMPORARY}"
    try:
        with of_file(path), open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise


def _put(path: epath.Path, data: bytes) -> None:
    """Writes an object: buckets put them atomically."""
    try:
        path.write_bytes(data)
    except FileNotFoundError:  # Anybody may look for objects in a bucket that is not there.
        raise UserError(f"{path}: cannot be written (there is no such bucket)") from None
    except Exception as error:
        raise UserError(f"{path}: cannot be written ({first_line(error)})") from None


def write_json(path: str | epath.Path, value: Any) -> None:
    """Writes JSON atomically."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def read_json(path: str | epath.Path) -> Any:
    """Reads JSON.

    Raises:
        ArtifactError: The file is no JSON, for example because it was truncated.
    """
    try:
        with of_file(path):
            return json.loads(epath.Path(path).read_bytes())
    except (ValueError, RecursionError) as error:  # Also numbers of thousands of digits.
        raise ArtifactError(f"{path}: damaged, no JSON ({error})") from None


def crc32_of(path: str | epath.Path) -> tuple[int, int]:
    """Returns the size in bytes and the CRC-32 of a file, read in blocks."""
    size, crc = 0, 0
    with of_file(path), epath.Path(path).open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            size += len(block)
            crc = zlib.crc32(block, crc)
    return size, crc


def has_locks(path: str | epath.Path) -> bool:
    """Returns whether the file system of a path locks files; each is asked once.

    Buckets do not; where a local directory cannot be written to, nothing is locked either.
    """
    if not is_local(path):
        return False
    directory = _existing(path)
    device = os.stat(directory).st_dev
    if device not in _has_locks:
        _has_locks[device] = _locks_in(directory)
    return _has_locks[device]


def _locks_in(directory: str) -> bool:
    try:
        with tempfile.TemporaryFile(dir=directory, prefix=TEMPORARY) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # What we use ourselves,
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # and what TensorStore does.
    except OSError as error:
        return error.errno not in _NO_LOCKS
    return True


def _existing(path: str | epath.Path) -> str:
    """Returns the nearest directory above a path that exists, or the path."""
    existing = os.path.abspath(path)
    while not os.path.isdir(existing):
        existing = os.path.dirname(existing)
    return existing


def check_free_space(path: str | epath.Path, needed_bytes: int, what: str) -> None:
    """Refuses to begin what will not fit on the local disk.

    Raises:
        UserError: Fewer bytes are free than needed.
    """
    free = free_disk(os.fspath(path))
    if free is not None and needed_bytes > free:
        raise UserError(
            f"workdir={path}: {what} needs {human_bytes(needed_bytes)} and {human_bytes(free)} "
            "are free; free some space or set workdir to another disk"
        )


def describe_file(path: epath.Path) -> dict[str, Any]:
    """Returns size and CRC-32 of a file."""
    size, crc = crc32_of(path)
    return {"bytes": size, "crc32": f"{crc:08x}"}


def verify_file(path: epath.Path, expected: Mapping[str, Any]) -> None:
    """Compares a file with its recorded size and checksum.

    Raises:
        ArtifactError: It is missing, truncated or changed.
    """
    if not path.exists():
        raise ArtifactError(f"{path}: missing, though its manifest lists it")
    found = describe_file(path)
    if found["bytes"] != expected["bytes"]:
        raise ArtifactError(
            f"{path}: truncated or changed, {found['bytes']} bytes and not {expected['bytes']}"
        )
    if found["crc32"] != expected["crc32"]:
        raise ArtifactError(
            f"{path}: damaged, checksum {found['crc32']} and not {expected['crc32']}"
        )
