"""The errors that a user may see: one clear message, never a traceback.

The command line turns them into lines on standard error and an exit code
(:data:`EXIT_USER_ERROR`, :data:`EXIT_RUN_FAILED`, :data:`PREEMPTED`). Errors of the programmer stay
`AssertionError` and friends and keep their traceback.
"""

from collections.abc import Sequence

EXIT_RUN_FAILED = 1
EXIT_USER_ERROR = 2
PREEMPTED = 75  # Saved, start me again: the launcher does. EX_TEMPFAIL of sysexits.h.


class UserError(ValueError):
    """Something the user can mend: a key, a file, an artifact, a disk.

    Attributes:
        messages: One line a mistake; independent mistakes are reported together.
    """

    exit_code = EXIT_USER_ERROR

    def __init__(self, messages: str | Sequence[str]):
        self.messages: tuple[str, ...] = (
            (messages,) if isinstance(messages, str) else tuple(messages)
        )
        super().__init__("\n".join(self.messages))


class ConfigError(UserError):
    """A mistake in the configuration, found before any device or data is touched."""


class ArtifactError(UserError):
    """An artifact that is missing, damaged, or made from something else."""


class RunFailed(UserError):
    """A run that began well and cannot go on, for example on a non-finite loss."""

    exit_code = EXIT_RUN_FAILED
