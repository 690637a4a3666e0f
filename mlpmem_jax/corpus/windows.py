"""Windows of tokens: for training and for embedding, every row exactly once.

Row n is the decoder's state at token n with the label token n + 1. All row numbers are
NumPy int64; a device sees only tokens and places inside a window.
"""

import dataclasses
from typing import Literal

import numpy as np

from mlpmem_jax.corpus.recent import read_recent
from mlpmem_jax.corpus.tokens import TokenReader


def segments_of(tokens: np.ndarray, separator_id: int) -> np.ndarray:
    """Numbers the documents of each window, for attention within documents.

    Args:
        tokens: int [B, L].

    Returns:
        int32 [B, L]: 0 until the first separator behind the window's first token, then 1, …
    """
    begins = np.asarray(tokens == separator_id, np.int32)
    begins[:, 0] = 0
    return np.cumsum(begins, axis=1, dtype=np.int32)


def window_starts(windows: np.ndarray, length: int, num_rows: int) -> np.ndarray:
    """Returns the first row of each window (int64 [B]); the last window shifts left."""
    return np.maximum(0, np.minimum(windows * length, num_rows - length))


class TokenWindows:
    """Windows of L tokens and their labels; the last one shifts left, a short one is padded."""

    def __init__(
        self,
        reader: TokenReader,
        window_tokens: int,
        weights: Literal["train", "score"] = "train",
        *,
        segments: bool = False,
    ):
        """Plans the windows.

        Args:
            window_tokens: L.
            weights: train: every label counts, so that the end of a document is learned
                too; score: separators are no labels.
            segments: Whether to number documents, for attention within them.
        """
        self._reader = reader
        self._length = window_tokens
        self._weights = weights
        self._segments = segments
        self.num_rows = max(0, reader.num_tokens - 1)
        self.num_windows = -(-self.num_rows // window_tokens)

    def starts(self, windows: np.ndarray) -> np.ndarray:
        """Returns the first row of each window, int64 [B]."""
        return window_starts(np.asarray(windows, np.int64), self._length, self.num_rows)

    def read(self, windows: np.ndarray) -> dict[str, np.ndarray]:
        """Reads windows.

        Args:
            windows: int64 [B] numbers of windows.

        Returns:
            token and label, int32 [B, L], and weight, float32 [B, L]: 0 on padding and on rows
            of the window before, so that each row counts once; segment, int32 [B, L], where asked
            for.
        """
        windows = np.asarray(windows, np.int64)
        starts = self.starts(windows)
        tokens = self._reader.read_windows(starts, self._length + 1)
        label = tokens[:, 1:]
        row = starts[:, None] + np.arange(self._length)
        weight = (row >= windows[:, None] * self._length) & (row < self.num_rows)
        if self._weights == "score":
            weight &= label != self._reader.separator_id
        return {
            "token": np.ascontiguousarray(tokens[:, :-1]),
            "label": np.ascontiguousarray(label),
            "weight": weight.astype(np.float32),
            **_segments(tokens, self._reader.separator_id, self._segments),
        }


def _segments(tokens: np.ndarray, separator_id: int, wanted: bool) -> dict[str, np.ndarray]:
    """Returns the segments of windows (int [B, L + 1], labels included), where they are wanted."""
    return {"segment": segments_of(tokens[:, :-1], separator_id)} if wanted else {}


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Rows that windows score, int64 [B] each.

    Attributes:
        row: First row scored.
        count: Rows scored.
        start: First token of the window.
        offset: Place of `row` in the window.
    """

    row: np.ndarray
    count: np.ndarray
    start: np.ndarray
    offset: np.ndarray


@dataclasses.dataclass(frozen=True)
class EmbeddingPlan:
    """Overlapping windows that score every row once, with context before it.

    Block j is rows [j R, min((j + 1) R, N)); its window of W tokens ends with its last row,
    except at the start of the stream, where it begins with token 0. So each row sees at
    least W - R tokens before it, or all there are.

    Attributes:
        num_rows: N.
        window_tokens: W.
        stride_tokens: R, divides W.
        segments: Whether windows have their documents numbered, for attention within them.
    """

    num_rows: int
    window_tokens: int
    stride_tokens: int
    segments: bool = False

    def __post_init__(self) -> None:
        assert self.window_tokens % self.stride_tokens == 0

    @property
    def num_blocks(self) -> int:
        """Blocks, one window each."""
        return -(-self.num_rows // self.stride_tokens)

    def blocks(self, numbers: np.ndarray) -> Blocks:
        """Returns the blocks of these numbers (int64 [B], below `num_blocks`)."""
        row = np.asarray(numbers, np.int64) * self.stride_tokens
        stop = np.minimum(row + self.stride_tokens, self.num_rows)
        start = np.maximum(0, stop - self.window_tokens)
        return Blocks(row=row, count=stop - row, start=start, offset=row - start)

    def columns(self, blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
        """Returns the places of each block's rows in its window, and which of them exist.

        Returns:
            int32 [B, R] in [0, W), and bool [B, R].
        """
        steps = np.arange(self.stride_tokens)
        places = blocks.offset[:, None] + steps
        exists = steps < blocks.count[:, None]
        return np.minimum(places, self.window_tokens - 1).astype(np.int32), exists

    def read(
        self, reader: TokenReader, numbers: np.ndarray, num_recent: int = 0
    ) -> dict[str, np.ndarray]:
        """Reads the windows of blocks.

        Args:
            numbers: int64 [B] numbers of blocks.
            num_recent: Recent tokens of each token to read besides, M; 0: none.

        Returns:
            token, label and, where asked for, segment, int32 [B, W]; offset and count, int32 [B];
            recent, int32 [B, W, M], where M is not 0. Behind the end of a stream shorter than W
            stand separators.
        """
        blocks = self.blocks(numbers)
        tokens = reader.read_windows(blocks.start, self.window_tokens + 1)
        recent = {}
        if num_recent:
            recent["recent"] = read_recent(reader, blocks.start, self.window_tokens, num_recent)
        return recent | {
            "token": np.ascontiguousarray(tokens[:, :-1]),
            "label": np.ascontiguousarray(tokens[:, 1:]),
            **_segments(tokens, reader.separator_id, self.segments),
            "offset": blocks.offset.astype(np.int32),
            "count": blocks.count.astype(np.int32),
        }

    def num_shards(self, shard_rows: int) -> int:
        """Storage shards that hold the rows."""
        return -(-self.num_rows // shard_rows)

    def shard_blocks(self, shard: int, shard_rows: int) -> range:
        """Returns the blocks that make up a storage shard; R divides `shard_rows`."""
        assert shard_rows % self.stride_tokens == 0
        per_shard = shard_rows // self.stride_tokens
        return range(shard * per_shard, min((shard + 1) * per_shard, self.num_blocks))
