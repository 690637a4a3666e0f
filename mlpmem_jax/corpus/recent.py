"""The last tokens before each row, within its document, for a memory that reads them.

Suffixes: B windows, L rows of a window, M recent tokens (the row's own token first), T = L + M − 1
tokens of a window and of what stands before it.
"""

from typing import Any

import numpy as np

from mlpmem_jax.corpus.tokens import TokenReader


def within_document(token_XM: Any, separator_id: int) -> Any:
    """Replaces what stands before the beginning of a document by separators.

    Args:
        token_XM: int [..., M] tokens of NumPy or JAX, the newest first.

    Returns:
        The same shape, of integers.
    """
    separator_XM = token_XM == separator_id
    ended_XM = separator_XM.cumsum(axis=-1) - separator_XM > 0
    return token_XM * ~ended_XM + separator_id * ended_XM


def recent_tokens(token_BT: np.ndarray, num_recent: int, separator_id: int) -> np.ndarray:
    """Returns the recent tokens of every row of windows.

    Args:
        token_BT: int [B, L + M − 1]: the tokens of a window's rows, and M − 1 before them.
        num_recent: M, at least 1.

    Returns:
        int32 [B, L, M], the row's own token first; separators where the document had not begun.
    """
    token_BLM = np.lib.stride_tricks.sliding_window_view(token_BT, num_recent, axis=1)[..., ::-1]
    return np.ascontiguousarray(within_document(token_BLM, separator_id), np.int32)


def after_start(token_BT: np.ndarray, first: np.ndarray, separator_id: int) -> np.ndarray:
    """Shifts windows that were to begin before a stream does; separators stand there.

    Args:
        token_BT: int [B, T] tokens from max(first, 0) on.
        first: int64 [B], where each was to begin; it may be negative.
    """
    place_BT = np.arange(token_BT.shape[1]) + np.minimum(first, 0)[:, None]
    token_BT = np.take_along_axis(token_BT, np.maximum(place_BT, 0), axis=1)
    return np.where(place_BT < 0, token_BT.dtype.type(separator_id), token_BT)


def read_recent(
    reader: TokenReader, starts: np.ndarray, length: int, num_recent: int
) -> np.ndarray:
    """Reads the recent tokens of windows of a token stream.

    Args:
        starts: int64 [B] first row of each window.
        length: L.
        num_recent: M, at least 1.

    Returns:
        As `recent_tokens`.
    """
    before = num_recent - 1
    first = np.asarray(starts, np.int64) - before
    token_BT = reader.read_windows(np.maximum(first, 0), length + before)
    token_BT = after_start(token_BT, first, reader.separator_id)
    return recent_tokens(token_BT, num_recent, reader.separator_id)
