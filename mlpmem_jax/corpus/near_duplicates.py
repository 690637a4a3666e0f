"""Near-duplicates: documents that share most of their word 5-grams, by MinHash.

Of near-duplicates the document of test stays rather than one of valid, one of valid rather than one
of train, and within a split the one with the smallest digest. Files and processes have no part in
it: the same texts leave the same documents.
"""

import collections
import re
import zlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from mlpmem_jax.failures import import_package
from mlpmem_jax.store.array_specs import Split

NUM_PERMUTATIONS = 128
_SHINGLE_WORDS = 5
_BATCH_SHINGLES = 1 << 14  # 8 MB of permuted hashes.
_LARGEST_MISS = 0.01  # Probability that a pair at the threshold is not compared.
# A test document is read before one of valid, and that before one of train.
_RANK: Mapping[Split, int] = {"test": 0, "valid": 1, "train": 2}
# Words; in scripts without spaces (Thai, Khmer, Chinese, Japanese …) each character is one.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uf900-\ufaff\U00020000-\U0003ffff"
_WORDS = re.compile(rf"[^\W{_UNSPACED}]+|[{_UNSPACED}]")


class NearDuplicate(NamedTuple):
    """A document that is left out.

    Attributes:
        number: Its place among those that are left out, in reading order.
        split: Its split.
        kept_split: The split of a document that stays and resembles it.
    """

    number: int
    split: Split
    kept_split: Split


class Sketches:
    """The MinHash signatures of documents, of which it tells the near-duplicates.

    They take 0.7 kB of memory for each document.
    """

    def __init__(self, threshold: float):
        """Starts with no document.

        Args:
            threshold: Jaccard similarity, estimated, from which two are near-duplicates.

        Raises:
            UserError: The package is not installed.
        """
        self._threshold = threshold
        # One for all: its permutations are the same, and making them takes time.
        self._sketch = import_datasketch(threshold).MinHash(
            NUM_PERMUTATIONS, seed=1, scheme="affine32", hashfunc=int
        )
        self._empty = self._sketch.hashvalues.copy()
        self._documents: list[tuple[Split, int, np.ndarray]] = []
        self._open: tuple[Split, int] | None = None
        self._held: list[int] = []
        self._num_words = 0

    def begin(self, split: Split, digest: int) -> None:
        """Begins a document; `add` gives its text."""
        self.end()
        self._open = split, digest
        self._sketch.hashvalues = self._empty.copy()

    def add(self, text: str) -> None:
        """Adds text to the document that was begun last."""
        new = [zlib.crc32(word.encode()) for word in _WORDS.findall(text.lower())]
        words = self._held + new
        self._num_words += len(new)
        self._update(_shingles(np.asarray(words, np.uint64)))
        self._held = words[-_SHINGLE_WORDS + 1 :]

    def end(self) -> None:
        """Ends the last document; one shorter than a shingle is a shingle itself."""
        if self._open is None:
            return
        if 0 < self._num_words < _SHINGLE_WORDS:
            missing = _SHINGLE_WORDS - self._num_words
            self._update(_shingles(np.asarray(self._held + [0] * missing, np.uint64)))
        self._documents.append((*self._open, self._sketch.hashvalues))
        self._open, self._held, self._num_words = None, [], 0

    def _update(self, shingle_N: np.ndarray) -> None:
        for start in range(0, len(shingle_N), _BATCH_SHINGLES):
            self._sketch.update_batch(shingle_N[start : start + _BATCH_SHINGLES].tolist())

    def near_duplicates(self) -> dict[int, NearDuplicate]:
        """Returns the documents to leave out, by digest, in reading order.

        No two documents that stay are near-duplicates, as far as they are compared: a pair at the
        threshold is with probability 0.99. Each one left out resembles one that stays.
        """
        self.end()
        buckets_of = self._shared_buckets()
        kept: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
        found: dict[int, Split] = {}
        for place in sorted(buckets_of, key=self._rank):
            buckets = buckets_of[place]
            similar = self._similar(place, {one for bucket in buckets for one in kept[bucket]})
            if similar is None:
                for bucket in buckets:
                    kept[bucket].append(place)
            else:
                found[self._documents[place][1]] = self._documents[similar][0]
        left_out = [one for one in self._documents if one[1] in found]
        return {
            digest: NearDuplicate(number, split, found[digest])
            for number, (split, digest, _) in enumerate(left_out)
        }

    def _shared_buckets(self) -> dict[int, list[tuple[int, int]]]:
        """Returns by document the bands in which others have the same rows, and which these are.

        Most documents share none: an index of all of them would take 10 kB for each.
        """
        found: dict[int, list[tuple[int, int]]] = collections.defaultdict(list)
        # What has no words resembles nothing.
        places = [n for n, one in enumerate(self._documents) if (one[2] != self._empty).any()]
        rows = _band_rows(self._threshold)
        for band in range(NUM_PERMUTATIONS // rows):
            columns = slice(band * rows, (band + 1) * rows)
            block = [self._documents[place][2][columns] for place in places]
            key_N = _mixed(np.asarray(block, np.uint64).reshape(-1, rows).T)
            _, bucket_N, count_N = np.unique(key_N, return_inverse=True, return_counts=True)
            for number in np.flatnonzero(count_N[bucket_N] > 1):
                found[places[number]].append((band, int(bucket_N[number])))
        return found

    def _rank(self, place: int) -> tuple[int, int]:
        split, digest, _ = self._documents[place]
        return _RANK[split], digest

    def _similar(self, place: int, others: Iterable[int]) -> int | None:
        """Returns the first in rank of the documents that reach the threshold; None: none does."""
        signature, needed = self._documents[place][2], self._threshold * NUM_PERMUTATIONS
        similar = [
            other
            for other in others
            if np.count_nonzero(self._documents[other][2] == signature) >= needed
        ]
        return min(similar, key=self._rank, default=None)


def _shingles(word_N: np.ndarray) -> np.ndarray:
    """Returns the distinct hashes of all runs of words, of 32 bits as uint64."""
    count = max(0, len(word_N) - _SHINGLE_WORDS + 1)
    columns = [word_N[place : place + count] for place in range(_SHINGLE_WORDS)]
    return np.unique(_mixed(columns) >> np.uint64(32))


def _mixed(columns: Iterable[np.ndarray]) -> np.ndarray:
    """Returns a 64-bit hash of each row, by the mixing of SplitMix64."""
    hash_N: np.ndarray = np.zeros((), np.uint64)
    for column_N in columns:
        hash_N = (hash_N + column_N) * np.uint64(0xBF58476D1CE4E5B9)
        hash_N = hash_N ^ (hash_N >> np.uint64(29))
    return hash_N


def _band_rows(threshold: float) -> int:
    """Returns the rows of a band: the most with which few pairs at the threshold are missed."""
    for rows in range(NUM_PERMUTATIONS // 2, 1, -1):
        if (1 - threshold**rows) ** (NUM_PERMUTATIONS // rows) <= _LARGEST_MISS:
            return rows
    return 1


def import_datasketch(threshold: float) -> Any:
    """Returns the package `datasketch`.

    Raises:
        UserError: It is not installed.
    """
    what = f"corpus.near_duplicates={threshold}"
    return import_package("datasketch", what, "requirements-dedup.txt")
