"""The schema in words: what `COMMAND --help` lists, and docs/configuration.md.

`python -m mlpmem_jax.config.describe` prints the reference in Markdown.
"""

import shutil
import textwrap
from collections.abc import Iterator, Sequence

from mlpmem_jax.config.keys import INDEX, Key, all_keys, type_text
from mlpmem_jax.config.schema import Config
from mlpmem_jax.config.yaml_text import short

_INTRODUCTION = """\
# Configuration

A run is configured by one YAML file and by overrides on the command line:

    bash launch/run.sh run --config configs/quickstart.yaml --workdir runs/deep decoder.num_layers=8

A key that neither of them sets keeps its default; a file that sets no key is an error. Keys are
nested in a file and dotted in an override, where an entry of a list goes by its number
(`corpus.more.0.weight=0.5`). All configuration errors are reported at once, before anything is read
or written.

The value of an override is YAML, except for keys of type `text` or `path`: their values are taken
as typed, with `#`, `:`, quotes and blanks. Two values of such a key are YAML too: `null`, where the
type allows it (the key is then not set), and a value that is one quoted text
(`corpus.dataset='"null"'` is the text null). A list of texts is YAML
(`corpus.paths='["a.txt", "b #1.txt"]'`), its entries are text (`corpus.paths.1='b #1.txt'`). `~`
and `~user` at the beginning of a path are home directories.

Keys marked † change how a stage runs and have no effect on its result: artifacts built with other
values of them are reused.

A `layer` is a block of the decoder. A whole number counts from 1, a decimal is a share of the
depth: `1` is the first block, `1.0` the last.

This page is generated from the schema: `.venv/bin/python -m mlpmem_jax.config.describe`.
"""


def select(patterns: Sequence[str]) -> list[Key]:
    """Returns the keys that sections (`decoder`) or single keys (`corpus.attention`) name.

    They come in the order of the patterns, within a section in the order of declaration.
    """
    chosen: dict[str, Key] = {}
    for pattern in patterns:
        found = {p: k for p, k in all_keys().items() if f"{p}.".startswith(f"{pattern}.")}
        assert found, pattern
        chosen |= found
    return list(chosen.values())


def describe(patterns: Sequence[str], width: int | None = None) -> str:
    """Lists keys for a terminal: path, type, default and meaning, section by section.

    Args:
        patterns: Sections or dotted keys.
        width: Columns; the terminal's where not given.
    """
    columns = max(60, width or shutil.get_terminal_size((100, 24)).columns)

    def wrap(text: str, first: str = "", rest: str = "") -> list[str]:
        return textwrap.wrap(text, columns, initial_indent=first, subsequent_indent=rest)

    lines = []
    for section, members in _by_section(select(patterns)):
        lines += ["", *wrap(f"{section or 'run'}: {_title(section)}")]
        longest = min(40, max(len(key.path) for key in members))
        indent = " " * (longest + 4)
        for key in members:
            facts = f"{type_text(key.schema)}, default {short(key.default)}"
            lines += wrap(f"{key.path:<{longest}}  {facts}", "  ", indent)
            lines += wrap(key.description, indent, indent)
    return "\n".join(lines).lstrip("\n")


def markdown() -> str:
    """Returns docs/configuration.md."""
    parts = [_INTRODUCTION]
    for section, members in _by_section(list(all_keys().values())):
        parts.append(f"## {section or 'Run'}\n\n{_title(section)}\n")
        rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
        for key in members:
            path, types = f"`{key.path}`{' †' * key.runtime}", f"`{type_text(key.schema)}`"
            cells = (path, types, f"`{short(key.default)}`", key.description)
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parts.append("\n".join(rows) + "\n")
    parts.append(f"`{INDEX}` stands for the number of a list's entry, counted from 0.\n")
    return "\n".join(parts)


def _by_section(keys: Sequence[Key]) -> Iterator[tuple[str, list[Key]]]:
    groups: dict[str, list[Key]] = {}
    for key in keys:
        groups.setdefault(key.path.split(".")[0] if "." in key.path else "", []).append(key)
    yield from groups.items()


def _title(section: str) -> str:
    return Config.model_fields[section].description or "" if section else "The whole run."


if __name__ == "__main__":
    print(markdown(), end="")
