"""What a person sees while a command runs. Process 0 alone speaks."""

import logging
import os
import sys
from typing import Any

from tqdm import tqdm

from mlpmem_jax.parallel import multihost


def is_speaker() -> bool:
    """Returns whether this process may print (process 0 of a run).

    Does not start a JAX backend: before any device is touched there is one speaker too.
    """
    return multihost.is_writer()


def say(line: str = "") -> None:
    """Prints one line on standard output."""
    if is_speaker():
        print(line, flush=True)


def warn(line: str) -> None:
    """Prints one line on standard error."""
    if is_speaker():
        print(f"warning: {line}", file=sys.stderr, flush=True)


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


def progress(total: int | None, unit: str, description: str, initial: int = 0) -> Any:
    """Returns a progress bar with rate and time left, on standard error.

    Where standard error is no terminal the bar prints a line every ten seconds, so that
    logs of unattended runs stay readable.
    """
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=initial,
        unit=unit,
        unit_scale=True,
        desc=description,
        dynamic_ncols=terminal,
        mininterval=0.2 if terminal else 10.0,
        maxinterval=1.0 if terminal else 10.0,
        ascii=not terminal,
        leave=terminal,
        disable=not is_speaker() or os.environ.get("MLPMEM_PROGRESS") == "off",
        file=sys.stderr,
    )
