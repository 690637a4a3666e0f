"""docs/commands.md, from the parsers that answer `COMMAND --help`.

`python -m mlpmem_jax.command_reference` prints it.
"""

import argparse
from collections.abc import Iterator, Mapping

from mlpmem_jax.__main__ import _parser
from mlpmem_jax.commands import COMMANDS, Command
from mlpmem_jax.config.describe import select

_INTRODUCTION = """\
# Commands

    bash launch/run.sh COMMAND --config FILE [--workdir DIR] [flags] [section.key=value ...]
    .venv/bin/python -m mlpmem_jax COMMAND --config FILE ...

Both are the same; the first creates the environment. `COMMAND --help` prints what this page shows,
with the type, default and meaning of each key. [Running](running.md) explains overrides, dry runs,
rebuilding and exit codes.

This page is generated from the parsers of the commands:
`.venv/bin/python -m mlpmem_jax.command_reference`.
"""


def markdown() -> str:
    """Returns docs/commands.md."""
    flags = {name: dict(_flags(_parser(name))) for name in COMMANDS}
    shared = set.intersection(*(set(own.items()) for own in flags.values()))
    common = {flag: text for flag, text in flags["run"].items() if (flag, text) in shared}
    parts = [_INTRODUCTION, _table("command", dict(_summaries()))]
    parts.append("Flags of every command:\n")
    parts.append(_table("flag", common))
    for name, command in COMMANDS.items():
        own = {flag: text for flag, text in flags[name].items() if flag not in common}
        parts.append(f"## {name}\n\n{_sentence(command.summary)}\n")
        if own:
            parts.append(_table("flag", own))
        parts.append(f"Reads {_keys(command)}.\n")
        if command.alone:
            parts.append("Runs in one process, without `--processes`.\n")
    return "\n".join(parts)


def _summaries() -> Iterator[tuple[str, str]]:
    for name, command in COMMANDS.items():
        yield f"[`{name}`](#{name})", command.summary


def _flags(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """Yields each flag with its value, and its help; `--help` and overrides are left out."""
    for action in parser._actions:
        if not action.option_strings or action.dest == "help":
            continue
        value = f" {action.metavar}" if action.nargs != 0 else ""
        required = "; required" if action.required else ""
        yield f"`{action.option_strings[-1]}{value}`", f"{action.help}{required}"


def _keys(command: Command) -> str:
    """Returns the sections and single keys that a command reads, sections as links."""
    sections = {key.path.split(".")[0] for key in select(command.sections) if "." in key.path}
    return ", ".join(
        f"[`{name}`](configuration.md#{name})" if name in sections else f"`{name}`"
        for name in command.sections
    )


def _table(head: str, rows: Mapping[str, str]) -> str:
    lines = [f"| {head} | |", "|---|---|"]
    lines += [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows.items()
    ]
    return "\n".join(lines) + "\n"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


if __name__ == "__main__":
    print(markdown(), end="")
