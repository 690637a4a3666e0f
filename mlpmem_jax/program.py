"""How a program of this package begins and ends: signals, streams, imports, its exit code."""

import importlib
import os
import resource
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

from mlpmem_jax import signals
from mlpmem_jax.errors import EXIT_RUN_FAILED, EXIT_USER_ERROR
from mlpmem_jax.failures import explain

# Shards, metrics, sockets and what libraries hold open; systems allow 256 or more.
_LEAST_FILES = 128


def run(module: str = "mlpmem_jax.__main__", arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs a module's `main` as the whole of this process.

    Args:
        module: Its name; it may take long to import.
        arguments: For `main`; those of the process by default.
    """
    _open_closed_streams()
    _refuse_few_files()
    signals.listen()
    for stream in (sys.stdout, sys.stderr):
        # A table must not be lost because a terminal cannot show λ; one character stays one.
        stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    if os.environ.get("MLPMEM_TRACEBACK") != "1":
        # After a failure, what libraries left half-made falls apart with tracebacks of its own.
        sys.unraisablehook = lambda _: None
        warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
    code: int | str | None
    try:
        code = _imported_and_run(module, arguments)
    except SystemExit as end:  # --help
        code = end.code
    finally:
        signals.finish()
    sys.exit(_flushed(code))


def _flushed(code: int | str | None) -> int | str | None:
    """Writes what standard output still holds; returns the exit code."""
    try:
        sys.stdout.flush()
    except OSError as error:
        from mlpmem_jax.console import complain, discard_output

        discard_output()
        if not isinstance(error, BrokenPipeError):
            complain(f"standard output: {error.strerror}")
        return code or EXIT_RUN_FAILED
    return code


def _imported_and_run(module: str, arguments: Sequence[str] | None) -> int:
    try:
        main = importlib.import_module(module).main
    except (OSError, MemoryError, ImportError) as error:
        reason = explain(error)
        if reason is None or os.environ.get("MLPMEM_TRACEBACK") == "1":
            raise
        print(f"error: {reason}", file=sys.stderr)
        return EXIT_USER_ERROR
    return int(main(arguments))


def _refuse_few_files() -> None:
    """Ends a process that may open too few files: libraries would wait for a file for ever."""
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed != resource.RLIM_INFINITY and allowed < _LEAST_FILES:
        print(
            f"error: this process may open {allowed} files, and needs up to {_LEAST_FILES}: raise "
            "`ulimit -n`",
            file=sys.stderr,
        )
        sys.exit(EXIT_USER_ERROR)


def _open_closed_streams() -> None:
    """Opens streams that were closed (`>&-`), lest files are given their numbers and printed to."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing != number:
                os.dup2(nothing, number)
                os.close(nothing)
            mode = "w" if number else "r"
            setattr(sys, name, os.fdopen(number, mode, encoding="utf-8", closefd=False))


def command_line() -> NoReturn:
    """Runs the command line: what `mlpmem` calls."""
    run()
