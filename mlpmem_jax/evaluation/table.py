"""How reports are written: aligned tables for the terminal, numbers, notes, CSV."""

import csv
import io
import math
import re
import textwrap
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlpmem_jax.units import short_number

DASH = "–"
_JOIN = "\x1f"  # stands for a space that may not be broken


def display_width(text: str) -> int:
    """Returns the columns that a text takes in a terminal."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(bool(unicodedata.combining(c)) for c in text)


def render(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Draws a table: the first column to the left, the others to the right.

    Args:
        header: Titles; a line break makes a second line.
        rows: Cells, as many in each row as there are titles.
    """
    titles = [title.split("\n") for title in header]
    height = max(map(len, titles))
    heads = [[title[i] if i < len(title) else "" for title in titles] for i in range(height)]
    widths = [
        max(display_width(row[i]) for row in [*heads, *rows]) for i in range(len(header))
    ]  # fmt: skip

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell + " " * (width - display_width(cell))
            if i == 0
            else " " * (width - display_width(cell)) + cell
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "│ " + "  ".join(padded) + " │"

    inner = sum(widths) + 2 * (len(widths) - 1) + 2
    return "\n".join(
        [
            "┌" + "─" * inner + "┐",
            *map(line, heads),
            "├" + "─" * inner + "┤",
            *map(line, rows),
            "└" + "─" * inner + "┘",
        ]
    )


def number(value: float | None, digits: int, *, sign: bool = False) -> str:
    """Formats a number with a true minus sign, or a dash where there is none."""
    if value is None or math.isnan(value):
        return DASH
    if abs(value) >= 10**5:
        return f"{value:.1e}"
    value = round(value, digits) + 0.0  # No minus before a zero.
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    return text.replace("-", "−")


def bracket_text(low: float | None, high: float | None, digits: int, unit: str = "") -> str:
    """Formats an interval; with the unit % its ends are shares."""
    if low is None or high is None:
        return ""
    scale = 100.0 if unit else 1.0
    return f"[{number(low * scale, digits)}, {number(high * scale, digits)}]"


def level_text(results: Mapping[str, Any]) -> str:
    """Returns the level of a report's intervals."""
    return f"{100 * results['confidence']:g} %"


def count_text(value: float | None) -> str:
    """Formats a large number with a unit of a thousand, million, …"""
    return DASH if value is None else short_number(value, form=".2f")


def share_text(value: float | None, digits: int = 1) -> str:
    """Formats a share in per cent."""
    return DASH if value is None else f"{number(100 * value, digits)} %"


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Returns rows as CSV, numbers in full; a key that a row lacks stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def test_line(test: Mapping[str, Any]) -> str:
    """Returns what the test split holds."""
    return f"{tokens_text(test)} ({test['words']:,} words, {test['bytes']:,} bytes)"


def tokens_text(test: Mapping[str, Any]) -> str:
    """Returns tokens, documents, and files where several documents share them."""
    files = f" from {test['files']:,} files" if cluster_word(test) == "file" else ""
    return f"test: {test['tokens']:,} tokens in {test['documents']:,} documents{files}"


def cluster_word(test: Mapping[str, Any]) -> str:
    """Returns what intervals are drawn over: documents, or files where documents share them."""
    return "file" if test["files"] < test["documents"] else "document"


def paragraph(text: str) -> list[str]:
    """Wraps a text, never inside of brackets."""
    joined = re.sub(r"\[[^]]*\]", lambda found: found[0].replace(" ", _JOIN), text)
    return [line.replace(_JOIN, " ") for line in textwrap.wrap(joined, 100)]


def note_lines(notes: Iterable[str]) -> list[str]:
    """Returns notes as lines of a report."""
    return [
        line
        for note in notes
        for line in paragraph(note if note.startswith("warning: ") else f"note: {note}")
    ]
