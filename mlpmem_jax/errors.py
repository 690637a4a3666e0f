"""The errors that a user may see: one clear message, never a traceback.

The command line turns them into lines on standard error and an exit code
(:data:`EXIT_USER_ERROR`, :data:`EXIT_RUN_FAILED`, :data:`PREEMPTED`). Errors of the programmer stay
`AssertionError` and friends and keep their traceback.
"""

import contextlib
from collections.abc import Iterator, Sequence

EXIT_RUN_FAILED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it.
PREEMPTED = 75  # Saved, start me again: the launcher does. EX_TEMPFAIL of sysexits.h.
_LONGEST, _MOST = 600, 20  # characters of a message, and messages


def one_line(message: str) -> str:
    """Returns a message that any terminal shows as one line of bounded length.

    What is too long is cut in the middle: where it begins and how it ends says most.
    """
    line = " ".join(filter(None, map(str.strip, message.split("\n"))))
    if len(line) > _LONGEST:
        half = _LONGEST // 2
        line = f"{line[:half]} … {line[-half:]}"
    if line.isprintable():
        return line
    escaped = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return "".join(escaped)


class UserError(ValueError):
    """Something the user can mend: a key, a file, an artifact, a disk.

    Attributes:
        messages: One line a mistake; independent mistakes are reported together.
    """

    exit_code = EXIT_USER_ERROR

    def __init__(self, messages: str | Sequence[str]):
        lines = [one_line(line) for line in ([messages] if isinstance(messages, str) else messages)]
        if len(lines) > _MOST:
            lines[_MOST:] = [f"and {len(lines) - _MOST} more like these"]
        self.messages: tuple[str, ...] = tuple(lines)
        super().__init__("\n".join(self.messages))


class ConfigError(UserError):
    """A mistake in the configuration, found before any device or data is touched."""


class ArtifactError(UserError):
    """An artifact that is missing, damaged or stale."""


class StaleArtifact(ArtifactError):
    """An artifact whose inputs were rebuilt since it was built."""


class RunFailed(UserError):
    """A run that began well and cannot go on, for example on a non-finite loss."""

    exit_code = EXIT_RUN_FAILED


class TryAgain(UserError):
    """What a later start may find working again, as a broken connection: the launcher makes one."""

    exit_code = PREEMPTED


class Mistakes:
    """Gathers independent mistakes, so that a user sees all of them at once."""

    def __init__(self) -> None:
        self._first: UserError | None = None
        self._messages: dict[str, None] = {}

    @contextlib.contextmanager
    def gather(self) -> Iterator[None]:
        """Takes a mistake of its block and goes on after it."""
        try:
            yield
        except UserError as error:
            self._first = self._first or error
            self._messages |= dict.fromkeys(error.messages)

    def __bool__(self) -> bool:
        return self._first is not None

    def refuse(self) -> None:
        """Raises what was gathered, each message once; nothing where there is none.

        Raises:
            UserError: Of the kind of the first mistake.
        """
        if self._first is not None:
            raise type(self._first)(list(self._messages)) from None
