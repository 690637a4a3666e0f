"""Text files, plain or compressed, read in blocks: memory does not grow with their size."""

import codecs
import contextlib
import gzip
import zlib
from collections.abc import Iterator
from typing import Any

from etils import epath

from mlpmem_jax.datastore.files import is_local, unreachable
from mlpmem_jax.errors import UserError

BLOCK_BYTES = 1 << 20
# A block of zstd holds at most 128 KiB however few bytes it takes: small bites bound memory.
_ZSTD_BITE_BYTES = 1 << 8
_DAMAGED_GZIP = (gzip.BadGzipFile, EOFError, zlib.error)


class NotTextError(UserError):
    """A file that is not UTF-8 text; `corpus.on_error=skip` leaves it out."""


def read_text(path: str) -> Iterator[str]:
    """Reads a text file as it is: no newline is translated, no byte order mark dropped.

    Args:
        path: A plain, .gz or .zst file, local or gs://.

    Yields:
        Text of up to about `BLOCK_BYTES` bytes.

    Raises:
        NotTextError: The file is not UTF-8, holds a NUL, or its compression is damaged.
        UserError: It cannot be read.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    position = 0
    for block in _with_end(read_bytes(path)):
        held_back = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise _not_text(path, position - held_back + error.start, error.reason) from None
        nul = block.find(b"\0")
        if nul >= 0:
            raise _not_text(path, position + nul, "a NUL byte")
        position += len(block)
        if text:
            yield text


def read_bytes(path: str) -> Iterator[bytes]:
    """Reads a file in blocks, decompressed as its suffix says.

    Raises:
        NotTextError: The compression is damaged or ends early.
        UserError: The file cannot be read.
    """
    with _opened(path) as file:
        if path.endswith(".gz"):
            yield from _gunzip(file, path)
        elif path.endswith(".zst"):
            yield from _unzstd(file, path)
        else:
            while block := file.read(BLOCK_BYTES):
                yield block


def ends_of(path: str, num_bytes: int) -> tuple[int, bytes]:
    """Returns a file's size and its first and last bytes, as they are stored.

    Raises:
        UserError: The file cannot be read.
    """
    with _opened(path) as file:
        head = file.read(num_bytes)
        size = file.seek(0, 2)
        file.seek(max(0, size - num_bytes))
        return size, head + file.read(num_bytes)


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Any]:
    """Opens a file; what goes wrong until it is closed becomes one line."""
    try:
        with epath.Path(path).open("rb") as file:
            yield file
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path}: cannot be read (no such file)") from None
    except Exception as error:
        if not is_local(path):
            raise UserError(f"{path}: {unreachable(error)}") from None
        if isinstance(error, OSError):
            raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
        raise


def _with_end(blocks: Iterator[bytes]) -> Iterator[bytes]:
    yield from blocks
    yield b""


def _gunzip(file: Any, path: str) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=file) as stream:
            while block := stream.read(BLOCK_BYTES):
                yield block
    except _DAMAGED_GZIP as error:
        raise NotTextError(_advice(f"{path}: damaged gzip ({error})")) from None


def _unzstd(file: Any, path: str) -> Iterator[bytes]:
    new_decompressor, zstd_error = _zstd()
    decompressor, fresh = new_decompressor(), True
    held: list[bytes] = []
    num_held = 0
    try:
        while bite := file.read(_ZSTD_BITE_BYTES):
            while bite:  # A file may hold several frames, one after the other.
                if decompressor.eof:
                    decompressor = new_decompressor()
                held.append(decompressor.decompress(bite))
                num_held += len(held[-1])
                bite, fresh = decompressor.unused_data, False
            if num_held >= BLOCK_BYTES:
                yield b"".join(held)
                held, num_held = [], 0
    except zstd_error as error:
        raise NotTextError(_advice(f"{path}: damaged zstd ({error})")) from None
    if not (fresh or decompressor.eof):
        raise NotTextError(_advice(f"{path}: damaged zstd (it ends early)"))
    if num_held:
        yield b"".join(held)


def _zstd() -> tuple[Any, type[Exception]]:
    """Returns a factory of decompressors and their error."""
    try:
        import zstandard
    except ImportError:
        # Python 3.14 brings its own.
        from compression import zstd  # type: ignore[import-not-found,unused-ignore]

        return zstd.ZstdDecompressor, zstd.ZstdError
    whole = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    return whole.decompressobj, zstandard.ZstdError


def _not_text(path: str, offset: int, reason: str) -> NotTextError:
    return NotTextError(_advice(f"{path}: not UTF-8 text at byte {offset} ({reason})"))


def _advice(problem: str) -> str:
    return f"{problem}; leave the file out, or skip such files with corpus.on_error=skip"
