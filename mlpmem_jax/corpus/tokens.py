"""The token stream of a split, as it lies on disk.

A split is one stream: each document is the separator and its tokens. Row n of everything
that follows speaks of token n and of its label, token n + 1, so a stream of T tokens has
N = T - 1 rows.
"""

import dataclasses
from typing import Protocol

import numpy as np

from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.store import array_specs
from mlpmem_jax.store.array_specs import ArraySpec, Split, token_dtype
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.stored_array import StoredArray

# A smaller split is read once and kept: windows of it cost no further reads.
_RESIDENT_BYTES = 256 << 20


def tokens_arrays(vocab_size: int) -> dict[str, ArraySpec]:
    """Arrays of a split: token_T, document_offset (D+1), and of each document sizes and file."""
    document = ArraySpec(
        (), np.int64, array_specs.DOCUMENT_SHARD_ROWS, array_specs.DOCUMENT_CHUNK_ROWS
    )
    return {
        "token": ArraySpec(
            (), token_dtype(vocab_size), array_specs.TOKEN_SHARD_ROWS, array_specs.TOKEN_CHUNK_ROWS
        ),
        "document_offset": document,
        "document_bytes": document,
        "document_words": document,
        "document_file": document,
        "document_digest": dataclasses.replace(document, dtype=np.uint64),
    }


class TokenReader(Protocol):
    """What windows need of a token stream."""

    @property
    def num_tokens(self) -> int:
        """Tokens in the stream, T."""
        ...

    @property
    def separator_id(self) -> int:
        """The token that starts each document."""
        ...

    def read_windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Reads tokens [start, start + length) for each start; int32 [B, length]."""
        ...


class TokenSplit:
    """Reads one split of a tokens artifact.

    Attributes:
        split: Which one.
        num_tokens: T.
        num_documents: D.
        num_bytes: UTF-8 bytes of its text; separators count nothing.
        num_words: Its words, as lm-evaluation-harness counts them.
        separator_id: The token that starts each document.
        vocab_size: Token ids are below this, V.
        padded_vocab: V as the models round it up.
    """

    def __init__(self, artifact: Artifact, split: Split):
        """Opens a split.

        Raises:
            ArtifactError: The artifact is missing, unfinished or damaged.
        """
        manifest = artifact.load()
        self.artifact = artifact
        self.split = split
        self.num_tokens = int(manifest.counts[f"{split}_tokens"])
        self.num_documents = int(manifest.counts[f"{split}_documents"])
        self.num_bytes = int(manifest.counts[f"{split}_bytes"])
        self.num_words = int(manifest.counts[f"{split}_words"])
        self.separator_id = int(manifest.counts["separator_id"])
        self.vocab_size = int(manifest.counts["vocab_size"])
        self.padded_vocab = int(manifest.counts["padded_vocab"])
        self._tokens = StoredArray(artifact, f"{split}/token")
        if self._tokens.num_rows != self.num_tokens:
            raise ArtifactError(
                f"{self._tokens.path}: {self._tokens.num_rows} tokens, the manifest says "
                f"{self.num_tokens}"
            )
        small = self.num_tokens * self._tokens.dtype.itemsize <= _RESIDENT_BYTES
        self._resident = self._tokens.read_all() if small else None
        self._documents: dict[str, np.ndarray] = {}

    @classmethod
    def open(cls, artifact: Artifact, split: Split) -> "TokenSplit":
        """Opens a split; as the constructor."""
        return cls(artifact, split)

    @property
    def num_rows(self) -> int:
        """Rows, N = T - 1."""
        return max(0, self.num_tokens - 1)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Reads tokens [start, stop) as int32."""
        if self._resident is not None:
            return self._resident[start:stop].astype(np.int32)
        return self._tokens.read(start, stop).astype(np.int32)

    def read_windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Reads windows of tokens.

        Args:
            starts: int64 [B] first tokens.

        Returns:
            int32 [B, length]; separators behind the end of the stream.

        Raises:
            ArtifactError: A shard is missing or damaged.
        """
        starts = np.asarray(starts, np.int64)
        if self._resident is not None:
            places = starts[:, None] + np.arange(length)
            inside = places < self.num_tokens
            tokens = self._resident[np.where(inside, places, 0)].astype(np.int32)
            return np.where(inside, tokens, np.int32(self.separator_id))
        out = np.full((len(starts), length), self.separator_id, np.int32)
        stops = np.minimum(starts + length, self.num_tokens)
        reads = [
            self._tokens.start(int(start), int(stop))
            for start, stop in zip(starts, stops, strict=True)
        ]
        for place, read in zip(out, reads, strict=True):
            tokens = read.result()
            place[: len(tokens)] = tokens
        return out

    @property
    def document_offset(self) -> np.ndarray:
        """First token of each document, then T: int64 [D + 1]."""
        return self._document_array("document_offset", self.num_documents + 1)

    @property
    def document_bytes(self) -> np.ndarray:
        """UTF-8 bytes of each document: int64 [D]."""
        return self._document_array("document_bytes", self.num_documents)

    @property
    def document_words(self) -> np.ndarray:
        """Words of each document, as lm-evaluation-harness counts them: int64 [D].

        They are what lies between white space; at the ends of a document it bounds empty ones.
        """
        return self._document_array("document_words", self.num_documents)

    @property
    def document_file(self) -> np.ndarray:
        """Number of the file, JSONL record or dataset row of each document: int64 [D].

        They are counted from 0 in the order of this split, so that the numbers are dense: documents
        that `corpus.document_regex` cut from one file have the same number.
        """
        return self._document_array("document_file", self.num_documents)

    @property
    def document_digest(self) -> np.ndarray:
        """64-bit hash of the text of each document: uint64 [D]."""
        return self._document_array("document_digest", self.num_documents)

    def has_documents_of(self, other: "TokenSplit") -> bool:
        """Returns whether another split holds the same documents, whatever its tokenizer."""
        return all(
            np.array_equal(
                self._document_array(name, self.num_documents),
                other._document_array(name, other.num_documents),
            )
            for name in ("document_digest", "document_file")
        )

    def _document_array(self, name: str, length: int) -> np.ndarray:
        if name not in self._documents:
            stored = StoredArray(self.artifact, f"{self.split}/{name}")
            if stored.num_rows != length:
                raise ArtifactError(f"{stored.path}: {stored.num_rows} entries and not {length}")
            self._documents[name] = stored.read_all()
        return self._documents[name]
