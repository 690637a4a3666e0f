"""Which n-grams of one text occur in another that is too large to index.

The n-grams of the small text get numbers; the large one streams by and only its n-grams
that have a number are counted. An n-gram is numbered through its beginning: (number of
its first n − 1 tokens, last token), so that codes fit 64 bits for any n and vocabulary,
and nothing is hashed.

An n-gram lies in one document. The separator that begins a document may be its first token
("at the beginning of a document"), never a later one.

Suffixes: T tokens of the small text, C tokens of a piece of the large one, U different
tokens, M different n-grams.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from mlpmem_jax.corpus.tokens import TokenSplit

_NONE = -1  # no n-gram ends here, or none that has a number


class NgramCounts:
    """Numbers the n-grams of a text and counts them in another.

    Args:
        token_T: The small text, its documents one after the other.
        vocab_size: Token ids are below this.
    """

    def __init__(
        self, token_T: np.ndarray, separator_id: int, vocab_size: int, orders: Sequence[int]
    ):
        self._separator_id = separator_id
        self._longest = max(orders)
        kinds = np.unique(token_T)
        self._number_V = np.full(vocab_size, _NONE, np.int64)
        self._number_V[kinds] = np.arange(len(kinds))
        self._num_kinds = len(kinds)
        self._code_M: dict[int, np.ndarray] = {}
        self._count_M: dict[int, np.ndarray] = {}
        self._ends: dict[int, np.ndarray] = {}
        number_T = self._number_V[token_T]
        for order in range(2, self._longest + 1):
            code_T = self._codes(number_T, token_T)
            has_code_T = code_T != _NONE
            code_M, place = np.unique(code_T[has_code_T], return_inverse=True)
            number_T = np.full(len(token_T), _NONE, np.int64)
            number_T[has_code_T] = place
            self._code_M[order] = code_M
            if order in orders:
                self._count_M[order] = np.zeros(len(code_M), np.int64)
                self._ends[order] = number_T

    def _codes(self, prefix_C: np.ndarray, token_C: np.ndarray) -> np.ndarray:
        """Returns codes of the n-grams that end at each token, from the (n − 1)-grams'."""
        code_C = np.full(len(token_C), _NONE, np.int64)
        last_C = self._number_V[token_C[1:]]
        before_C = prefix_C[:-1]
        is_one_C = (before_C != _NONE) & (last_C != _NONE) & (token_C[1:] != self._separator_id)
        code_C[1:][is_one_C] = before_C[is_one_C] * self._num_kinds + last_C[is_one_C]
        return code_C

    def count(self, pieces: Iterable[np.ndarray]) -> None:
        """Adds up how often the n-grams occur in consecutive pieces of the large text."""
        carry = np.empty(0, np.int64)
        for piece in pieces:
            token_C = np.concatenate([carry, piece])
            number_C = self._number_V[token_C]
            for order in range(2, self._longest + 1):
                number_C = self._numbers(order, self._codes(number_C, token_C))
                if order in self._count_M:
                    # What ends inside the carried tokens was counted with the piece before.
                    fresh = number_C[len(carry) :]
                    fresh = fresh[fresh != _NONE]
                    self._count_M[order] += np.bincount(fresh, minlength=len(self._code_M[order]))
            carry = token_C[max(0, len(token_C) - self._longest + 1) :]

    def _numbers(self, order: int, code_C: np.ndarray) -> np.ndarray:
        known_M = self._code_M[order]
        number_C = np.full(len(code_C), _NONE, np.int64)
        has_code_C = code_C != _NONE
        code = code_C[has_code_C]
        if len(known_M) and len(code):
            place = np.minimum(np.searchsorted(known_M, code), len(known_M) - 1)
            number_C[has_code_C] = np.where(known_M[place] == code, place, _NONE)
        return number_C

    def of_tokens(self, order: int) -> np.ndarray:
        """Returns how often the n-gram that ends at each token occurs, int64 [T].

        −1 where none ends: fewer than n tokens of the document stand there.
        """
        number_T = self._ends[order]
        if not len(self._count_M[order]):
            return number_T
        count_T = self._count_M[order][np.maximum(number_T, 0)]
        return np.where(number_T == _NONE, _NONE, count_T)


def pieces_of(tokens: TokenSplit, read_tokens: int) -> Iterable[np.ndarray]:
    """Yields a split in pieces of `read_tokens`."""
    for start in range(0, tokens.num_tokens, read_tokens):
        yield tokens.read(start, min(start + read_tokens, tokens.num_tokens))


def counts_of_labels(
    test: TokenSplit, train: TokenSplit, orders: Sequence[int], read_tokens: int
) -> dict[int, np.ndarray]:
    """Counts in `train` the n-grams that end with the label of each row of `test`.

    Args:
        test: The small text; row n has the label token n + 1.
        train: The large text, read once.

    Returns:
        For each n, int64 [rows of test]; −1 where the document has fewer than n tokens.
    """
    if not orders:
        return {}
    token_T = test.read(0, test.num_tokens)
    counts = NgramCounts(token_T, test.separator_id, test.vocab_size, orders)
    counts.count(pieces_of(train, read_tokens))
    return {order: counts.of_tokens(order)[1:] for order in orders}
