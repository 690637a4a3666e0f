"""Which rows of a training datastore belong to which document, where the corpus changes."""

import dataclasses
import io
from collections.abc import Collection

import numpy as np
from etils import epath

from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.store.files import verify_file, write_bytes
from mlpmem_jax.store.manifest import Artifact

FILE = "documents.npz"


@dataclasses.dataclass(frozen=True)
class TrainDocuments:
    """The documents of a training datastore, in the order of their rows.

    Attributes:
        digest: 64-bit hash of the text of each: uint64 [D].
        start: Its first row: int64 [D].
        stop: The row behind its last: int64 [D].
    """

    digest: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    @classmethod
    def of(cls, rows: Artifact, tokens: Artifact) -> "TrainDocuments":
        """Returns the documents of finished rows.

        Args:
            tokens: The token stream that they were made from, unless they keep their documents.
        """
        manifest = rows.load()
        if FILE not in manifest.files:
            return cls.of_tokens(TokenSplit.open(tokens, "train"))
        verify_file(rows.path / FILE, manifest.files[FILE])
        with np.load(io.BytesIO((rows.path / FILE).read_bytes())) as archive:
            return cls(archive["digest"], archive["start"], archive["stop"])

    @classmethod
    def of_tokens(cls, tokens: TokenSplit) -> "TrainDocuments":
        """Returns the documents of a token stream; the last has no row for its end."""
        offset = tokens.document_offset
        stop = np.minimum(offset[1:], tokens.num_rows)
        return cls(tokens.document_digest, offset[:-1], stop)

    def followed_by(self, other: "TrainDocuments", num_rows: int) -> "TrainDocuments":
        """Returns these documents, of so many rows, and behind them others."""
        return TrainDocuments(
            np.concatenate([self.digest, other.digest]),
            np.concatenate([self.start, other.start + num_rows]),
            np.concatenate([self.stop, other.stop + num_rows]),
        )

    def without(
        self, digests: Collection[int], num_rows: int
    ) -> tuple["TrainDocuments", np.ndarray]:
        """Returns the other documents under their new rows, and which rows are kept: bool [N]."""
        removed_D = np.isin(self.digest, np.asarray(sorted(digests), np.uint64))
        is_kept_N = np.ones(num_rows, bool)
        for start, stop in zip(self.start[removed_D], self.stop[removed_D], strict=True):
            is_kept_N[start:stop] = False
        moved = np.concatenate([[0], np.cumsum(is_kept_N)])
        start, stop = (moved[rows[~removed_D]] for rows in (self.start, self.stop))
        return TrainDocuments(self.digest[~removed_D], start, stop), is_kept_N

    def write(self, folder: epath.Path) -> str:
        """Writes them into an artifact; returns the name of the file."""
        buffer = io.BytesIO()
        np.savez(buffer, digest=self.digest, start=self.start, stop=self.stop)
        write_bytes(folder / FILE, buffer.getvalue())
        return FILE


def id_of(digest: int) -> str:
    """Returns how a document is named to users: 16 hexadecimal digits."""
    return f"{digest:016x}"
