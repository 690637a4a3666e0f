"""Text files, plain or compressed, read in blocks: memory does not grow with their size."""

import codecs
import contextlib
import gzip
import zlib
from collections.abc import Iterator
from typing import Any

from etils import epath

from mlpmem_jax.corpus.retries import is_passing, wait_or_raise
from mlpmem_jax.errors import UserError
from mlpmem_jax.failures import reason_of
from mlpmem_jax.store.files import is_local, unreachable

BLOCK_BYTES = 1 << 20
# A block of zstd holds at most 128 KiB however few bytes it takes: small bites bound memory.
_ZSTD_BITE_BYTES = 1 << 8
_GZIP, _ZSTD = (".gz",), (".zst", ".zstd")
_BYTE_ORDER_MARK = "\ufeff"
# How files begin that are taken for text by mistake.
_BEGINNINGS = {
    b"\x1f\x8b": "gzip without the suffix .gz",
    b"\x28\xb5\x2f\xfd": "zstd without the suffix .zst",
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bzip2",
    b"\x04\x22\x4d\x18": "lz4",
    b"7z\xbc\xaf": "7z",
    b"PK\x03\x04": "zip, or a document of an office program",
    b"PAR1": "Parquet",
    b"ARROW1": "Arrow",
    b"Obj\x01": "Avro",
    b"SQLite format 3": "SQLite",
    b"%PDF": "PDF",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_BEGINNING_BYTES = 16
_DAMAGED_GZIP = (gzip.BadGzipFile, EOFError, zlib.error)


class NotTextError(UserError):
    """A file that is not UTF-8 text; `corpus.on_error=skip` leaves it out."""


def read_text(path: str) -> Iterator[str]:
    """Reads a text file as it is: no newline is translated; a byte order mark is left out.

    Args:
        path: A plain, .gz, .zst or .zstd file, local or gs://.

    Yields:
        Text of up to about `BLOCK_BYTES` bytes.

    Raises:
        NotTextError: The file is not UTF-8, holds a NUL, or its compression is damaged.
        UserError: It cannot be read.
        TryAgain: The connection to its bucket broke and stays broken.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    position, begun = 0, False
    for block in _with_end(read_bytes(path)):
        held_back = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            place = position - held_back + error.start
            raise _not_text(path, place, error.reason) from None
        nul = block.find(b"\0")
        if nul >= 0:
            raise _not_text(path, position + nul, "a NUL byte")
        position += len(block)
        if text and not begun:
            begun, text = True, text.removeprefix(_BYTE_ORDER_MARK)
        if text:
            yield text


def read_bytes(path: str) -> Iterator[bytes]:
    """Reads a file in blocks, decompressed as its suffix says.

    Raises:
        NotTextError: The compression is damaged or ends early.
        UserError: The file cannot be read.
    """
    with opened(path) as file:
        if path.lower().endswith(_GZIP):
            yield from _gunzip(file, path)
        elif path.lower().endswith(_ZSTD):
            yield from _unzstd(file, path)
        else:
            while block := file.read(BLOCK_BYTES):
                yield block


@contextlib.contextmanager
def opened(path: str) -> Iterator[Any]:
    """Opens a file for `read(size)`; what goes wrong until it is closed becomes one line.

    Raises:
        UserError: The file cannot be read.
        TryAgain: The connection to its bucket broke and stays broken.
    """
    if not is_local(path):
        with contextlib.closing(_RemoteFile(path)) as remote:
            yield remote
        return
    try:
        with open(path, "rb") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: cannot be read (no such file)") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({reason_of(error)})") from None


class _RemoteFile:
    """A file in a bucket, which goes on where a connection broke."""

    mode = "rb"

    def __init__(self, path: str):
        self._path = path
        self._file: Any = None
        self._place = 0

    def read(self, size: int) -> bytes:
        """Reads up to so many bytes; none at the end."""
        failures = 0
        while True:
            try:
                if self._file is None:
                    self._file = epath.Path(self._path).open("rb")
                    if self._place:
                        self._file.seek(self._place)
                data: bytes = self._file.read(size)
            except FileNotFoundError:
                raise UserError(f"{self._path}: cannot be read (no such file)") from None
            # Each of the drivers has errors of its own: HTTP, credentials, sockets.
            except Exception as error:
                if not is_passing(error):
                    raise UserError(f"{self._path}: {unreachable(error)}") from None
                self.close()
                failures += 1
                wait_or_raise(error, failures, f"{self._path}, byte {self._place}")
            else:
                self._place += len(data)
                return data

    def seek(self, place: int) -> None:
        """Goes to a byte."""
        self.close()
        self._place = place

    def tell(self) -> int:
        """Returns the byte that is read next."""
        return self._place

    def close(self) -> None:
        """Closes what is open."""
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(Exception):  # The connection is broken, or done with.
                file.close()


def _with_end(blocks: Iterator[bytes]) -> Iterator[bytes]:
    yield from blocks
    yield b""


def _gunzip(file: Any, path: str) -> Iterator[bytes]:
    empty = True
    try:
        with gzip.GzipFile(fileobj=file) as stream:
            while block := stream.read(BLOCK_BYTES):
                empty = False
                yield block
            if empty and not file.tell():
                raise EOFError("it is empty")
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
    if fresh or not decompressor.eof:
        reason = "it is empty" if fresh else "it ends early"
        raise NotTextError(_advice(f"{path}: damaged zstd ({reason})"))
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
    problem = f"{path}: not UTF-8 text at byte {offset} ({reason})"
    begins = _beginning(path)
    for signature, name in _BEGINNINGS.items():
        if begins.startswith(signature):
            problem += f"; it looks like {name}, and text is read plain, as .gz or as .zst"
            break
    return NotTextError(_advice(problem))


def _beginning(path: str) -> bytes:
    found = b""
    for block in read_bytes(path):
        found += block
        if len(found) >= _BEGINNING_BYTES:
            break
    return found


def _advice(problem: str) -> str:
    return f"{problem}; leave the file out, or skip such files with corpus.on_error=skip"
