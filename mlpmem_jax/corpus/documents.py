"""Documents in pieces of bounded size.

A document is a file, a JSONL record, or what lies between two lines at which
`corpus.document_regex` matches. It is handed on in pieces of at most `PIECE_CHARS`
characters, so that one document of any size needs little memory. Where pieces are cut
depends on the text alone, never on how it was read.
"""

import itertools
import re
from collections.abc import Iterable, Iterator

PIECE_CHARS = 1 << 20


def pieces_of(blocks: Iterable[str], pattern: re.Pattern[str] | None) -> Iterator[tuple[bool, str]]:
    """Cuts a stream of text into documents and those into pieces.

    Args:
        blocks: The text, in parts of any size.
        pattern: A document begins at a line at whose start this matches; it sees that line
            alone, its newline included. None: the stream is one document.

    Yields:
        Whether the piece begins a document, and the piece, never empty.
    """
    begins, held = True, ""
    for starts_document, text in _segments(blocks, pattern):
        if starts_document and held:
            yield begins, held
            begins, held = True, ""
        held += text
        while len(held) > PIECE_CHARS:
            cut = _last_cut(held)
            yield begins, held[:cut]
            begins, held = False, held[cut:]
    if held:
        yield begins, held


def _last_cut(text: str) -> int:
    """Returns where to cut the first piece off a text longer than a piece.

    After the last newline that is followed by a visible character, where every
    tokenizer of words cuts too; else between words; else anywhere.
    """
    newline = text.rfind("\n", 0, PIECE_CHARS)
    while newline > 0:
        if not text[newline + 1].isspace():
            return newline + 1
        newline = text.rfind("\n", 0, newline)
    space = text.rfind(" ", 1, PIECE_CHARS)
    return space if space > 0 else PIECE_CHARS


def _segments(blocks: Iterable[str], pattern: re.Pattern[str] | None) -> Iterator[tuple[bool, str]]:
    """Yields parts of bounded size, and whether a document begins with each."""
    bounded = (
        block[start : start + PIECE_CHARS]
        for block in blocks
        for start in range(0, len(block), PIECE_CHARS)
    )
    if pattern is None:
        for number, text in enumerate(bounded):
            yield number == 0, text
        return
    held, in_line = "", False
    for block in bounded:
        text = held + block
        done, starts = _line_starts(text, pattern, in_line)
        yield from _cut_at(text[:done], starts)
        held, in_line = text[done:], (in_line if done == 0 else text[done - 1] != "\n")
    if held:
        starts = [0] if not in_line and pattern.match(held) else []
        yield from _cut_at(held, starts)


def _line_starts(text: str, pattern: re.Pattern[str], in_line: bool) -> tuple[int, list[int]]:
    """Finds the lines that begin documents among those that are complete.

    A line longer than a piece is judged by its first piece.

    Returns:
        How much of the text is decided, and the places where documents begin.
    """
    starts, line = [], 0
    while True:
        end = text.find("\n", line) + 1
        if not end:
            break
        limit = end if end - line <= PIECE_CHARS else line + PIECE_CHARS
        if not in_line and pattern.match(text, line, limit):
            starts.append(line)
        line, in_line = end, False
    if len(text) - line >= PIECE_CHARS:
        if not in_line and pattern.match(text, line, line + PIECE_CHARS):
            starts.append(line)
        line = len(text)
    elif in_line:
        line = len(text)
    return line, starts


def _cut_at(text: str, starts: list[int]) -> Iterator[tuple[bool, str]]:
    bounds = [0, *(start for start in starts if start), len(text)]
    marks = set(starts)
    for begin, end in itertools.pairwise(bounds):
        if end > begin:
            yield begin in marks, text[begin:end]
