"""Documents in pieces of bounded size.

A document is a file, a JSONL record, or what lies between two lines at which
`corpus.document_regex` matches. It is handed on in pieces of at most `PIECE_CHARS`
characters, so that one document of any size needs little memory. Where pieces are cut
depends on the text alone, never on how it was read.
"""

import hashlib
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

PIECE_CHARS = 1 << 20
# A longer document is read ahead once more for its digest and size, instead of being held.
_HELD_PIECES = 8


class Document(NamedTuple):
    """A document whose end is known.

    Attributes:
        digest: 64 bits that identify its text.
        num_bytes: Its length in UTF-8.
        is_cut: Whether it begins at a line that the pattern matches.
        first: Its first piece.
        pieces: All of them; to be read before the next document is asked for.
    """

    digest: int
    num_bytes: int
    is_cut: bool
    first: str
    pieces: Iterator[str]


def documents_of(
    read: Callable[[], Iterable[str]], pattern: re.Pattern[str] | None
) -> Iterator[Document]:
    """Yields the documents of an item.

    Args:
        read: Returns the text, in parts of any size, from its beginning, each time it is called.
        pattern: See `pieces_of`.
    """
    source = _Ahead(pieces_of(read(), pattern))
    sums: Iterator[tuple[int, tuple[int, int]]] | None = None
    for number in itertools.count():
        if source.upcoming is None:
            return
        held = [source.pop()]
        held += itertools.islice(_rest(source), _HELD_PIECES - 1)
        if source.is_inside():
            sums = sums or enumerate(_all_sums(_Ahead(pieces_of(read(), pattern))))
            digest, num_bytes = next(found for place, found in sums if place == number)
        else:
            digest, num_bytes = _sums(held)
        end = held[0].find("\n") + 1 or len(held[0])
        is_cut = pattern is not None and _matches(pattern, held[0], 0, end)
        pieces = itertools.chain(held, _rest(source))
        yield Document(digest, num_bytes, is_cut, held[0], pieces)
        for _ in _rest(source):
            pass


class _Ahead:
    """Pieces, of which the upcoming one is known."""

    def __init__(self, pieces: Iterator[tuple[bool, str]]):
        self._pieces = pieces
        self.upcoming = next(pieces, None)

    def pop(self) -> str:
        """Returns the text of the upcoming piece."""
        assert self.upcoming is not None
        text, self.upcoming = self.upcoming[1], next(self._pieces, None)
        return text

    def is_inside(self) -> bool:
        """Returns whether the upcoming piece goes on with a document."""
        return self.upcoming is not None and not self.upcoming[0]


def _rest(source: _Ahead) -> Iterator[str]:
    """Yields the further pieces of the document that is under way."""
    while source.is_inside():
        yield source.pop()


def _all_sums(source: _Ahead) -> Iterator[tuple[int, int]]:
    while source.upcoming is not None:
        yield _sums(itertools.chain([source.pop()], _rest(source)))


def _sums(pieces: Iterable[str]) -> tuple[int, int]:
    """Returns digest and bytes of a document."""
    digest, num_bytes = hashlib.blake2b(digest_size=8), 0
    for piece in pieces:
        content = piece.encode()
        digest.update(content)
        num_bytes += len(content)
    return int.from_bytes(digest.digest(), "little"), num_bytes


def _matches(pattern: re.Pattern[str], text: str, start: int, stop: int) -> bool:
    """Returns whether a line matches, its newline included; a longer one than a piece by that."""
    if pattern.match(text, start, min(stop, start + PIECE_CHARS)):
        return True
    if not text.endswith(("\r\n", "\r"), start, stop) or stop - start > PIECE_CHARS:
        return False
    # To `$` and `\n` a line ends with LF alone; the text itself keeps its CR.
    line = text[start:stop].replace("\r\n", "\n").removesuffix("\r")
    return pattern.match(line) is not None


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
        begins = not in_line and _matches(pattern, held, 0, len(held))
        starts = [0] if begins else []
        yield from _cut_at(held, starts)


def _line_starts(text: str, pattern: re.Pattern[str], in_line: bool) -> tuple[int, list[int]]:
    """Finds the lines that begin documents among those that are complete.

    A line longer than a piece is judged by its first piece.

    Returns:
        How much of the text is decided, and the places where documents begin.
    """
    starts, line, returns = [], 0, "\r" in text
    while True:
        end = text.find("\n", line) + 1
        if not end:
            break
        limit = end if end - line <= PIECE_CHARS else line + PIECE_CHARS
        # Most lines match nothing and have no CR: no call for these.
        if not in_line and (
            pattern.match(text, line, limit) or (returns and _matches(pattern, text, line, end))
        ):
            starts.append(line)
        line, in_line = end, False
    if len(text) - line >= PIECE_CHARS:
        if not in_line and _matches(pattern, text, line, len(text)):
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
