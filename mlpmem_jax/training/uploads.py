"""Files that grow, in buckets, where objects cannot.

What is added becomes an object of its own, and neighbours are merged once the later one is
as large as the earlier: n additions upload each byte O(log n) times, not O(n), and leave
O(log n) objects. Read in the order of their numbers they are the file.
"""

import dataclasses
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from etils import epath

from mlpmem_jax.console import warn
from mlpmem_jax.store.files import write_bytes

UPLOAD_SECS = 60.0


@dataclasses.dataclass(frozen=True)
class _Piece:
    number: int
    data: bytes


class GrowingObject:
    """PATH and, while it grows, PATH.000001, …"""

    def __init__(self, path: epath.Path, data: bytes = b""):
        """Takes over what is there.

        Args:
            path: Where the file begins.
            data: Content of that object; b"" also where it does not exist yet.
        """
        self._path = path
        self._pieces = [_Piece(0, data)]

    def append(self, data: bytes) -> None:
        """Adds content. After an error the object is as before, and may be tried again."""
        if not data:
            return
        pieces = [*self._pieces, _Piece(self._pieces[-1].number + 1, data)]
        while len(pieces) > 1 and len(pieces[-2].data) <= len(pieces[-1].data):
            pieces[-2:] = [_Piece(pieces[-2].number, pieces[-2].data + pieces[-1].data)]
        self._replace(pieces)

    def merge(self) -> None:
        """Makes one object of all pieces."""
        if len(self._pieces) > 1:
            self._replace([_Piece(0, b"".join(piece.data for piece in self._pieces))])

    def _replace(self, pieces: list[_Piece]) -> None:
        """Writes the last piece, and removes those that it holds now, in this order."""
        write_bytes(_piece_path(self._path, pieces[-1].number), pieces[-1].data)
        for gone in {p.number for p in self._pieces} - {p.number for p in pieces}:
            _piece_path(self._path, gone).unlink(missing_ok=True)
        self._pieces = pieces


def _piece_path(path: epath.Path, number: int) -> epath.Path:
    return path.parent / f"{path.name}.{number:06d}" if number else path


def pieces_of(path: epath.Path) -> list[epath.Path]:
    """Returns the objects of a file, in order.

    A kill may have left pieces that an earlier one holds already.
    """
    if not path.parent.exists():
        return []
    numbered = {}
    for entry in path.parent.iterdir():
        suffix = entry.name.removeprefix(f"{path.name}.")
        if suffix != entry.name and suffix.isdigit():
            numbered[int(suffix)] = entry
    return ([path] if path.exists() else []) + [numbered[n] for n in sorted(numbered)]


class Uploads:
    """Sends additions to growing objects, from a thread of its own."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "uploads")
        self._running: Future[None] | None = None
        self._unsent: dict[GrowingObject, bytes] = {}
        self._last = time.monotonic()

    def due(self) -> bool:
        """Returns whether something may be sent: the last time is a minute ago, and over."""
        return time.monotonic() - self._last >= UPLOAD_SECS and not self.busy()

    def busy(self) -> bool:
        """Returns whether the last additions are still on their way."""
        return self._running is not None and not self._running.done()

    def send(self, additions: Mapping[GrowingObject, bytes]) -> None:
        """Begins to send; call it when not busy. What failed before is sent along."""
        assert not self.busy()
        error = self._running.exception() if self._running else None
        if error is not None:
            warn(f"metrics were not uploaded, which is tried again: {error}")
        self._take(additions)
        self._running = self._thread.submit(self._send)

    def finish(self, additions: Mapping[GrowingObject, bytes]) -> None:
        """Sends the last additions and merges all pieces; errors are raised."""
        self._thread.shutdown()
        self._take(additions)
        self._send()
        for target in additions:
            target.merge()

    def _take(self, additions: Mapping[GrowingObject, bytes]) -> None:
        self._last = time.monotonic()
        for target, data in additions.items():
            self._unsent[target] = self._unsent.get(target, b"") + data

    def _send(self) -> None:
        for target in list(self._unsent):
            target.append(self._unsent[target])
            del self._unsent[target]
