"""What a broken connection interrupts is tried again, and then left to the next start."""

import errno
import time

from mlpmem_jax.errors import TryAgain, UserError
from mlpmem_jax.failures import first_line

MOST_RETRIES = 4
MOST_CHARS = 150  # of what went wrong
FIRST_WAIT_SECS = 1.0  # Doubled each time.
_PASSING_STATUS = (408, 425, 429)  # As every 5xx.
_PASSING_ERRNO = (
    errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET, errno.EHOSTUNREACH, errno.ENETDOWN,
    errno.ENETUNREACH, errno.EPIPE, errno.ETIMEDOUT,
)  # fmt: skip
# Base classes of requests, urllib3, aiohttp, httpx, botocore and the standard library.
_PASSING_CLASSES = frozenset(
    {
        "ChunkedEncodingError", "ClientConnectionError", "ClientPayloadError", "ConnectionError",
        "HTTPClientError", "IncompleteRead", "ProtocolError", "SSLError", "Timeout",
        "TimeoutError", "TransportError", "gaierror",
    }
)  # fmt: skip


def wait_or_raise(error: Exception, failures: int, what: str) -> None:
    """Waits before another try.

    Args:
        error: What went wrong.
        failures: How often in a row, this time included.
        what: What was read, for messages.

    Raises:
        UserError: Trying again cannot help.
        TryAgain: It has not helped so far.
    """
    if not is_passing(error):
        raise UserError(f"{what}: {first_line(error, MOST_CHARS)}") from None
    if failures > MOST_RETRIES:
        raise TryAgain(
            f"{what}: the connection broke {failures} times ({first_line(error, MOST_CHARS)}); "
            "the same command continues"
        ) from None
    time.sleep(FIRST_WAIT_SECS * 2 ** (failures - 1))


def is_passing(error: BaseException | None) -> bool:
    """Returns whether an error, or what caused it, is one of connections and may pass."""
    for _ in range(10):  # Chains may be circular.
        if error is None:
            return False
        status = _status(error)
        if status is not None:
            return status in _PASSING_STATUS or status >= 500
        if isinstance(error, OSError) and error.errno in _PASSING_ERRNO:
            return True
        if any(kind.__name__ in _PASSING_CLASSES for kind in type(error).__mro__):
            return True
        error = error.__cause__ or error.__context__
    return False


def _status(error: BaseException) -> int | None:
    """Returns the status of an HTTP answer that an error holds."""
    candidates = [getattr(getattr(error, "response", None), "status_code", None)]
    candidates += [getattr(error, name, None) for name in ("status", "code")]
    for value in candidates:
        if isinstance(value, int) and 400 <= value < 600:
            return value
    return None
