"""Failures of the machine, not of the program: full disks, permissions, memory.

The operating system raises `OSError`; TensorStore, Orbax and XLA put the same facts into
the messages of other exceptions. Either way the user gets one line that names the file.
"""

import contextlib
import errno
import importlib
import os
import re
from collections.abc import Iterator
from typing import Any

from mlpmem_jax.errors import UserError

_KEPT = "what is finished is kept: free space and start the same command again"
_BY_NUMBER = {
    errno.ENOSPC: f"no space left on the disk; {_KEPT}",
    errno.EDQUOT: f"the disk quota is used up; {_KEPT}",
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted",
    errno.EROFS: "the file system is read-only",
    errno.ENOENT: "no such file or directory",
    errno.ENOTDIR: "a part of this path is a file, not a directory",
    errno.EISDIR: "is a directory",
    errno.ELOOP: "symbolic links lead in a circle",
    errno.ENAMETOOLONG: "the path is too long",
    errno.EMFILE: "too many open files in this process (raise `ulimit -n`)",
    errno.ENFILE: "too many open files on this machine (close programs, or raise fs.file-max)",
    errno.EFBIG: "the file would be larger than the file system or `ulimit -f` allows",
    errno.ENOMEM: "the machine has no memory left, or `ulimit -v` allows no more",
    errno.EIO: "input/output error: look at the disk, or at the connection to it",
    errno.ESTALE: "stale NFS handle: the server has lost the file; start the same command again",
    errno.ETIMEDOUT: "timed out; start the same command again once the server answers",
    errno.ENOTCONN: "the file system is no longer mounted",
    errno.EHOSTDOWN: "the server does not answer",
    errno.ENOLCK: "the file system gives no locks; use a workdir on another one",
}
_ORDINARY = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
# Where a library passes on what the system said without its number.
_BY_WORDS = {
    "permission_denied": _BY_NUMBER[errno.EACCES],
    "can't start new thread": "no further thread can be started (raise `ulimit -u`, or the "
    "container's limit of processes)",
    "std::bad_alloc": _BY_NUMBER[errno.ENOMEM],
}
# TensorStore: "[os_error_code='27']", "[OS error 28: ENOSPC No space left on device]".
_NUMBER = re.compile(r"os_error_code='(\d+)'|\[OS error (\d+)")
_QUOTED_PATH = re.compile(r"""["'](?:file://)?(/[^"'\\]+)["'\\]""")

_STAGE_NOTE = "while making "
# What takes the memory of a stage, by the first part of the artifact's path.
_MEMORY_KEYS = {
    "decoder": "pretrain.batch_size or pretrain.loss_chunk_tokens",
    "memory": "train.batch_size or train.loss_chunk_tokens",
    "joint": "train.batch_size or train.loss_chunk_tokens",
    "datastore": "datastore.batch_size",
    "index": "retrieval.key_chunk_rows",
    "neighbors": "retrieval.query_batch or retrieval.key_chunk_rows",
    "targets": "retrieval.query_batch or retrieval.key_chunk_rows",
    "results": "evaluate.batch_size or evaluate.bootstrap_samples",
}
_ANY_MEMORY_KEY = (
    "the batch size of this stage (or its loss_chunk_tokens, query_batch, key_chunk_rows)"
)


@contextlib.contextmanager
def of_stage(name: str) -> Iterator[None]:
    """Notes with failures which artifact was being made."""
    try:
        yield
    except Exception as error:
        error.add_note(_STAGE_NOTE + name)
        raise


@contextlib.contextmanager
def of_file(path: object) -> Iterator[None]:
    """Names the file in failures of reading and writing, which the system leaves out."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


def reason_of(error: OSError) -> str:
    """Returns what the system said, in the words of this module where it has some."""
    return _BY_NUMBER.get(error.errno or 0) or error.strerror or str(error)


def os_error_in(error: BaseException, path: object) -> OSError | None:
    """Returns what the system said, if a library's error passes it on and it is no missing file.

    Args:
        error: What was raised.
        path: The file or array, where the message names none.
    """
    number = error.errno if isinstance(error, OSError) else None
    number = number or _number_in(str(error))
    if number is None or number in _ORDINARY:
        return None
    return OSError(number, os.strerror(number), _path_in(str(error)) or str(path))


def _number_in(message: str) -> int | None:
    """Returns the number of an error of the system that a library's message passes on."""
    found = _NUMBER.search(message)
    if found:
        return int(found[1] or found[2])
    lowered = message.lower()
    words = ((n, os.strerror(n).lower()) for n in _BY_NUMBER if n not in {*_ORDINARY, errno.EPERM})
    return next((number for number, word in words if word in lowered), None)


def _path_in(message: str) -> str | None:
    found = _QUOTED_PATH.search(message)
    return found[1] if found else None


def explain(error: BaseException) -> str | None:
    """Puts a failure of the machine into one line.

    Args:
        error: What was raised; the exceptions that it was raised from are looked at too.

    Returns:
        "PATH: what is wrong", or None where the failure is none of these.
    """
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        # A missing file that was caught and led to another error is not what went wrong.
        caught = link is not error and isinstance(link, OSError) and link.errno in _ORDINARY
        line = None if caught else _explain_one(link)
        if line:
            return line
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
    return None


def user_error_in(error: BaseException) -> UserError | None:
    """Returns the user's mistake that an exception is, was raised from, or groups."""
    if isinstance(error, UserError):
        return error
    if error.__cause__ is not None:
        return user_error_in(error.__cause__)
    if isinstance(error, BaseExceptionGroup):
        found = (user_error_in(part) for part in error.exceptions)
        return next((part for part in found if part), None)
    return None


def _explain_one(error: BaseException) -> str | None:
    message = str(error)
    if isinstance(error, MemoryError):
        return _out_of_memory(error, message)
    if isinstance(error, OSError) and error.errno in _BY_NUMBER:
        # Sockets and the like have no file; their own words are then the best there is.
        file = error.filename2 or error.filename
        return f"{_text(file)}: {_BY_NUMBER[error.errno]}" if file else _BY_NUMBER[error.errno]
    if not isinstance(error, ValueError | RuntimeError | OSError | ImportError):
        return None
    lowered = message.lower()
    number = _number_in(message)
    reason = _BY_NUMBER.get(number) if number and number not in _ORDINARY else None
    reason = reason or next((text for words, text in _BY_WORDS.items() if words in lowered), None)
    if reason is not None:
        path = _path_in(message)
        return f"{path}: {reason}" if path else f"{reason} ({first_line(message, 200)})"
    if "resource_exhausted" in lowered and "memory" in lowered:
        return _out_of_memory(error, message)
    return None


def _out_of_memory(error: BaseException, message: str) -> str:
    """Says where memory ran out, how much was asked for, and which keys to lower."""
    notes = (note for note in getattr(error, "__notes__", ()) if note.startswith(_STAGE_NOTE))
    note = next(notes, "")
    keys = _MEMORY_KEYS.get(note.removeprefix(_STAGE_NOTE).split("/")[0], _ANY_MEMORY_KEY)
    where = f" {note}" if note else ""
    asked = f" ({first_line(message, 200)})" if message.strip() else ""
    return f"out of memory{where}{asked}; lower {keys}"


def _text(path: object) -> str:
    return path.decode(errors="replace") if isinstance(path, bytes) else str(path)


def first_line(error: BaseException | str, most: int | None = None) -> str:
    """Returns the first line of a message (of its class where it has none), cut at a length."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return line if most is None or len(line) <= most else f"{line[:most]}…"


def import_package(name: str, what: str, requirements: str) -> Any:
    """Returns a package that only some runs need.

    Raises:
        UserError: It is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(
            f"{what} needs the package {name}, which is not installed: "
            f"pip install -r {requirements}"
        ) from None
