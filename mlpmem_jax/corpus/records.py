"""JSONL: a record a line, whose text is in a field."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from mlpmem_jax.corpus.files import read_text
from mlpmem_jax.errors import UserError

# A number's value is not needed, and `int` refuses to read one of 5,000 digits.
_DECODER = json.JSONDecoder(parse_int=len)
# What an item is read with, as often as needed; or why it cannot be used.
Item = Callable[[], Iterable[str]] | UserError


class BadRecordError(UserError):
    """A record without usable text; `corpus.on_error=skip` leaves it out."""


def records_of(path: str, field: str, key: str, first: int) -> Iterator[Item]:
    """Yields the records of a file from number `first` on, one for each line.

    Args:
        field: The field that holds the text.
        key: The source's place in the configuration, for messages.
        first: The first record that is wanted, counted from 0.

    Raises:
        UserError: The file is no text or cannot be read.
    """
    for number, line in enumerate(_lines(read_text(path))):
        if number < first:
            continue
        yield _record(line, field, f"{path}, line {number + 1}", key)


def _record(line: str, field: str, label: str, key: str) -> Item:
    if not line.strip():
        return lambda: ()
    try:
        record = _DECODER.decode(line)
    except (ValueError, RecursionError) as error:
        return BadRecordError(_advice(f"{label}: no JSON ({error})"))
    if not isinstance(record, dict):
        kind = type(record).__name__
        return BadRecordError(_advice(f"{label}: a JSON {kind}, not an object with fields"))
    return field_of(record, field, label, key)


def field_of(record: Any, field: str, label: str, key: str) -> Item:
    """Returns the text in the field of a record or row.

    Args:
        record: A mapping.
        field: The field that holds the text.
        label: What the messages call the record.
        key: The source's place in the configuration, for messages.
    """
    if field not in record:
        names = ", ".join(map(repr, record))
        names = names if len(names) <= 100 else f"{names[:100]}…"
        return BadRecordError(_advice(f"{label}: no field {field!r} ({key}.field); it has {names}"))
    text = record[field]
    named = f"{label}: field {field!r}"
    if not isinstance(text, str):
        kind = type(text).__name__
        return BadRecordError(_advice(f"{named} ({key}.field) holds {kind}, not a string"))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return BadRecordError(_advice(f"{named} is no valid Unicode ({error.reason})"))
    return lambda: (text,)


def _advice(problem: str) -> str:
    return f"{problem}; mend it, or skip such records with corpus.on_error=skip"


def _lines(blocks: Iterable[str]) -> Iterator[str]:
    held: list[str] = []
    for block in blocks:
        first, *others = block.split("\n")
        held.append(first)
        for line in others:
            yield "".join(held)
            held = [line]
    if any(held):
        yield "".join(held)
