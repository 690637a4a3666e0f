"""The corpus as one stream of pieces of documents, which can be continued from any of them."""

import dataclasses
import re
from collections.abc import Generator, Iterator, Mapping
from typing import Any, NamedTuple

from mlpmem_jax.config.data import CorpusConfig
from mlpmem_jax.corpus.documents import pieces_of
from mlpmem_jax.corpus.files import NotTextError, read_text
from mlpmem_jax.corpus.sources import Part, find_parts, listing_of
from mlpmem_jax.corpus.splits import hash_fraction, split_of
from mlpmem_jax.datastore.layout import Split

_DRAWN = "drawn"


@dataclasses.dataclass(frozen=True)
class Position:
    """How far the stream has been read.

    Attributes:
        part, file, item, piece: Where the next piece is; `piece` counts those of the item.
        split: Split of the document under way; None if its further pieces are left out.
        taken_bytes: Bytes so far, of each explicit split or of all that are drawn.
        skipped_files: Files that were no text.
    """

    part: int = 0
    file: int = 0
    item: int = 0
    piece: int = 0
    split: Split | None = None
    taken_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    skipped_files: int = 0

    def to_json(self) -> dict[str, Any]:
        """Returns JSON-ready values, the arguments of the constructor."""
        return dataclasses.asdict(self)


class Piece(NamedTuple):
    """A part of a document, most often all of it.

    Attributes:
        text: The text, never empty.
        num_bytes: Its length in UTF-8.
        begins: Whether a document begins with it.
        split: Its document's split.
        position: Where the stream continues after it.
    """

    text: str
    num_bytes: int
    begins: bool
    split: Split
    position: Position


class Corpus:
    """The text that a configuration names.

    Attributes:
        parts: Its sources and their files.
        position: Where the last iteration over `pieces` is.
    """

    def __init__(self, config: CorpusConfig):
        """Lists the files.

        Raises:
            UserError: Patterns that match nothing and the like, one line each.
        """
        self.config = config
        self.parts = find_parts(config)
        self.position = Position()
        regex = config.document_regex
        # MULTILINE, for `^` to match at the line that is looked at.
        self._pattern = None if regex is None else re.compile(regex, re.MULTILINE)

    def listing(self) -> dict[str, Any]:
        """Returns a digest, the number of files and their bytes (see `listing_of`)."""
        return listing_of(self.parts)

    def pieces(self, position: Position | None = None) -> Iterator[Piece]:
        """Yields the pieces of all documents in order.

        Args:
            position: Where to continue; the beginning by default.

        Raises:
            UserError: Text that cannot be used; file and place are named.
        """
        self.position = at = position or Position()
        full: set[str] = set()
        for number in range(at.part, len(self.parts)):
            part = self.parts[number]
            for file in range(at.file if number == at.part else 0, len(part.files)):
                if (part.split or _DRAWN) in full:
                    break
                begun = (number, file) == (at.part, at.file) and at.item + at.piece > 0
                if self.config.on_error == "skip" and not begun and not self._is_text(part, file):
                    skipped = self.position.skipped_files + 1
                    self.position = dataclasses.replace(self.position, skipped_files=skipped)
                elif (yield from self._file(number, file, at if begun else None)):
                    full.add(part.split or _DRAWN)
        self.position = Position(
            len(self.parts),
            taken_bytes=self.position.taken_bytes,
            skipped_files=self.position.skipped_files,
        )

    def _is_text(self, part: Part, file: int) -> bool:
        if part.source.source == "huggingface":
            return True
        try:
            # A whole pass before the first document: a file is taken as a whole or not.
            for _ in read_text(part.files[file]):
                pass
        except NotTextError:
            return False
        return True

    def _file(
        self, number: int, file: int, resumed: Position | None
    ) -> Generator[Piece, None, bool]:
        """Yields the pieces of a file; returns whether corpus.max_bytes is reached."""
        part = self.parts[number]
        first_item = resumed.item if resumed else 0
        split = resumed.split if resumed else None
        for item, (_, blocks) in enumerate(part.items(file, first_item), first_item):
            first_piece = resumed.piece if resumed and item == first_item else 0
            # With a limit a document waits until all of it is known to be within.
            waits = self.config.max_bytes is not None and not first_piece
            waiting: list[Piece] = []
            for piece, (begins, text) in enumerate(pieces_of(blocks, self._pattern), 1):
                if piece <= first_piece:
                    continue
                content = text.encode()
                if begins:
                    yield from self._taken(part, waiting)
                    waiting, waits = [], self.config.max_bytes is not None
                    split = self._choose(part, content)
                if split is None:
                    continue
                position = Position(number, file, item, piece, split)
                waiting.append(Piece(text, len(content), begins, split, position))
                if not waits:
                    yield from self._taken(part, waiting)
                    waiting = []
                elif sum(one.num_bytes for one in waiting) > self._room(part):
                    return True
            yield from self._taken(part, waiting)
        return False

    def _room(self, part: Part) -> int:
        """Returns how many bytes corpus.max_bytes still allows."""
        assert self.config.max_bytes is not None
        return self.config.max_bytes - self.position.taken_bytes.get(part.split or _DRAWN, 0)

    def _choose(self, part: Part, content: bytes) -> Split | None:
        """Returns the split of a document by its first piece, None if its source is thinned."""
        if part.source.weight < 1 and hash_fraction(content, "weight") >= part.source.weight:
            return None
        if part.split is not None:
            return part.split
        return split_of(content, self.config.valid_fraction, self.config.test_fraction)

    def _taken(self, part: Part, pieces: list[Piece]) -> Iterator[Piece]:
        group = part.split or _DRAWN
        for piece in pieces:
            taken = dict(self.position.taken_bytes)
            taken[group] = taken.get(group, 0) + piece.num_bytes
            self.position = dataclasses.replace(
                piece.position, taken_bytes=taken, skipped_files=self.position.skipped_files
            )
            yield piece._replace(position=self.position)
