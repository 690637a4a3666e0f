"""What a person sees while a command runs. Process 0 alone speaks."""

import contextlib
import logging
import os
import sys
import time
from typing import Any, Protocol

from tqdm import tqdm

from mlpmem_jax.parallel import multihost

_LINE_SECS = 30.0  # between two lines of progress where there is no terminal


def is_speaker() -> bool:
    """Returns whether this process may print (process 0 of a run).

    Does not start a JAX backend: before any device is touched there is one speaker too.
    """
    return multihost.is_writer()


def say(line: str = "") -> None:
    """Prints one line on standard output.

    Raises:
        OSError: It cannot be written; BrokenPipeError where the reader has left.
    """
    if not is_speaker():
        return
    try:
        with tqdm.external_write_mode(file=sys.stdout):  # not behind a bar
            print(line, flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from None


def warn(line: str) -> None:
    """Prints one line on standard error."""
    if is_speaker():
        note(f"warning: {line}")


def complain(message: str, kind: str = "error") -> None:
    """Prints why this process ends, on standard error; bars end above it."""
    with contextlib.suppress(OSError):
        for bar in list(getattr(tqdm, "_instances", ())):
            bar.close()
    note(f"{kind}: {message}")


def note(line: str) -> None:
    """Prints one line on standard error; one that cannot be written is no failure."""
    with contextlib.suppress(OSError), tqdm.external_write_mode(file=sys.stderr):
        print(line, file=sys.stderr, flush=True)


def discard_output() -> None:
    """Drops what standard output still holds and is given, once it cannot be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def quiet_libraries() -> None:
    """Keeps the notices of Orbax and others, which speak through absl, out of the output.

    Their errors too: they reach us as exceptions, and the log would show a full disk as a
    dozen tracebacks of background threads before our one line.
    """
    from absl import logging as absl_logging

    wanted = os.environ.get("MLPMEM_TRACEBACK") == "1"
    absl_logging.set_verbosity(absl_logging.ERROR if wanted else absl_logging.FATAL)
    for name in () if wanted else ("asyncio", "concurrent.futures"):
        logging.getLogger(name).setLevel(logging.CRITICAL)


class Progress(Protocol):
    """How far a stage is."""

    def update(self, n: int) -> object:
        """Advances by `n`."""
        ...

    def set_postfix(self, ordered_dict: dict[str, Any], refresh: bool) -> object:
        """Sets what is shown beside."""
        ...

    def close(self) -> object:
        """Shows the last state and ends."""
        ...

    def __enter__(self) -> "Progress": ...

    def __exit__(self, *failure: Any) -> object: ...


def progress(total: int | None, unit: str, description: str, initial: int = 0) -> Progress:
    """Returns a progress bar with rate and time left, on standard error.

    Where standard error is no terminal it is a line every half minute and one at the end, so that
    logs of unattended runs stay readable.
    """
    disable = not is_speaker() or os.environ.get("MLPMEM_PROGRESS") == "off"
    if not disable and not sys.stderr.isatty():
        return _Lines(total, unit, description, initial)
    bar: Progress = tqdm(
        total=total,
        initial=initial,
        unit=unit,
        unit_scale=True,
        desc=description,
        dynamic_ncols=True,
        mininterval=0.2,
        maxinterval=1.0,
        disable=disable,
        file=sys.stderr,
    )
    return bar


class _Lines:
    """Progress as lines of text."""

    def __init__(self, total: int | None, unit: str, description: str, initial: int):
        self._total, self._description = total, description
        self._unit = unit if unit == "B" else f" {unit}s"
        self._first = self._done = initial
        self._beside = ""
        self._started = self._shown = time.monotonic()
        self._open = True

    def update(self, n: int) -> None:
        self._done += n
        if time.monotonic() - self._shown >= _LINE_SECS:
            self._show()

    def set_postfix(self, ordered_dict: dict[str, Any], refresh: bool) -> None:
        self._beside = "".join(f", {name} {value}" for name, value in ordered_dict.items())

    def close(self) -> None:
        if self._open:
            self._open = False
            self._show()

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(self, kind: object, *failure: object) -> None:
        if kind is None:
            self.close()

    def _show(self) -> None:
        self._shown = time.monotonic()
        seconds = max(self._shown - self._started, 1e-9)
        rate = (self._done - self._first) / seconds
        line = f"{self._description}: {_count(self._done)}"
        if self._total:
            share = f" ({self._done / self._total:.0%})"
            line += f" of {_count(self._total)}{self._unit}{share}"
        else:
            line += self._unit
        line += f" in {_clock(seconds)}, {_count(rate)}{self._unit}/s"
        if self._open and self._total and rate > 0:
            line += f", {_clock((self._total - self._done) / rate)} left"
        note(line + self._beside)


def _count(number: float) -> str:
    return str(tqdm.format_sizeof(number)) if number >= 1000 else f"{number:.3g}"


def _clock(seconds: float) -> str:
    return str(tqdm.format_interval(seconds))
