"""The corpus as one stream of pieces of documents, which can be continued from any of them."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, NamedTuple

from mlpmem_jax.config.data import CorpusConfig
from mlpmem_jax.corpus.documents import Document, documents_of
from mlpmem_jax.corpus.duplicates import SeenDocuments
from mlpmem_jax.corpus.files import NotTextError, read_text
from mlpmem_jax.corpus.near_duplicates import NearDuplicate, Sketches, import_datasketch
from mlpmem_jax.corpus.sources import Part, find_parts
from mlpmem_jax.corpus.splits import hash_fraction, split_of
from mlpmem_jax.errors import UserError
from mlpmem_jax.store.array_specs import SPLITS, Split

# What may be left out, as manifests count it. Copies are duplicates of another split's document.
LEFT_OUT = (
    "skipped_files",
    "skipped_records",
    "duplicate_documents",
    "duplicate_bytes",
    "copied_documents",
)
# Further ones with corpus.near_duplicates; copies resemble a document of another split.
NEAR_LEFT_OUT = (
    *(f"{split}_near_duplicate_{what}" for split in SPLITS for what in ("documents", "bytes")),
    "near_copied_documents",
)
_DRAWN = "drawn"
Seen = Mapping[Split, SeenDocuments]


@dataclasses.dataclass(frozen=True)
class Position:
    """How far the stream has been read.

    Attributes:
        part, file, item, piece: Where the next piece is; `piece` counts those of the item.
        split: Split of the document under way.
        taken_bytes: Bytes so far, of each explicit split or of all that are drawn.
        left_out: What was left out so far, by the names of `LEFT_OUT`.
        cut: Documents so far that begin where corpus.document_regex matches, by key of the source.
        near_duplicates: Near-duplicates so far, each counted once.
    """

    part: int = 0
    file: int = 0
    item: int = 0
    piece: int = 0
    split: Split | None = None
    taken_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    left_out: Mapping[str, int] = dataclasses.field(default_factory=dict)
    cut: Mapping[str, int] = dataclasses.field(default_factory=dict)
    near_duplicates: int = 0

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
        digest: 64 bits that identify the text of its document.
    """

    text: str
    num_bytes: int
    begins: bool
    split: Split
    position: Position
    digest: int


class Corpus:
    """The text that a configuration names.

    Attributes:
        parts: Its sources and their files.
        position: Where the last iteration over `pieces` is.
        near_duplicates: Documents to leave out, by digest; `find_near_duplicates` finds them.
        first_skipped: What was wrong with the first file or record that it left out.
        stopped_at: Bytes of the document before which corpus.max_bytes stopped it, of each explicit
            split or of all that are drawn.
    """

    def __init__(self, config: CorpusConfig):
        """Lists the files.

        Raises:
            UserError: Patterns that match nothing and the like, one line each; a missing package.
        """
        if config.near_duplicates is not None:
            import_datasketch(config.near_duplicates)
        self.config = config
        self.parts = find_parts(config)
        self.position = Position()
        self._taken_bytes: Counter[str] = Counter()
        self._left_out: Counter[str] = Counter()
        self._cut: Counter[str] = Counter()
        self._num_near = 0
        self.near_duplicates: Mapping[int, NearDuplicate] | None = None
        self.first_skipped: str | None = None
        self.stopped_at: dict[str, int] = {}
        regex = config.document_regex
        # MULTILINE, for `^` to match at the line that is looked at.
        self._pattern = None if regex is None else re.compile(regex, re.MULTILINE)

    def find_near_duplicates(self, on_progress: Callable[[int], object]) -> None:
        """Reads all documents once for `near_duplicates`, if these are to be left out.

        Args:
            on_progress: Called with the number of bytes of each piece.
        """
        threshold = self.config.near_duplicates
        if threshold is None or self.near_duplicates is not None:
            return
        sketches = Sketches(threshold)
        for piece in self.pieces():
            if piece.begins:
                sketches.begin(piece.split, piece.digest)
            sketches.add(piece.text)
            on_progress(piece.num_bytes)
        self.near_duplicates = sketches.near_duplicates()

    def pieces(self, position: Position | None = None, seen: Seen | None = None) -> Iterator[Piece]:
        """Yields the pieces of all documents in order; of equal documents the first alone.

        Args:
            position: Where to continue; the beginning by default.
            seen: The documents before it, by split; gets those that follow.

        Raises:
            UserError: Text that cannot be used; file and place are named.
            TryAgain: A connection broke.
        """
        self.position = at = position or Position()
        self._taken_bytes = Counter(at.taken_bytes)
        self._left_out, self._cut = Counter(at.left_out), Counter(at.cut)
        self._num_near = at.near_duplicates
        seen = nothing_seen() if seen is None else seen
        full: set[str] = set()
        for number in range(at.part, len(self.parts)):
            part = self.parts[number]
            for file in range(at.file if number == at.part else 0, len(part.files)):
                if (part.split or _DRAWN) in full:
                    break
                begun = (number, file) == (at.part, at.file) and at.item + at.piece > 0
                if not begun and not self._is_usable(part, file):
                    continue
                if (yield from self._file(number, file, at if begun else None, seen)):
                    full.add(part.split or _DRAWN)
        self.position = self._at(len(self.parts))

    def _is_usable(self, part: Part, file: int) -> bool:
        """Returns whether a file is to be read; one that is skipped is counted."""
        if self.config.on_error == "error" or part.is_dataset:
            return True
        try:
            # A whole pass before the first document: a file is taken as a whole or not.
            for _ in read_text(part.files[file]):
                pass
        except NotTextError as error:
            self._skip(error, "skipped_files")
            return False
        return True

    def _skip(self, error: UserError, kind: str) -> None:
        self.first_skipped = self.first_skipped or error.messages[0]
        self._left_out[kind] += 1

    def _at(
        self, part: int, file: int = 0, item: int = 0, piece: int = 0, split: Split | None = None
    ) -> Position:
        taken, left_out, cut = map(dict, (self._taken_bytes, self._left_out, self._cut))
        return Position(part, file, item, piece, split, taken, left_out, cut, self._num_near)

    def _file(
        self, number: int, file: int, resumed: Position | None, seen: Seen
    ) -> Generator[Piece, None, bool]:
        """Yields the pieces of a file; returns whether corpus.max_bytes is reached."""
        part = self.parts[number]
        first_item = resumed.item if resumed else 0
        for item, read in enumerate(part.items(file, first_item), first_item):
            if isinstance(read, UserError):
                if self.config.on_error == "error":
                    raise read
                self._skip(read, "skipped_records")
                continue
            done = resumed.piece if resumed and item == first_item else 0
            piece = 0
            for document in documents_of(read, self._pattern):
                split = resumed.split if resumed and piece < done else None
                if piece >= done:
                    split = self._choose(part, document, seen)
                    if split is not None and document.num_bytes > self._room(part):
                        self.stopped_at[part.split or _DRAWN] = document.num_bytes
                        return True
                    self._cut[part.key] += document.is_cut
                    if split is not None:
                        seen[split].add(document.digest)
                for order, text in enumerate(document.pieces):
                    piece += 1
                    if piece <= done or split is None:
                        continue
                    num_bytes = len(text.encode())
                    self._taken_bytes[part.split or _DRAWN] += num_bytes
                    self.position = self._at(number, file, item, piece, split)
                    yield Piece(text, num_bytes, order == 0, split, self.position, document.digest)
        return False

    def _room(self, part: Part) -> float:
        """Returns how many bytes corpus.max_bytes still allows."""
        limit = self.config.max_bytes
        return float("inf") if limit is None else limit - self._taken_bytes[part.split or _DRAWN]

    def _choose(self, part: Part, document: Document, seen: Seen) -> Split | None:
        """Returns the split of a document; None where it is left out.

        Splits and shares are drawn from the first piece. A document that was read is left out.
        """
        content = document.first.encode()
        if part.source.weight < 1 and hash_fraction(content, "weight") >= part.source.weight:
            return None
        split = part.split or split_of(
            content, self.config.valid_fraction, self.config.test_fraction
        )
        owner = next((one for one in SPLITS if document.digest in seen[one]), None)
        near = (self.near_duplicates or {}).get(document.digest)
        if owner is None and near is not None:
            if near.number >= self._num_near:
                self._leave_out(part, document, near)
                return None
            owner = near.split  # It is a copy of one that was left out before.
        if owner is None:
            return split
        self._left_out["duplicate_documents"] += 1
        self._left_out["duplicate_bytes"] += document.num_bytes
        if owner != split:
            self._left_out["copied_documents"] += 1
        return None

    def _leave_out(self, part: Part, document: Document, near: NearDuplicate) -> None:
        """Counts a near-duplicate; corpus.max_bytes counts it as well.

        That limit must fall on the same document with near-duplicates known and unknown.
        """
        self._num_near = near.number + 1
        self._taken_bytes[part.split or _DRAWN] += document.num_bytes
        self._left_out[f"{near.split}_near_duplicate_documents"] += 1
        self._left_out[f"{near.split}_near_duplicate_bytes"] += document.num_bytes
        self._left_out["near_copied_documents"] += near.split != near.kept_split

    def notes(self) -> list[str]:
        """Returns what a user should know of the text that `pieces` has gone through."""
        notes = []
        others = sum(part.num_other_names for part in self.parts)
        if others:
            notes.append(f"corpus: {others:,} further names of files left out: each is read once")
        if self.first_skipped:
            notes.append(f"corpus.on_error=skip: the first that is left out: {self.first_skipped}")
        for part in self.parts if self._pattern else ():
            if self.position.cut.get(part.key) == 0:  # Absent where nothing of it was read.
                notes.append(
                    f"corpus.document_regex={self.config.document_regex!r} matches no line of "
                    f"{part.key} ({len(part.files):,} files): documents are whole files or records"
                )
        return notes


def nothing_seen() -> dict[Split, SeenDocuments]:
    """Returns what has been read before the first document."""
    return {split: SeenDocuments() for split in SPLITS}
