"""The header of a GGUF file: its metadata, and which tensors it holds.

Read here and not through the package `gguf`, which takes seconds for a large vocabulary: every
command reads the shape of its decoder. The format: ggml-org/ggml, docs/gguf.md.
"""

import functools
import mmap
import os
import struct
from typing import Any, NamedTuple

from mlpmem_jax.errors import ConfigError

SUFFIX = ".gguf"
_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_STRING, _ARRAY = 8, 9
_NUMBERS = {
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}  # fmt: skip
_MOST_DIMS = 4


class TensorInfo(NamedTuple):
    """One tensor.

    Attributes:
        shape: Its shape, the last dim the one that is contiguous.
        kind: Number of its type in ggml.
        offset: Where its bytes begin in the file.
    """

    shape: tuple[int, ...]
    kind: int
    offset: int


class Header(NamedTuple):
    """What a file says before its tensors.

    Attributes:
        metadata: Values by key.
        tensors: By name.
    """

    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


def is_gguf(path: str) -> bool:
    """Returns whether a path is that of a GGUF file, by its name."""
    return path.lower().endswith(SUFFIX)


def read_header(path: str) -> Header:
    """Reads the header of a file, once as long as the file stays the same.

    Raises:
        ConfigError: It cannot be read, or is no whole GGUF file.
    """
    expanded = os.path.expanduser(path)
    try:
        about = os.stat(expanded)
        return _read(expanded, about.st_mtime_ns, about.st_size)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"decoder.pretrained={path}: cannot be read ({reason})") from None
    except (struct.error, ValueError, KeyError, OverflowError) as error:
        raise ConfigError(
            f"decoder.pretrained={path}: is no whole GGUF file of version 2 or 3 ({error})"
        ) from None


@functools.lru_cache(maxsize=2)
def _read(path: str, _: int, size: int) -> Header:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        reader = _Reader(content)
        if content[:4] != _MAGIC:
            raise ValueError("it does not begin with GGUF")
        reader.place = 4
        version, num_tensors, num_keys = (reader.number(kind) for kind in "IQQ")
        if version not in _VERSIONS:
            raise ValueError(f"version {version}")
        metadata = {reader.text(): reader.value(reader.number("I")) for _ in range(num_keys)}
        infos = dict(reader.tensor() for _ in range(num_tensors))
        step = metadata.get("general.alignment", 32)
        if not isinstance(step, int) or step < 1:
            raise ValueError(f"general.alignment={step!r}")
        begin = -(-reader.place // step) * step
        tensors = {name: info._replace(offset=begin + info.offset) for name, info in infos.items()}
        if any(info.offset > size for info in tensors.values()):
            raise ValueError("it is cut off")
        return Header(metadata, tensors)


class _Reader:
    """Reads values one after another."""

    def __init__(self, content: mmap.mmap):
        self._content, self.place = content, 0

    def number(self, code: str, count: int = 1) -> Any:
        layout = f"<{count}{code}"
        found = struct.unpack_from(layout, self._content, self.place)
        self.place += struct.calcsize(layout)
        return found[0] if count == 1 else list(found)

    def text(self) -> str:
        length = self.number("Q")
        found = self._content[self.place : self.place + length]
        if len(found) < length:
            raise ValueError("a text is cut off")
        self.place += length
        return found.decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_NUMBERS[kind])
        kind, count = self.number("I"), self.number("Q")
        if kind == _STRING:
            return [self.text() for _ in range(count)]
        if count < 2:
            return [self.number(_NUMBERS[kind]) for _ in range(count)]
        return self.number(_NUMBERS[kind], count)

    def tensor(self) -> tuple[str, TensorInfo]:
        name, num_dims = self.text(), self.number("I")
        if num_dims > _MOST_DIMS:
            raise ValueError(f"{name} has {num_dims} dims")
        shape = tuple(self.number("Q") for _ in range(num_dims))[::-1]
        kind = self.number("I")
        return name, TensorInfo(shape, kind, self.number("Q"))
