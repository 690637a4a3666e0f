"""`python -m mlpmem_jax.launching --processes N COMMAND …`: N processes on this machine.

They are joined by jax.distributed over a free port of localhost, with Gloo's collectives on
CPU. Started by `launch/run.sh --processes N`; does not start JAX itself.
"""

if __name__ == "__main__":  # Before the imports below, which take a second.
    from mlpmem_jax.program import run

    run("mlpmem_jax.launching")

import argparse
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlpmem_jax import __main__ as command_line
from mlpmem_jax.console import complain, note
from mlpmem_jax.errors import EXIT_USER_ERROR, UserError
from mlpmem_jax.failures import explain
from mlpmem_jax.parallel.cluster import (
    COORDINATOR,
    DEVICES_PER_PROCESS,
    NUM_PROCESSES,
    PROCESS_INDEX,
)
from mlpmem_jax.parallel.processes import run_processes
from mlpmem_jax.store.files import is_local

LOGS = "logs"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command in several processes.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit code of the first process that failed, 0 if none did.
    """
    flags = _parser().parse_args(argv)
    arguments: list[str] = flags.arguments
    try:
        # Once, here: a mistake is reported once, and nothing is started.
        _, config, options = command_line.parse(arguments)
    except (UserError, IndexError, SystemExit):
        return command_line.main(arguments)  # It says what is wrong, or helps.
    if options.dry_run:
        return command_line.main(arguments)
    workdir = Path(config.workdir if is_local(config.workdir) else ".").absolute()
    logs = Path(flags.logs).absolute() if flags.logs else workdir / LOGS
    try:
        logs.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        complain(explain(error) or str(error))
        return EXIT_USER_ERROR
    note(f"launch: {flags.processes} processes; logs of all but the first: {logs}/process-*.log")
    command = [sys.executable, "-P", "-m", "mlpmem_jax", *arguments]
    environments = environments_of(flags.processes, flags.devices_per_process, os.environ)
    return run_processes(command, environments, logs)


def environments_of(
    num_processes: int, devices_per_process: int | None, environment: Mapping[str, str]
) -> list[dict[str, str]]:
    """Returns the environment of each process.

    Args:
        num_processes: How many there are.
        devices_per_process: CPU devices to simulate in each.
        environment: What they inherit.
    """
    shared = {"JAX_PLATFORMS": "cpu", **environment}
    path = [str(Path(__file__).resolve().parents[1]), environment.get("PYTHONPATH", "")]
    shared["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    shared[COORDINATOR] = f"localhost:{free_port()}"
    shared[NUM_PROCESSES] = str(num_processes)
    if devices_per_process is not None:
        shared[DEVICES_PER_PROCESS] = str(devices_per_process)
    return [shared | {PROCESS_INDEX: str(index)} for index in range(num_processes)]


def free_port() -> int:
    """Returns a port that is free now, and so is the one above it (for the roll call)."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("localhost", 0))
            port = int(first.getsockname()[1])
            try:
                second.bind(("localhost", port + 1))
            except (OSError, OverflowError):
                continue
            return port


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="launch/run.sh", allow_abbrev=False)
    parser.add_argument("--processes", type=_count, required=True)
    parser.add_argument("--devices-per-process", type=_count)
    parser.add_argument("--logs")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return number
