"""Writes the token stream of each split, in whole shards, so that a kill costs seconds."""

import io
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from mlpmem_jax.corpus.duplicates import SeenDocuments
from mlpmem_jax.corpus.encoding import encoded
from mlpmem_jax.corpus.stream import LEFT_OUT, NEAR_LEFT_OUT, Corpus, Piece, Position, Seen
from mlpmem_jax.corpus.tokenizer import TextTokenizer
from mlpmem_jax.corpus.tokens import tokens_arrays
from mlpmem_jax.errors import ArtifactError, UserError
from mlpmem_jax.parallel.agreement import array_of_first, of_first
from mlpmem_jax.store.appender import Appender
from mlpmem_jax.store.array_specs import SPLITS, Split
from mlpmem_jax.store.arrays import open_array, read_rows
from mlpmem_jax.store.files import write_bytes

PROGRESS_FILE = "progress.npz"
# Text that is encoded at once; encodings take some 60 times its size in memory.
_BATCH_BYTES_PER_CORE = 1 << 20
_MAX_BATCH_BYTES = 16 << 20
_SAVE_SECS = 2.0
_CHECKSUM_BYTES = 4  # at the end of the progress file


class SplitWriter:
    """The arrays of one split: tokens, and of documents offset, bytes, words, file and digest."""

    def __init__(
        self,
        path: epath.Path,
        tokenizer: TextTokenizer,
        state: Mapping[str, np.ndarray] | None,
    ):
        specs = tokens_arrays(tokenizer.vocab_size)
        self._tokenizer = tokenizer
        self._separator = np.full(1, tokenizer.separator_id, np.uint32)
        self._arrays = {
            name: Appender(
                path / name,
                spec.dtype,
                spec.shard_rows,
                spec.chunk_rows,
                state=None
                if state is None
                else {key: state[f"{name}.{key}"] for key in ("rows", "remainder", "digests")},
            )
            for name, spec in specs.items()
        }
        self._path = path
        # The document under way: bytes, words, and whether it ends in white space so far.
        self._open = np.zeros(3, np.int64) if state is None else state["open"].copy()
        # The item that the last document was cut from, and how many there are.
        self._item = (-1, -1, -1) if state is None else tuple(state["item"].tolist())
        self._num_items = 0 if state is None else int(state["num_items"])
        self.num_bytes = 0 if state is None else int(state["num_bytes"])
        self.num_words = 0 if state is None else int(state["num_words"])
        self.crc = 0 if state is None else int(state["crc"])

    @property
    def num_tokens(self) -> int:
        """Tokens so far, separators included."""
        return self._arrays["token"].rows

    @property
    def num_documents(self) -> int:
        """Documents so far, the one under way included."""
        return self._arrays["document_offset"].rows

    def add(self, pieces: list[Piece], tokens: list[np.ndarray]) -> bool:
        """Appends pieces of documents; returns whether a shard went to disk.

        Raises:
            UserError: The tokenizer takes text of a document for the separator.
        """
        stream: list[np.ndarray] = []
        new: dict[str, list[int]] = {name: [] for name in self._arrays if name != "token"}
        offsets = new["document_offset"]
        position = self.num_tokens
        for piece, ids in zip(pieces, tokens, strict=True):
            if piece.begins:
                if self.num_documents + len(offsets):
                    new["document_bytes"].append(int(self._open[0]))
                    new["document_words"].append(int(self._open[1]))
                self._open = np.asarray([0, 1, False], np.int64)
                self.num_words += 1
                offsets.append(position)
                new["document_file"].append(self._file_number(piece))
                new["document_digest"].append(piece.digest)
                stream.append(self._separator)
                position += 1
            num_words = _num_gaps(piece.text) - int(self._open[2] and piece.text[0].isspace())
            self._open += (piece.num_bytes, num_words, 0)
            self._open[2] = piece.text[-1].isspace()
            self.num_bytes += piece.num_bytes
            self.num_words += num_words
            stream.append(ids)
            position += len(ids)
        token = np.concatenate(stream)
        if np.count_nonzero(token == self._separator) != len(offsets):
            raise UserError(
                f"tokenizer.separator={self._tokenizer.separator!r}: this tokenizer also makes it "
                "from the text of documents; choose a special token of its vocabulary"
            )
        self.crc = zlib.crc32(token.tobytes(), self.crc)
        written = [self._arrays["token"].append(token)]
        written += [self._arrays[name].append(values) for name, values in new.items()]
        return any(written)

    def _file_number(self, piece: Piece) -> int:
        """Returns the number, in this split, of the file or record that a document comes from."""
        item = (piece.position.part, piece.position.file, piece.position.item)
        if item != self._item:
            self._item, self._num_items = item, self._num_items + 1
        return self._num_items - 1

    def digests(self) -> np.ndarray:
        """Returns the digests of its documents so far, uint64 [D]."""
        held = self._arrays["document_digest"].state()
        stored = open_array(self._path / "document_digest")
        return np.concatenate([read_rows(stored, 0, int(held["rows"])), held["remainder"]])

    def state(self) -> dict[str, np.ndarray]:
        """Returns what a later writer needs to continue."""
        state = {
            f"{name}.{key}": value
            for name, array in self._arrays.items()
            for key, value in array.state().items()
        }
        state["num_bytes"] = np.asarray(self.num_bytes)
        state["num_words"] = np.asarray(self.num_words)
        state["crc"] = np.asarray(self.crc, np.int64)
        state["open"] = self._open
        state["item"] = np.asarray(self._item, np.int64)
        state["num_items"] = np.asarray(self._num_items)
        return state

    def close(self) -> tuple[dict[str, int], dict[str, Any]]:
        """Ends the split; returns its counts and the arrays' shapes and dtypes."""
        counts = {
            "tokens": self.num_tokens,
            "documents": self.num_documents,
            "bytes": self.num_bytes,
            "words": self.num_words,
            # Part of the fingerprint: text changed in the middle of a file makes other tokens.
            "crc32": self.crc,
        }
        if self.num_documents:
            self._arrays["document_bytes"].append(self._open[:1])
            self._arrays["document_words"].append(self._open[1:2])
        self._arrays["document_offset"].append(np.asarray([self.num_tokens], np.int64))
        for array in self._arrays.values():
            array.close()
        return counts, {name: array.describe() for name, array in self._arrays.items()}


def _num_gaps(text: str) -> int:
    """Returns the number of runs of white space; `re.split` at them has one part more."""
    return len(text.split()) - 1 + text[0].isspace() + text[-1].isspace()


class TokenWriter:
    """All splits, and how far the corpus has been read."""

    def __init__(
        self,
        path: epath.Path,
        tokenizer: TextTokenizer,
        known: Mapping[Split, np.ndarray] | None = None,
    ):
        """Starts, or continues where a killed start left its progress file.

        Args:
            known: Digests (uint64) of documents that are elsewhere already, by split: they are
                left out.
        """
        self._path = path
        self._known = dict(known or {})
        self._tokenizer = tokenizer
        saved = _read_progress(path / PROGRESS_FILE)
        self.position, self.seconds, states = Position(), 0.0, dict[str, Any]()
        if saved is not None:
            about = json.loads(saved.pop("about").item())
            self.position, self.seconds = Position(**about["position"]), about["seconds"]
            for name, value in saved.items():
                split, _, rest = name.partition("/")
                states.setdefault(split, {})[rest] = value
        self.splits: dict[Split, SplitWriter] = {
            split: SplitWriter(path / split, tokenizer, states.get(split)) for split in SPLITS
        }
        self._since = self._saved = time.monotonic()

    @property
    def num_bytes(self) -> int:
        """Bytes of text written so far."""
        return sum(split.num_bytes for split in self.splits.values())

    def seen(self) -> Seen:
        """Returns what has been written, on all processes the same."""
        found = {split: writer.digests() for split, writer in self.splits.items()}
        for split, digests in self._known.items():
            found[split] = np.concatenate([digests, found[split]])
        return seen_by_first(found)

    def write(self, corpus: Corpus, on_progress: Callable[[int], object]) -> None:
        """Encodes and writes what the corpus still holds.

        Args:
            on_progress: Called with the number of bytes of each batch.
        """
        source = batches(corpus, self.position, self.seen())
        for pieces, tokens in encoded(self._tokenizer, source):
            written = self._add(pieces, tokens)
            self.position = pieces[-1].position
            if written or time.monotonic() - self._saved > _SAVE_SECS:
                self.save()
            on_progress(sum(piece.num_bytes for piece in pieces))
        self.position = corpus.position
        self.save()

    def _add(self, pieces: list[Piece], tokens: list[np.ndarray]) -> bool:
        written = False
        for split, writer in self.splits.items():
            chosen = [n for n, piece in enumerate(pieces) if piece.split == split]
            if chosen:
                written |= writer.add([pieces[n] for n in chosen], [tokens[n] for n in chosen])
        return written

    def save(self) -> None:
        """Records what is done, atomically; a kill before repeats the same writes."""
        now = time.monotonic()
        self.seconds, self._since, self._saved = self.seconds + now - self._since, now, now
        about = {"position": self.position.to_json(), "seconds": self.seconds}
        arrays = {
            f"{split}/{name}": value
            for split, writer in self.splits.items()
            for name, value in writer.state().items()
        }
        buffer = io.BytesIO()
        np.savez(buffer, about=np.asarray(json.dumps(about)), **arrays)  # type: ignore[arg-type]
        content = buffer.getvalue()
        write_bytes(self._path / PROGRESS_FILE, content + _checksum(content))

    def close(self, *, near_duplicates: bool) -> tuple[dict[str, int], dict[str, Any]]:
        """Ends all splits; returns counts and arrays for the manifest.

        Args:
            near_duplicates: Whether counts of near-duplicates are part of them.
        """
        counts: dict[str, int] = {}
        arrays: dict[str, Any] = {}
        for split, writer in self.splits.items():
            split_counts, split_arrays = writer.close()
            counts |= {f"{split}_{name}": number for name, number in split_counts.items()}
            arrays |= {f"{split}/{name}": spec for name, spec in split_arrays.items()}
        names = (*LEFT_OUT, *(NEAR_LEFT_OUT if near_duplicates else ()))
        left_out = {name: self.position.left_out.get(name, 0) for name in names}
        return {**counts, **left_out}, arrays


def seen_by_first(digests: Mapping[Split, np.ndarray] | None) -> Seen:
    """Returns the documents that process 0 has written, on all processes.

    Args:
        digests: uint64 [D] of each split; None on the other processes.
    """
    found = {}
    for split in SPLITS:
        own = None if digests is None else digests[split].view(np.uint32)
        found[split] = SeenDocuments(array_of_first(own).view(np.uint64))
    return found


def batches(corpus: Corpus, position: Position, seen: Seen) -> Iterator[list[Piece]]:
    """Yields the pieces from a position on in groups to be encoded at once.

    They are the same on all processes of a run.
    """
    return grouped(corpus.pieces(position, seen), of_first(_batch_bytes()))


def grouped(pieces: Iterator[Piece], num_bytes: int) -> Iterator[list[Piece]]:
    """Groups pieces so that each group holds about so many bytes."""
    batch: list[Piece] = []
    held = 0
    for piece in pieces:
        batch.append(piece)
        held += piece.num_bytes
        if held >= num_bytes:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _batch_bytes() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(_MAX_BATCH_BYTES, (cores or 1) * _BATCH_BYTES_PER_CORE)


def _read_progress(path: epath.Path) -> dict[str, np.ndarray] | None:
    if not path.exists():
        return None
    content, checksum = (data := path.read_bytes())[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if checksum != _checksum(content):
        raise ArtifactError(
            f"{path}: damaged (it does not match its own checksum); make it again with --rebuild"
        )
    with np.load(io.BytesIO(content)) as archive:
        return dict(archive)


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(_CHECKSUM_BYTES, "little")
