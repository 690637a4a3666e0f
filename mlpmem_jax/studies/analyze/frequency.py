"""Bins of tokens by how often they occur in the training text.

Suffixes: V vocabulary, Q rows.
"""

import dataclasses

import numpy as np

from mlpmem_jax.corpus.tokens import TokenSplit


@dataclasses.dataclass(frozen=True)
class Bins:
    """Half-open ranges of counts: 0, [1, b), [b, b²), ….

    Attributes:
        edges: First count of each bin, ascending from 0; the last bin has no end.
    """

    edges: tuple[int, ...]

    @classmethod
    def up_to(cls, largest: int, base: int) -> "Bins":
        """Makes the bins that hold counts up to `largest`."""
        edges, power = [0], 1
        while power <= max(1, largest):
            edges.append(power)
            power *= base
        return cls(tuple(edges))

    def of(self, count: np.ndarray) -> np.ndarray:
        """Returns the bin of each count (not negative), int64."""
        return np.searchsorted(np.asarray(self.edges), count, side="right").astype(np.int64) - 1

    @property
    def labels(self) -> list[str]:
        """The ranges in words, in whole counts."""
        names = []
        for first, following in zip(self.edges, (*self.edges[1:], None), strict=True):
            if following is None:
                names.append(f"≥ {first:,}")
            elif following - first == 1:
                names.append(f"{first:,}")
            else:
                names.append(f"{first:,}–{following - 1:,}")
        return names


def count_tokens(tokens: TokenSplit, read_tokens: int) -> np.ndarray:
    """Returns how often each token occurs in a split, int64 [V]; reads it in pieces."""
    count_V = np.zeros(tokens.vocab_size, np.int64)
    for start in range(0, tokens.num_tokens, read_tokens):
        piece = tokens.read(start, min(start + read_tokens, tokens.num_tokens))
        count_V += np.bincount(piece, minlength=tokens.vocab_size)
    return count_V
