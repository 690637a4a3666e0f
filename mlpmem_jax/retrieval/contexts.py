"""The contexts of all tokens in order: where the longest end of a context occurs elsewhere.

The context of a token is what its document holds up to it, itself included. Contexts are ordered
as texts that are read backwards, so that those with the same last tokens stand together: a suffix
array of the reversed documents, made by doubling the compared length. NumPy only.

Suffixes: T tokens, E occurrences, Q queries, M pairs.
"""

import numpy as np

from mlpmem_jax.retrieval.engine import row_ranges

# Of a token, while contexts are sorted: packed ranks, their order, sorted, and numbered.
LEAST_TOKEN_BYTES = 40
_CHUNK = 1 << 20
_FAR = np.iinfo(np.int64).max


class Contexts:
    """Contexts of a stream of tokens, of which the first are occurrences that count.

    Memory: 4 bytes a token for each doubling up to the length of the longest passage that occurs
    twice, 36 besides, and while it is built about 60 instead of these.

    Args:
        token_T: Tokens of whole documents, one after the other.
        document_offset: First token of each document, and T: int64 [D + 1].
        num_occurrences: E; tokens before this number are occurrences.
    """

    def __init__(self, token_T: np.ndarray, document_offset: np.ndarray, num_occurrences: int):
        sizes = np.diff(document_offset)
        self._length_T = np.arange(1, len(token_T) + 1) - np.repeat(document_offset[:-1], sizes)
        self._ranks = _ranks(token_T, self._length_T)
        last_E = self._ranks[-1][:num_occurrences]
        # Equal contexts in the order of the stream.
        self.order_E = np.argsort(last_E, kind="stable")
        self._rank_E = last_E[self.order_E]
        self._place_E = np.empty_like(self.order_E)
        self._place_E[self.order_E] = np.arange(num_occurrences)
        # Tokens that each occurrence has in common with the one before, in their order.
        self._shared_E = np.zeros(num_occurrences, np.int64)
        for start in range(1, num_occurrences, _CHUNK):
            part = slice(start, min(start + _CHUNK, num_occurrences))
            before = self.order_E[start - 1 : part.stop - 1]
            self._shared_E[part] = self._shared(before, self.order_E[part])

    def __len__(self) -> int:
        return len(self.order_E)

    def longest(self, token_Q: np.ndarray, min_count: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns where the longest end of contexts stands that occurs often enough elsewhere.

        Args:
            token_Q: Tokens (int64), all of them occurrences or none.
            min_count: Least number of occurrences, the token's own left out.

        Returns:
            The first place in `order_E` and the end, int64 [Q] each; a token's own place is among
            them. The end of no token at all occurs everywhere; both are 0 where even that
            is not enough.
        """
        is_own = len(token_Q) > 0 and token_Q[0] < len(self)
        if is_own:
            place_Q = self._place_E[token_Q]
            left_Q, right_Q = place_Q - 1, place_Q + 1
        else:
            right_Q = np.searchsorted(self._rank_E, self._ranks[-1][token_Q], side="left")
            left_Q = right_Q - 1
        length_Q = np.empty_like(left_Q)
        for part in row_ranges(len(token_Q), max(1, _CHUNK // min_count)):  # Each holds a list.
            neighbors = left_Q[part], right_Q[part]
            length_Q[part] = self._longest_length(token_Q[part], *neighbors, min_count)
        first_Q, stop_Q = np.zeros_like(left_Q), np.where(length_Q < 0, 0, len(self))
        level_Q = np.frexp(length_Q)[1] - 1  # Of the largest power of two within the length.
        level_Q = np.minimum(level_Q, len(self._ranks) - 1)
        for level in np.unique(level_Q[length_Q > 0]):
            some = np.flatnonzero((length_Q > 0) & (level_Q == level))
            same = _Same(self._ranks[level], token_Q[some], length_Q[some] - (1 << level))
            places = self.order_E, np.zeros(len(some), np.int64), left_Q[some] + 1
            first_Q[some] = same.first_place(*places)
            places = self.order_E, right_Q[some], np.full(len(some), len(self))
            stop_Q[some] = same.end_place(*places)
        return first_Q, stop_Q

    def _longest_length(
        self, token_Q: np.ndarray, left_Q: np.ndarray, right_Q: np.ndarray, min_count: int
    ) -> np.ndarray:
        """Returns the tokens of the longest end, -1 where there are too few occurrences.

        The occurrences that have most in common with a context stand next to it, so the best
        `min_count` of them are some to its left and the rest to its right.
        """
        left = [np.full(len(token_Q), _FAR), self._shared_at(token_Q, left_Q)]
        right = [left[0], self._shared_at(token_Q, right_Q)]
        for more in range(1, min_count):
            left.append(np.minimum(left[-1], self._next_shared(left_Q - more + 1, left_Q - more)))
            right.append(np.minimum(right[-1], self._next_shared(right_Q + more, right_Q + more)))
        pairs = (np.minimum(left[n], right[min_count - n]) for n in range(min_count + 1))
        return np.maximum.reduce(list(pairs))

    def _shared_at(self, token_Q: np.ndarray, place_Q: np.ndarray) -> np.ndarray:
        """Returns what contexts share with the occurrence at a place; -1: there is none."""
        is_there_Q = (place_Q >= 0) & (place_Q < len(self))
        shared_Q = np.full(len(token_Q), -1)
        other_M = self.order_E[place_Q[is_there_Q]]
        shared_Q[is_there_Q] = self._shared(token_Q[is_there_Q], other_M)
        return shared_Q

    def _next_shared(self, place_Q: np.ndarray, reached_Q: np.ndarray) -> np.ndarray:
        """Returns what the occurrence at a place shares with the one before; -1: not reached."""
        is_there_Q = (reached_Q >= 0) & (reached_Q < len(self))
        return np.where(is_there_Q, self._shared_E[np.where(is_there_Q, place_Q, 0)], -1)

    def _shared(self, one_M: np.ndarray, other_M: np.ndarray) -> np.ndarray:
        """Returns how many last tokens contexts have in common, int64 [M]."""
        length_M, other_length_M = self._length_T[one_M], self._length_T[other_M]
        is_equal_M = self._ranks[-1][one_M] == self._ranks[-1][other_M]
        shared_M = np.where(is_equal_M, length_M, 0)
        shortest_M = np.minimum(length_M, other_length_M)
        for level in reversed(range(len(self._ranks) - 1)):
            rank_T, is_open_M = self._ranks[level], shared_M < shortest_M
            at_M, other_at_M = (
                np.where(is_open_M, token_M - shared_M, 0) for token_M in (one_M, other_M)
            )
            is_same_M = is_open_M & (rank_T[at_M] == rank_T[other_at_M])
            # Of equal rank, contexts that are shorter than the level are equally long.
            shared_M += np.where(is_same_M, np.minimum(1 << level, length_M - shared_M), 0)
        return shared_M


class _Same:
    """Compares the last tokens of contexts, as many as each query says.

    Args:
        rank_T: Ranks of contexts by a power of two of last tokens.
        more_Q: How many more tokens are compared; if they are equal to the power of two, what is
            compared are the last ones twice, so many apart.
    """

    def __init__(self, rank_T: np.ndarray, token_Q: np.ndarray, more_Q: np.ndarray):
        self._rank_T, self._more_Q = rank_T, more_Q
        self._rank_Q, self._earlier_Q = rank_T[token_Q], rank_T[token_Q - more_Q]

    def _is_same(self, token_Q: np.ndarray) -> np.ndarray:
        earlier_Q = np.maximum(token_Q - self._more_Q, 0)
        is_same_Q = self._rank_T[token_Q] == self._rank_Q
        return is_same_Q & (self._rank_T[earlier_Q] == self._earlier_Q)

    def first_place(self, order_E: np.ndarray, low_Q: np.ndarray, high_Q: np.ndarray) -> np.ndarray:
        """Returns the first place below `high_Q` from which on all are the same."""
        return self._first(order_E, low_Q, high_Q, same=True)

    def end_place(self, order_E: np.ndarray, low_Q: np.ndarray, high_Q: np.ndarray) -> np.ndarray:
        """Returns the first place from `low_Q` on that is not the same."""
        return self._first(order_E, low_Q, high_Q, same=False)

    def _first(
        self, order_E: np.ndarray, low_Q: np.ndarray, high_Q: np.ndarray, *, same: bool
    ) -> np.ndarray:
        while (low_Q < high_Q).any():
            middle_Q = (low_Q + high_Q) // 2
            is_it_Q = self._is_same(order_E[np.minimum(middle_Q, len(order_E) - 1)]) == same
            is_open_Q = low_Q < high_Q
            low_Q = np.where(is_open_Q & ~is_it_Q, middle_Q + 1, low_Q)
            high_Q = np.where(is_open_Q & is_it_Q, middle_Q, high_Q)
        return low_Q


def _ranks(token_T: np.ndarray, length_T: np.ndarray) -> list[np.ndarray]:
    """Returns ranks of contexts by their last 1, 2, 4, … tokens, until more tell no more apart.

    Args:
        length_T: Tokens of the context of each.

    Returns:
        int32 [T] each, from 1 on. A shorter context comes before its continuations.
    """
    ranks = [_numbered(token_T)]
    step = 1
    while True:
        rank_T, count = ranks[-1], int(ranks[-1].max(initial=0))
        packed_T = rank_T.astype(np.int64) * (count + 1)
        packed_T[step:] += np.where(length_T[step:] > step, rank_T[:-step], 0)
        finer_T = _numbered(packed_T)
        if int(finer_T.max(initial=0)) == count:
            return ranks
        ranks.append(finer_T)
        step *= 2


def _numbered(value_T: np.ndarray) -> np.ndarray:
    return (np.unique(value_T, return_inverse=True)[1] + 1).astype(np.int32)
