"""`python -m mlpmem_jax.launching --processes N COMMAND …`: N processes on this machine.

They are joined by jax.distributed over a free port of localhost, with Gloo's collectives on
CPU. Started by `launch/run.sh --processes N`; does not start JAX itself.

`--check COMMAND …` starts nothing: it refuses what is known here to be wrong, before the
launcher builds an image, submits a job or creates a machine.
"""

if __name__ == "__main__":  # Before the imports below, which take a second.
    from mlpmem_jax.program import run

    run("mlpmem_jax.launching")

import argparse
import contextlib
import importlib
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from mlpmem_jax import __main__ as command_line
from mlpmem_jax.commands import COMMANDS
from mlpmem_jax.config.schema import Config
from mlpmem_jax.console import complain, note
from mlpmem_jax.corpus.sources import find_parts
from mlpmem_jax.errors import EXIT_USER_ERROR, ArtifactError, ConfigError, UserError
from mlpmem_jax.failures import explain
from mlpmem_jax.parallel.cluster import (
    COORDINATOR,
    DEVICES_PER_PROCESS,
    NUM_PROCESSES,
    PROCESS_INDEX,
)
from mlpmem_jax.parallel.processes import run_processes
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.pipeline.sources import Unread
from mlpmem_jax.store.files import check_reachable, is_local
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.run_record import RunRecord

LOGS = "logs"
# Commands that begin with the text; the others read what these have made.
_FROM_TEXT = ("tokenize", "run")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command in several processes.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit code of the first process that failed, 0 if none did.
    """
    flags = _parser().parse_args(argv)
    arguments: list[str] = flags.arguments
    if flags.check:
        return check(arguments, shares_files=flags.shares_files)
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


def check(arguments: Sequence[str], *, shares_files: bool) -> int:
    """Refuses a command that cannot succeed where it is going to run.

    Args:
        arguments: The command, its flags and overrides.
        shares_files: Whether local paths mean the same there as here.

    Returns:
        0, or 2 where something is wrong; it is printed.
    """
    try:
        command, config, options = command_line.parse(arguments)
        if shares_files if is_local(config.workdir) else _answers(command, config):
            problems = _missing(command, config, options, shares_files)
            if problems:
                raise UserError(problems)
    except UserError as error:
        for message in error.messages:
            complain(message)
        return EXIT_USER_ERROR
    return 0


def _answers(command: str, config: Config) -> bool:
    """Returns whether buckets can be read from here; where it runs they may be nevertheless."""
    try:
        check_reachable(config.model_dump(mode="json"), COMMANDS[command].sections)
    except ConfigError as error:
        note(f"launch: the inputs of {command} are not checked here: {error.messages[0]}")
        return False
    return True


def _missing(command: str, config: Config, options: Options, shares_files: bool) -> list[str]:
    """Returns what the command reads and is not there, one line each.

    By role alone: which artifact it will be depends on the devices there (`compute_dtype=auto`).
    """
    record, found = RunRecord.read(config.workdir), dict[str, None]()
    if command in _FROM_TEXT:
        if shares_files and "tokens" not in record.roles:
            find_parts(config.corpus)  # It raises what is missing.
        return []
    for artifact in _inputs(command, Artifacts(config, Unread(config.workdir)), options):
        try:
            record.artifact(artifact.label, f"{command} needs {artifact.label}").load()
        except ArtifactError as error:
            way_out = f"; make it with the command `{artifact.command}`"
            known = artifact.label in record.roles
            found |= dict.fromkeys(f"{line}{'' if known else way_out}" for line in error.messages)
    return list(found)


def _inputs(command: str, run: Artifacts, options: Options) -> list[Artifact]:
    """Returns the artifacts that a command reads and does not make; none of studies."""
    module = importlib.import_module(f"mlpmem_jax.{COMMANDS[command].module}")
    if command == "generate":
        return [run.tokenizer, run.decoder if options.without_memory else run.trained]
    if not hasattr(module, "stages") or COMMANDS[command].module.startswith("studies."):
        return []
    stages = module.stages(run)
    made, inputs = {stage.artifact.relative for stage in stages}, list[Artifact]()
    for stage in stages:
        # Some ask for their inputs once those before are made.
        with contextlib.suppress(ArtifactError):
            inputs += [one for one in stage.origins() if one.relative not in made]
    return inputs


def environments_of(
    num_processes: int, devices_per_process: int | None, environment: Mapping[str, str]
) -> list[dict[str, str]]:
    """Returns the environment of each process, which may simulate several CPU devices."""
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
    parser.add_argument("--processes", type=_count, default=1)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--shares-files", action="store_true")
    parser.add_argument("--devices-per-process", type=_count)
    parser.add_argument("--logs")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    return parser


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be at least 1")
    return number
