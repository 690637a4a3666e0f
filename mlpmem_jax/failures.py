"""Failures of the machine, not of the program: full disks, permissions, memory.

The operating system raises `OSError`; TensorStore, Orbax and XLA put the same facts into
the messages of other exceptions. Either way the user gets one line that names the file.
"""

import errno
import re

from mlpmem_jax.errors import UserError

_BY_NUMBER = {
    errno.ENOSPC: "no space left on the disk; what is finished is kept: free space and start the "
    "same command again",
    errno.EDQUOT: "the disk quota is used up; what is finished is kept: free space and start the "
    "same command again",
    errno.EACCES: "permission denied",
    errno.EPERM: "not permitted",
    errno.EROFS: "the file system is read-only",
    errno.ENOENT: "no such file or directory",
    errno.ENOTDIR: "a part of this path is a file, not a directory",
    errno.EISDIR: "is a directory",
    errno.ENAMETOOLONG: "the path is too long",
    errno.EMFILE: "too many open files (raise `ulimit -n`)",
    errno.EFBIG: "the file would be larger than the file system or `ulimit -f` allows",
}
_ORDINARY = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
_BY_WORDS = (
    ("no space left on device", _BY_NUMBER[errno.ENOSPC]),
    ("disk quota exceeded", _BY_NUMBER[errno.EDQUOT]),
    ("read-only file system", _BY_NUMBER[errno.EROFS]),
    ("permission denied", _BY_NUMBER[errno.EACCES]),
    ("permission_denied", _BY_NUMBER[errno.EACCES]),
    ("too many open files", _BY_NUMBER[errno.EMFILE]),
    ("file too large", _BY_NUMBER[errno.EFBIG]),
)
_OUT_OF_MEMORY = (
    "out of memory; lower the batch size of this stage (or its loss_chunk_tokens, "
    "query_batch, key_chunk_rows)"
)
_QUOTED_PATH = re.compile(r"""["'](?:file://)?(/[^"']+)["']""")


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
    if isinstance(error, MemoryError):
        return _OUT_OF_MEMORY
    if isinstance(error, OSError) and error.errno in _BY_NUMBER:
        # Sockets and the like have no file; their own words are then the best there is.
        path = error.filename2 or error.filename
        reason = _BY_NUMBER[error.errno]
        return f"{_text(path)}: {reason}" if path is not None else reason
    if not isinstance(error, ValueError | RuntimeError | OSError):
        return None
    message = str(error)
    lowered = message.lower()
    for words, reason in _BY_WORDS:
        if words in lowered:
            path = _QUOTED_PATH.search(message)
            return f"{path[1]}: {reason}" if path else f"{reason} ({_first_line(message)})"
    if "resource_exhausted" in lowered and "memory" in lowered:
        return f"{_OUT_OF_MEMORY} ({_first_line(message)})"
    return None


def _text(path: object) -> str:
    return path.decode(errors="replace") if isinstance(path, bytes) else str(path)


def _first_line(message: str) -> str:
    line = message.strip().splitlines()[0]
    return line if len(line) <= 200 else line[:197] + "..."
