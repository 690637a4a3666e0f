"""Cells of terminal tables, and long tables as CSV. The commands' tables share it."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlpmem_jax.evaluation.table import number


def bracket(low: float | None, high: float | None, digits: int) -> str:
    """Returns an interval, empty where there is none."""
    if low is None or high is None:
        return ""
    return f"[{number(low, digits)}, {number(high, digits)}]"


def percent(share: float | None, digits: int = 1) -> str:
    """Returns a share as a percentage."""
    return number(None if share is None else 100 * share, digits) + ("" if share is None else " %")


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """Returns rows as CSV, numbers in full; a key that a row lacks stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
