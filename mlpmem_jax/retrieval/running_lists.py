"""The nearest so far of queries whose search goes on: files beside what they become.

A file holds the lists of a block of queries and how many key shards they cover. It is replaced as
a whole, so that a search goes on after a kill at (key shard, block).
"""

import contextlib
import os
import re
import struct
import zlib
from collections.abc import Sequence

import numpy as np
from etils import epath

from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.retrieval.merge import Neighbors
from mlpmem_jax.store.contents import RUNNING
from mlpmem_jax.store.files import TEMPORARY, is_local, write_bytes

# Key shards covered, queries, neighbours, CRC-32 of the rest; CRC-32 of these.
_HEAD = struct.Struct("<4qI")
_NAME = re.compile(rf"\d+-\d+\.lists({re.escape(TEMPORARY)})?")


class RunningLists:
    """Running lists of an artifact.

    Args:
        artifact: Its directory.
        num_neighbors: Neighbours of a list.
    """

    def __init__(self, artifact: epath.Path, num_neighbors: int):
        self._path = artifact / RUNNING
        self._num_neighbors = num_neighbors

    def prepare(self, blocks: Sequence[slice]) -> list[int]:
        """Returns how many key shards the list of each block covers; removes all other files.

        Args:
            blocks: Rows of the queries, in order.

        Raises:
            ArtifactError: A file is damaged; it is named.
        """
        wanted = {self._file(block).name for block in blocks}
        names = self._names()
        for name in names - wanted:  # Of rows that are done, or of other blocks.
            (self._path / name).unlink(missing_ok=True)
        if not blocks:
            self._remove_folder()
            return []
        self._path.mkdir(parents=True, exist_ok=True)
        return [self._covered(block) if self._file(block).name in names else 0 for block in blocks]

    def read(self, block: slice, num_queries: int) -> Neighbors:
        """Returns the lists of a block.

        Args:
            block: Its rows.
            num_queries: How many of them are searched for.

        Raises:
            ArtifactError: The file is damaged; it is named.
        """
        file = self._file(block)
        data = file.read_bytes()
        shape = (num_queries, self._num_neighbors)
        size = shape[0] * shape[1]
        rest = memoryview(data)[_HEAD.size :]
        if len(rest) != 12 * size or self._head(file, data)[1:] != (*shape, zlib.crc32(rest)):
            raise _damaged(file)
        row = np.frombuffer(rest, np.int64, size).reshape(shape)
        return Neighbors(np.frombuffer(rest, np.float32, size, 8 * size).reshape(shape), row)

    def write(self, block: slice, num_covered: int, lists: Neighbors) -> None:
        """Replaces the lists of a block.

        Args:
            block: Rows of the queries.
            num_covered: Key shards that they have been searched in.
            lists: The nearest in these.
        """
        row = np.ascontiguousarray(lists.row_QK, np.int64).tobytes()
        data = row + np.ascontiguousarray(lists.distance_QK, np.float32).tobytes()
        about = struct.pack("<4q", num_covered, *lists.row_QK.shape, zlib.crc32(data))
        head = about + struct.pack("<I", zlib.crc32(about))
        write_bytes(self._file(block), head + data)

    def _file(self, block: slice) -> epath.Path:
        return self._path / f"{block.start}-{block.stop}.lists"

    def _covered(self, block: slice) -> int:
        with self._file(block).open("rb") as file:
            return self._head(self._file(block), file.read(_HEAD.size))[0]

    @staticmethod
    def _head(file: epath.Path, data: bytes) -> tuple[int, ...]:
        head = data[: _HEAD.size]
        if len(head) < _HEAD.size or zlib.crc32(head[:-4]) != _HEAD.unpack(head)[-1]:
            raise _damaged(file)
        return _HEAD.unpack(head)[:-1]

    def _names(self) -> set[str]:
        if not self._path.exists():
            return set()
        return {entry.name for entry in self._path.iterdir() if _NAME.fullmatch(entry.name)}

    def _remove_folder(self) -> None:
        if is_local(self._path):  # In a bucket folders are but names.
            with contextlib.suppress(OSError):  # It is not there, or holds what is not ours.
                os.rmdir(self._path)


def _damaged(file: epath.Path) -> ArtifactError:
    return ArtifactError(
        f"{file}: damaged running lists of a search; remove this file, and the same command "
        "searches for its rows again"
    )
