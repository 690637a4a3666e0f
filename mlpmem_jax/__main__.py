"""`python -m mlpmem_jax COMMAND --config FILE [section.key=value …]`."""

if __name__ == "__main__":  # Before the imports below, which take a second.
    from mlpmem_jax.program import run

    run()

import argparse
import difflib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn, get_args

from mlpmem_jax import __version__
from mlpmem_jax.commands import COMMANDS, run_command
from mlpmem_jax.config.describe import describe
from mlpmem_jax.config.load import load_config
from mlpmem_jax.config.schema import Config
from mlpmem_jax.config.types import checked_path
from mlpmem_jax.config.yaml_text import short
from mlpmem_jax.console import complain, discard_output, say
from mlpmem_jax.errors import EXIT_INTERRUPTED, EXIT_USER_ERROR, PREEMPTED, UserError
from mlpmem_jax.failures import explain, user_error_in
from mlpmem_jax.parallel import multihost
from mlpmem_jax.parallel.preemption import Preempted
from mlpmem_jax.pipeline.options import Exported, Options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program's name; defaults to those of the process.

    Returns:
        The exit code: 0; 1 for a failed run, 2 for a user error, 3 for a compiled step that
        does not fit, 75 for a run that was saved and is to be started again, 130 after an
        interrupt.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _main(arguments)
    except KeyboardInterrupt:
        complain("interrupted; the same command continues where this one stopped")
        return multihost.leave(EXIT_INTERRUPTED)
    except Preempted as notice:
        complain(f"{notice}; the same command continues", kind="preempted")
        return multihost.leave_together(PREEMPTED)
    except BrokenPipeError:
        # The reader of our output left (`| head`): nothing to say, nobody to say it to.
        discard_output()
        return multihost.leave(1)
    except Exception as error:
        code = _explained(error)
        if code is None:
            multihost.leave_with_traceback()
            raise
        return multihost.leave(code)


def _explained(error: Exception) -> int | None:
    """Says what went wrong, if it is nothing that needs a traceback; returns the exit code."""
    mistake = user_error_in(error)
    if mistake is None:
        multihost.yield_to_first_error()
    if os.environ.get("MLPMEM_TRACEBACK") == "1":
        return None
    if mistake:
        for message in mistake.messages:
            complain(message)
        return mistake.exit_code
    reason = explain(error)
    if reason is None:
        return None
    complain(f"{reason} (MLPMEM_TRACEBACK=1 shows where)")
    return EXIT_USER_ERROR


def _main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        say(_overview())
        return 0 if arguments else EXIT_USER_ERROR
    if arguments[0] == "--version":
        say(f"mlpmem_jax {__version__}")
        return 0
    return run_command(*parse(arguments))


def parse(arguments: Sequence[str]) -> tuple[str, Config, Options]:
    """Reads a command line.

    Returns:
        The command's name, the validated configuration and the other flags.

    Raises:
        UserError: An error in any of them.
    """
    command, *rest = arguments
    if command not in COMMANDS:
        raise UserError(_unknown_command(command))
    flags = _parser(command).parse(rest)
    assigned: dict[str, Any] = {}
    if flags.workdir is not None:
        assigned["workdir"] = flags.workdir
    if getattr(flags, "prompt", None) is not None:
        assigned["generate.prompts"] = flags.prompt
    for name in ("topology", "step"):
        if getattr(flags, name, None) is not None:
            assigned[f"compile.{name}"] = getattr(flags, name)
    config = load_config(flags.config, flags.overrides, assigned)
    options = Options(
        workdir=config.workdir,
        dry_run=flags.dry_run,
        print_config=flags.print_config,
        rebuild=flags.rebuild,
        without_memory=getattr(flags, "without_memory", False),
        remove_unused=getattr(flags, "remove_unused", False),
        api_key_file=_path(flags, "api_key_file"),
        output=_path(flags, "output"),
        what=getattr(flags, "what", None),
        text=_paths(flags, "text"),
        held_out=_paths(flags, "held_out"),
        documents=_paths(flags, "documents"),
    )
    return command, config, options


def _path(flags: argparse.Namespace, name: str) -> str | None:
    path = getattr(flags, name, None)
    try:
        return None if path is None else checked_path(path)
    except ValueError as error:
        raise UserError(f"--{name.replace('_', '-')} {short(path)}: {error}") from None


def _paths(flags: argparse.Namespace, name: str) -> tuple[str, ...]:
    given = getattr(flags, name, None) or ()
    found = (_path(argparse.Namespace(**{name: one}), name) for one in given)
    return tuple(path for path in found if path is not None)


class _Parser(argparse.ArgumentParser):
    """A parser that takes values as typed, and whose errors are user errors like any other."""

    def __init__(self, **about: Any) -> None:
        super().__init__(**about)
        self._taking: set[str] = set()
        self._values: list[str] = []

    def add_value(self, group: argparse._ArgumentGroup, flag: str, **about: Any) -> None:
        """Declares a flag that takes a value."""
        self._taking.add(flag)
        group.add_argument(flag, type=lambda place: self._values[int(place)], **about)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Reads flags and overrides in any order.

        Argparse refuses values that begin with a dash, which texts and paths may, and loses
        `--`: it receives the places of values in their stead.
        """
        words, given = iter(arguments), []
        for word in words:
            if word == "--":
                given += [word, *words]
                break
            flag, equals, value = word.partition("=")
            if flag in self._taking:
                if not equals:
                    value = self._next_value(flag, words)
                word = f"{flag}={len(self._values)}"
                self._values.append(value)
            given.append(word)
        return self.parse_intermixed_args(given)

    def _next_value(self, flag: str, words: Iterator[str]) -> str:
        value = next(words, None)
        if value is None:
            self.error(f"argument {flag}: expected one argument")
        if value.partition("=")[0] in self._option_string_actions:
            self.error(
                f"argument {flag}: expected one argument before {value}; if that is the value, "
                f"write {flag}={value}"
            )
        return value

    def error(self, message: str) -> NoReturn:
        dashed = re.search(r"unrecognized arguments:.*?--([a-z_]+\.[\w.]+)(=\S*)?", message)
        if dashed:
            message += f"; write {dashed[1]}{dashed[2] or '=value'} without dashes"
        raise UserError(f"{message} (`{self.prog} --help` lists flags and keys)")


def _parser(command: str) -> _Parser:
    """Returns the parser of one command; its help lists the keys that the command reads."""
    entry = COMMANDS[command]
    parser = _Parser(
        prog=f"mlpmem {command}",
        usage=f"mlpmem {command} --config FILE [--workdir DIR] [flags] [section.key=value ...]",
        description=f"{command}: {entry.summary}.",
        epilog=f"keys, those of {command} first (null: not set):\n\n{describe(entry.sections)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
    )
    _add_own_flags(parser, command)
    shared = parser.add_argument_group("flags of every command")
    parser.add_value(
        shared, "--config", metavar="FILE", required=True, help="configuration, a YAML file"
    )
    parser.add_value(shared, "--workdir", metavar="DIR", help="run directory (sets workdir)")
    shared.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan, its cost and its time, then exit",
    )
    shared.add_argument(
        "--print-config",
        action="store_true",
        help="print the resolved configuration as YAML, then exit",
    )
    shared.add_argument(
        "--rebuild",
        action="store_true",
        help="rebuild the artifacts of this command; for run, search-quality and tables of several "
        "runs: stale artifacts (built from inputs that were rebuilt since), and the table",
    )
    shared.add_argument("-h", "--help", action="help", help="print this help, then exit")
    overrides = parser.add_argument_group("overrides")
    overrides.add_argument(
        "overrides",
        metavar="section.key=value",
        nargs="*",
        help="set a key; a text or path is taken as typed, any other value is YAML",
    )
    return parser


# Of the commands that change the training text.
_CHANGES = {
    "append": (
        (
            "--text",
            "FILE",
            "text to append (or JSONL records): a file or a pattern of files; may be repeated",
        ),
        (
            "--held-out",
            "FILE",
            "new text that is never trained on: `evaluate` scores it apart; may be repeated",
        ),
    ),
    "remove": (
        (
            "--documents",
            "ID|FILE",
            "a document to remove: its id (16 hexadecimal digits), or a file that holds the text "
            "of documents; may be repeated",
        ),
    ),
}


def _add_own_flags(parser: _Parser, command: str) -> None:
    if command not in ("generate", "serve", "compile", "export", "artifacts", *_CHANGES):
        return
    own = parser.add_argument_group(f"flags of {command}")
    if command in _CHANGES:
        for flag, value, text in _CHANGES[command]:
            parser.add_value(own, flag, metavar=value, action="append", help=text)
        return
    if command == "generate":
        parser.add_value(
            own,
            "--prompt",
            metavar="TEXT",
            action="append",
            help="text to continue; may be repeated (sets generate.prompts)",
        )
    if command in ("generate", "serve"):
        own.add_argument(
            "--without-memory",
            action="store_true",
            help="use the decoder alone, for comparison",
        )
    if command == "serve":
        parser.add_value(
            own,
            "--api-key-file",
            metavar="FILE",
            help="file with the key that requests must bring (else MLPMEM_API_KEY, if it is set)",
        )
    if command in ("generate", "serve"):
        return
    if command == "artifacts":
        own.add_argument(
            "--remove-unused",
            action="store_true",
            help="remove the artifacts that no work directory uses",
        )
        return
    if command == "export":
        parser.add_value(own, "--output", metavar="DIR", help="new directory to write")
        parser.add_value(
            own,
            "--what",
            metavar="WHAT",
            choices=get_args(Exported),
            help="decoder: alone, as a model of its family; model: decoder and memory, with a "
            "modelling file; memory: alone, in the official layout; default: model, or decoder "
            "where no memory is trained",
        )
        return
    parser.add_value(
        own,
        "--topology",
        metavar="NAME",
        help="local, or a TPU slice such as v5p:4x4x4 (sets compile.topology)",
    )
    parser.add_value(
        own,
        "--step",
        metavar="STEP",
        help="pretrain, train, embed or decode (sets compile.step)",
    )
    parser.add_value(own, "--output", metavar="FILE", help="also write the report to a JSON file")


def _overview() -> str:
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:<{width}}  {c.summary}" for name, c in COMMANDS.items())
    return (
        "usage: mlpmem COMMAND --config FILE [--workdir DIR] [--dry-run] [--rebuild] "
        "[section.key=value ...]\n"
        "       mlpmem COMMAND --help\n"
        "       mlpmem --version\n\n"
        "Trains a language model with an MLP Memory, from text to a table that compares it with "
        "the\ndecoder alone and the kNN-LM.\n\n"
        f"commands:\n{commands}\n\n"
        "`mlpmem COMMAND --help` lists the keys of a command, with types and defaults. To start:\n"
        "`mlpmem run --config configs/quickstart.yaml`."
    )


def _unknown_command(command: str) -> str:
    near = difflib.get_close_matches(command, COMMANDS, n=1)
    hint = f"did you mean {near[0]}?" if near else "commands: " + ", ".join(COMMANDS)
    return f"{command}: unknown command; {hint}"
