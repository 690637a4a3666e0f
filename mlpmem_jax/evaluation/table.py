"""The results as text: aligned tables for the terminal, CSV, and one sentence.

Everything is made from the dictionaries of `results/*/evaluate.json` and `measured.json`,
so it can be made again without running anything.
"""

import csv
import io
import math
import re
import textwrap
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlpmem_jax.units import human_bytes

Results = Mapping[str, Any]

# Names of the CSV's columns, in order: each is a key of a system or of its cost.
COLUMNS = (
    "system",
    "test_nats",
    "difference_nats",
    "difference_low",
    "difference_high",
    "token_perplexity",
    "word_perplexity",
    "bits_per_byte",
    "gain_recovered",
    "gain_recovered_low",
    "gain_recovered_high",
    "valid_nats",
    "interpolation",
    "temperature",
    "parameters",
    "non_embedding_parameters",
    "parameter_bytes",
    "datastore_bytes",
    "stored_bytes",
    "ms_per_token",
)
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


def count_text(value: float | None) -> str:
    """Formats a large number with a unit of a thousand, million, …"""
    if value is None:
        return DASH
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return str(value) if isinstance(value, int) else f"{value:.3g}"


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


def flat_rows(results: Results, measured: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns one dictionary a system, with the keys of `COLUMNS`."""
    rows = []
    latency = measured.get("latency_ms", {})
    for key, system in results["systems"].items():
        row = {name: system.get(name) for name in COLUMNS}
        row["system"] = system["label"]
        row["ms_per_token"] = latency.get(key, {}).get("p50")
        rows.append(row)
    return rows


def as_csv(results: Results, measured: Mapping[str, Any]) -> str:
    """Returns the table as CSV, numbers in full."""
    return csv_text(COLUMNS, flat_rows(results, measured))


def as_text(results: Results, measured: Mapping[str, Any]) -> str:
    """Returns what is shown in the terminal: quality, cost, time, and the sentence."""
    rows = flat_rows(results, measured)
    level = f"{100 * results['confidence']:g} %"
    quality = [
        [
            row["system"],
            number(row["test_nats"], 3),
            number(row["difference_nats"], 3, sign=True),
            bracket_text(row["difference_low"], row["difference_high"], 3),
            number(row["token_perplexity"], 2),
            number(row["word_perplexity"], 1),
            number(row["bits_per_byte"], 4),
            share_text(row["gain_recovered"]),
            _share_interval(row),
        ]
        for row in rows
    ]
    cost = [
        [
            row["system"],
            number(row["valid_nats"], 3),
            number(row["interpolation"], 3),
            number(row["temperature"], 3),
            count_text(row["parameters"]),
            count_text(row["non_embedding_parameters"]),
            human_bytes(row["stored_bytes"]),
            number(row["ms_per_token"], 2),
        ]
        for row in rows
    ]
    test = results["test"]
    blocks = [
        test_line(test),
        render(
            [
                "",
                "nats per\ntoken",
                "against\ndecoder",
                level + "\ninterval",
                "token\nPPL",
                "word\nPPL",
                "bits per\nbyte",
                "kNN gain\nrecovered",
                level + "\ninterval",
            ],
            quality,
        ),
        render(
            [
                "",
                "valid\nnats",
                "weight\nλ",
                "temper-\nature τ",
                "para-\nmeters",
                "without\nembedding",
                "stored for\ninference",
                "ms per\ntoken",
            ],
            cost,
        ),
        *_remarks(results, measured),
        "",
        *paragraph(sentence(results)),
    ]
    return "\n".join(blocks)


def _share_interval(row: Mapping[str, Any]) -> str:
    """Returns the interval of a share; where it has none and should, a note says why."""
    bracket = bracket_text(row["gain_recovered_low"], row["gain_recovered_high"], 1, "%")
    wanted = row["gain_recovered"] not in (None, 1.0) and row["difference_low"] is not None
    return "undefined" if wanted and not bracket else bracket


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


def _remarks(results: Results, measured: Mapping[str, Any]) -> list[str]:
    lines = []
    retrieval = results["retrieval"]
    if retrieval.get("recall") is not None:
        lines.append(
            f"neighbours: {retrieval['engine']} engine, K = {retrieval['num_neighbors']}, "
            f"recall {retrieval['recall']:.4f}"
        )
    seconds = measured.get("seconds", {})
    if seconds:
        parts = [f"{name} {value:.0f} s" for name, value in seconds.items()]
        lines += _wrapped(f"time: {sum(seconds.values()):.0f} s = ", parts)
    return lines + note_lines(results["notes"])


def _wrapped(start: str, parts: Sequence[str], width: int = 100) -> list[str]:
    """Joins parts by plus signs, in lines of at most `width` columns."""
    lines = [start + parts[0]]
    for part in parts[1:]:
        if display_width(f"{lines[-1]} + {part}") <= width:
            lines[-1] += f" + {part}"
        else:
            lines.append(f"  + {part}")
    return lines


def paragraph(text: str, width: int = 100) -> list[str]:
    """Wraps a text, never inside of brackets."""
    joined = re.sub(r"\[[^]]*\]", lambda found: found[0].replace(" ", _JOIN), text)
    return [line.replace(_JOIN, " ") for line in textwrap.wrap(joined, width)]


def note_lines(notes: Iterable[str]) -> list[str]:
    """Returns notes as lines of a report."""
    return [
        line
        for note in notes
        for line in paragraph(note if note.startswith("warning: ") else f"note: {note}")
    ]


def sentence(results: Results) -> str:
    """Says in one sentence what came out."""
    memory = results["systems"]["memory"]
    low, high = memory["difference_low"], memory["difference_high"]
    gain = -memory["difference_nats"]
    level = f"{100 * results['confidence']:g} %"
    nothing = memory["interpolation"] == 0 and memory["difference_nats"] == 0
    if nothing and memory["interpolation_source"] == "validation":
        return "On validation the memory got no weight (λ = 0): on test it changes nothing."
    # Trained jointly, the memory has a decoder of its own beside it.
    decoder = "the decoder" + " before joint training" * ("joint_decoder" in results["systems"])
    better = f"better than {decoder} by {number(gain, 3)} nats per token"
    worse = f"worse than {decoder} by {number(-gain, 3)} nats per token"
    if low is None:
        verdict = f"is {better if gain >= 0 else worse} (no interval)"
    elif high < 0:
        verdict = f"is {better} ({level} interval {bracket_text(-high, -low, 3)})"
    elif low > 0:
        verdict = f"is {worse} ({level} interval {bracket_text(low, high, 3)})"
    else:
        verdict = (
            f"is not significantly different from {decoder} "
            f"({level} interval of the gain {bracket_text(-high, -low, 3)} nats per token)"
        )
    text = f"On test, decoder + memory {verdict}"
    share = memory["gain_recovered"]
    if share is None:
        return text + "; the kNN-LM gains nothing here, so there is nothing to recover."
    text += f" and recovers {share_text(share)} of what the explicit kNN-LM gains"
    bracket = bracket_text(memory["gain_recovered_low"], memory["gain_recovered_high"], 1, "%")
    return text + (f" {bracket}." if bracket else ".")
