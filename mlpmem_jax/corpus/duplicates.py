"""Which documents have been read: each text is read once."""

import numpy as np

# Digests that are held in a set, some 100 bytes each, before they are sorted into 8 bytes each.
_MOST_RECENT = 1 << 20


class SeenDocuments:
    """A set of 64-bit digests: 8 bytes a document, and up to 100 MB for the latest ones.

    Two of n documents have the same digest by chance with probability n² / 2⁶⁵: 3 % for 10⁹.
    """

    def __init__(self, digest_N: np.ndarray | None = None):
        """Starts with digests, uint64 [N]."""
        self._sorted = np.unique(np.asarray([] if digest_N is None else digest_N, np.uint64))
        self._recent: set[int] = set()

    def __contains__(self, digest: int) -> bool:
        if digest in self._recent or not len(self._sorted):
            return digest in self._recent
        value = np.uint64(digest)
        place = int(np.searchsorted(self._sorted, value))
        return place < len(self._sorted) and bool(self._sorted[place] == value)

    def add(self, digest: int) -> None:
        """Adds a digest that is not there."""
        self._recent.add(digest)
        if len(self._recent) >= _MOST_RECENT:
            recent = np.fromiter(sorted(self._recent), np.uint64, len(self._recent))
            self._sorted = np.insert(self._sorted, np.searchsorted(self._sorted, recent), recent)
            self._recent = set()
