"""The schema in words: what `COMMAND --help` lists, and docs/configuration.md.

`python -m mlpmem_jax.config.describe` prints the reference in Markdown.
"""

import shutil
import textwrap
from collections.abc import Iterator, Sequence

from mlpmem_jax.config.base import Section
from mlpmem_jax.config.keys import INDEX, Key, all_keys, type_text
from mlpmem_jax.config.schema import Config
from mlpmem_jax.config.yaml_text import short

_INTRODUCTION = """\
# Configuration

A run is configured by one YAML file and by overrides on the command line:

    bash launch/run.sh run --config configs/quickstart.yaml --workdir runs/deep decoder.num_layers=8

What neither sets keeps its default; a file that sets nothing is refused. A key inside a list's
entry is named by the entry's number (`corpus.more.0.weight=0.5`); in a file, keys are nested and
not dotted. Every mistake is reported at once, before anything is read or written.

The value of an override is YAML, except where a key takes `text` or a `path`: these are taken as
typed, with `#`, `:`, quotes and blanks. Two things are read as YAML there too: `null`, where the
type allows it, and a value that is one quoted text (`corpus.dataset='"null"'` is the text null).
A list of texts is YAML (`corpus.paths='["a.txt", "b #1.txt"]'`), its entries are text
(`corpus.paths.1='b #1.txt'`). `~` and `~user` at the beginning of a path are home directories.

Keys marked † change how a stage runs and never what it makes: to change them does not make an
artifact stale.

A `layer` is a block of the decoder: a whole number counts from 1, a decimal is a share of the
depth: `1` is the first block, `1.0` the last.

This page is generated from the schema: `.venv/bin/python -m mlpmem_jax.config.describe`.
"""


def default_text(key: Key) -> str:
    """Returns a key's default as it would be written in an override."""
    if isinstance(key.default, tuple):
        return short(
            [item.model_dump() if isinstance(item, Section) else item for item in key.default]
        )
    return '""' if key.default == "" else short(key.default)


def select(patterns: Sequence[str]) -> list[Key]:
    """Returns the keys that sections (`decoder`) or single keys (`corpus.attention`) name."""
    chosen = [
        key
        for key in all_keys().values()
        if any(key.path == p or key.path.startswith(f"{p}.") for p in patterns)
    ]
    assert all(any(f"{k.path}.".startswith(f"{p}.") for k in chosen) for p in patterns), patterns
    return chosen


def describe(patterns: Sequence[str], width: int | None = None) -> str:
    """Lists keys for a terminal: path, type, default and meaning, section by section.

    Args:
        patterns: Sections or dotted keys.
        width: Columns; the terminal's where not given.
    """
    width = width or shutil.get_terminal_size((100, 24)).columns
    keys = select(patterns)
    lines = []
    for section, members in _by_section(keys):
        title = Config.model_fields[section].description if section else "Of the whole run."
        lines += ["", f"{section or 'run'}: {_first_line(title)}"]
        name_width = min(40, max(len(key.path) for key in members))
        for key in members:
            left = f"  {key.path:<{name_width}}"
            facts = f"{type_text(key.alternatives)}, default {default_text(key)}"
            lines.append(f"{left}  {facts}")
            lines += textwrap.wrap(
                key.description,
                max(40, width),
                initial_indent=" " * (name_width + 4),
                subsequent_indent=" " * (name_width + 4),
            )
    return "\n".join(lines).lstrip("\n")


def markdown() -> str:
    """Returns docs/configuration.md."""
    parts = [_INTRODUCTION]
    for section, members in _by_section(list(all_keys().values())):
        title = Config.model_fields[section].description if section else "Of the whole run."
        parts.append(f"## {section or 'Run'}\n\n{_first_line(title)}\n")
        rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key in members:
            mark = " †" if key.runtime else ""
            cells = (
                f"`{key.path}`{mark}",
                f"`{type_text(key.alternatives)}`",
                f"`{default_text(key)}`",
                key.description,
            )
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join(rows) + "\n")
    parts.append(f"`{INDEX}` stands for the number of a list's entry, counted from 0.\n")
    return "\n".join(parts)


def _by_section(keys: Sequence[Key]) -> Iterator[tuple[str, list[Key]]]:
    groups: dict[str, list[Key]] = {}
    for key in keys:
        groups.setdefault(key.path.split(".")[0] if "." in key.path else "", []).append(key)
    yield from groups.items()


def _first_line(text: str | None) -> str:
    return (text or "").strip().splitlines()[0] if text else ""


if __name__ == "__main__":
    print(markdown(), end="")
