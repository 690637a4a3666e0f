"""Which text it is: digests of what files hold.

A digest is remembered with size, time and inode of its file, so that a start reads only what has
changed or is new to it.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from etils import epath

from mlpmem_jax.console import progress
from mlpmem_jax.corpus.files import BLOCK_BYTES, opened
from mlpmem_jax.corpus.sources import Part
from mlpmem_jax.errors import UserError
from mlpmem_jax.failures import reason_of
from mlpmem_jax.store.files import is_local, unreachable, write_bytes
from mlpmem_jax.store.manifest import fingerprint_of

FILE = "text-digests.json"
_END_BYTES = 4096
_THREADS = 8
# A file that was changed within so many seconds may change again with the same time.
_SETTLED_SECS = 2.0
_SHOWN_BYTES = 256 << 20  # Reading more takes so long that it is shown.


class _Wanted(NamedTuple):
    """A file whose digest is wanted.

    Attributes:
        path: Where it is.
        stamp: Its size, time and inode (`stamp_of`).
        num_bytes: How many bytes of its beginning matter; the rest is size and last bytes.
    """

    path: str
    stamp: list[Any]
    num_bytes: int

    @property
    def key(self) -> str:
        path = os.path.abspath(self.path) if is_local(self.path) else self.path
        return f"{self.num_bytes}:{path}"


class Digests:
    """Digests of files, as the last start left them, and those that are new.

    Args:
        folder: Where they are remembered.
    """

    def __init__(self, folder: str | epath.Path):
        self._file = epath.Path(folder) / FILE
        self._known = self._read()
        self._used: dict[str, list[Any]] = {}

    def _read(self) -> dict[str, list[Any]]:
        try:
            found = json.loads(self._file.read_bytes())
            files: dict[str, list[Any]] = found["files"]
            return files if found["fingerprint"] == fingerprint_of(files) else {}
        except (OSError, ValueError, TypeError, KeyError):
            return {}  # None are remembered, or they are damaged: all files are read again.

    def listing_of(self, parts: Sequence[Part], max_bytes: int | None) -> dict[str, Any]:
        """Returns a digest of what the files hold, in their order, and their number and bytes.

        Names and places of files are no part of it. With `max_bytes` it is so much of the files
        that counts in full, and of the others size, beginning and end. What a Hugging Face dataset
        holds is not looked at.

        Raises:
            UserError: A file cannot be read.
            TryAgain: A connection broke.
        """
        wanted = list(_wanted(parts, max_bytes))
        digests = iter(self._of(wanted))
        digest = hashlib.blake2b(digest_size=8)
        for number, part in enumerate(parts):
            for _ in part.files:
                content = "dataset" if part.is_dataset else next(digests)
                digest.update(json.dumps([number, part.split, content]).encode())
        return {
            "digest": digest.hexdigest(),
            "files": sum(len(part.files) for part in parts),
            "bytes": sum(one.stamp[0] for one in wanted),
        }

    def _of(self, wanted: Sequence[_Wanted]) -> list[str]:
        unread = {one.key: one for one in wanted if self._known.get(one.key, [])[:-1] != one.stamp}
        self._used |= {one.key: self._known[one.key] for one in wanted if one.key not in unread}
        total = sum(one.num_bytes for one in unread.values())
        shown = progress(total, "B", "comparing text") if total > _SHOWN_BYTES else None
        with shown or contextlib.nullcontext(), ThreadPoolExecutor(_THREADS) as pool:
            digests = pool.map(_digest, unread.values())
            for (key, one), digest in zip(unread.items(), digests, strict=True):
                self._used[key] = [*one.stamp, digest]
                if shown:
                    shown.update(one.num_bytes)
        return [self._used[one.key][-1] for one in wanted]

    def save(self) -> None:
        """Remembers the digests that were used, of files that have not changed just now."""
        now = time.time_ns()
        files = {
            key: entry for key, entry in self._used.items() if now - entry[1] > _SETTLED_SECS * 1e9
        }
        if files == self._known:
            return
        text = json.dumps({"fingerprint": fingerprint_of(files), "files": files})
        # It only saves time: a full disk or a folder of somebody else's are met elsewhere.
        with contextlib.suppress(OSError, UserError):
            write_bytes(self._file, text.encode())
            self._known = files


def _wanted(parts: Sequence[Part], max_bytes: int | None) -> Iterator[_Wanted]:
    files = [path for part in parts if not part.is_dataset for path in part.files]
    with ThreadPoolExecutor(_THREADS) as pool:
        stamps = dict(zip(files, pool.map(stamp_of, files), strict=True))
    taken: dict[str | None, int] = {}
    for part in parts:
        for path in () if part.is_dataset else part.files:
            count = size = stamps[path][0]
            if max_bytes is not None:
                left = max_bytes - taken.get(part.split, 0)
                count = min(size, max(left, _END_BYTES))
                taken[part.split] = taken.get(part.split, 0) + count
            yield _Wanted(path, stamps[path], count)


def stamp_of(path: str) -> list[Any]:
    """Returns what changes when a file does: size, time of change in ns, and inode.

    Raises:
        UserError: It cannot be asked.
    """
    if not is_local(path):
        return _remote_stamp(path)
    try:
        info = os.stat(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)})") from None
    return [info.st_size, info.st_mtime_ns, info.st_ino]


def _remote_stamp(path: str) -> list[Any]:
    """Not every driver tells the time of a change: the last bytes stand for it."""
    try:
        info = epath.Path(path).stat()
    except Exception as error:  # Each of the drivers has errors of its own.
        raise UserError(f"{path}: {unreachable(error)}") from None
    digest = hashlib.blake2b(_last_bytes(path, info.length), digest_size=8).hexdigest()
    return [info.length, info.mtime * 10**9, digest]


def _digest(wanted: _Wanted) -> str:
    size = wanted.stamp[0]
    digest = hashlib.blake2b(json.dumps(size).encode(), digest_size=16)
    left = wanted.num_bytes
    with opened(wanted.path) as file:
        while left and (block := file.read(min(left, BLOCK_BYTES))):
            digest.update(block)
            left -= len(block)
    if wanted.num_bytes < size:
        digest.update(_last_bytes(wanted.path, size))
    return digest.hexdigest()


def _last_bytes(path: str, size: int) -> bytes:
    with opened(path) as file:
        file.seek(max(0, size - _END_BYTES))
        found: bytes = file.read(_END_BYTES)
        return found
