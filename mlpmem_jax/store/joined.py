"""Joined artifacts: the rows of other artifacts, one range after the other, and no arrays of their
own. `StoredArray` reads them like any others.

Their manifest records the parts with their fingerprints, the ranges of rows that are taken of each,
and the rows at which a token stream begins.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.store.checked_json import SHARDS
from mlpmem_jax.store.manifest import Artifact, Manifest

JOINED = "joined"  # In what the manifest records of an array: it is read from the parts.


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a training datastore as ranges of rows of artifacts.

    Attributes:
        parts: Fingerprint of each artifact that holds rows, by its path in the store.
        ranges: Of each range its part, by number, and its first row there and the one behind its
            last: int64 [R, 3].
        streams: Rows at which a token stream begins, ascending; the first is 0.
    """

    parts: dict[str, str]
    ranges: np.ndarray
    streams: tuple[int, ...]

    @classmethod
    def of(cls, artifact: Artifact) -> "Rows":
        """Returns the rows of a finished datastore, joined or not."""
        manifest = artifact.load()
        streams = tuple(manifest.counts.get("streams", (0,)))
        if JOINED not in manifest.counts:
            whole = np.asarray([[0, 0, manifest.counts["rows"]]], np.int64)
            return cls({artifact.relative: manifest.fingerprint}, whole, streams)
        joined = manifest.counts[JOINED]
        return cls(dict(joined["parts"]), np.asarray(joined["ranges"], np.int64), streams)

    @property
    def num_rows(self) -> int:
        """Rows of all ranges."""
        return int((self.ranges[:, 2] - self.ranges[:, 1]).sum())

    @property
    def firsts(self) -> np.ndarray:
        """The first row of each range, and then the number of rows: int64 [R + 1]."""
        return np.concatenate([[0], np.cumsum(self.ranges[:, 2] - self.ranges[:, 1])])

    def followed_by(self, other: "Rows") -> "Rows":
        """Returns these rows and then those of another artifact."""
        ranges = other.ranges + np.asarray([len(self.parts), 0, 0])
        streams = (*self.streams, *(self.num_rows + row for row in other.streams))
        return Rows(self.parts | other.parts, np.concatenate([self.ranges, ranges]), streams)

    def kept(self, is_kept_N: np.ndarray) -> "Rows":
        """Returns the rows that are kept (bool [N]); parts of which none is kept are dropped."""
        changes = np.diff(np.concatenate([[False], is_kept_N, [False]]).astype(np.int8))
        edges = np.flatnonzero(changes)
        firsts, ranges = self.firsts, []
        for start, stop in edges.reshape(-1, 2):
            first = int(np.searchsorted(firsts, start, "right")) - 1
            last = int(np.searchsorted(firsts, stop, "left"))
            for number in range(first, last):
                part, begin, end = (int(one) for one in self.ranges[number])
                before, behind = start - firsts[number], firsts[number + 1] - stop
                ranges.append([part, begin + max(0, int(before)), end - max(0, int(behind))])
        used = sorted({part for part, *_ in ranges})
        names = list(self.parts)
        new_number = {part: number for number, part in enumerate(used)}
        moved = np.concatenate([[0], np.cumsum(is_kept_N)])
        return Rows(
            {names[part]: self.parts[names[part]] for part in used},
            np.asarray([[new_number[part], *rest] for part, *rest in ranges], np.int64),
            tuple(sorted({int(moved[row]) for row in self.streams} - {int(moved[-1])})),
        )

    def numbers_in(self, other: "Rows") -> np.ndarray:
        """Returns the number that each of these rows has in other rows, -1 where it is not there.

        Returns:
            int64 [N]; the order of the rows is the same in both.
        """
        known, theirs = other.firsts, list(other.parts)
        places: dict[str, np.ndarray] = {}
        for (part, start, stop), first in zip(other.ranges.tolist(), known.tolist(), strict=False):
            name = theirs[part]
            if stop > len(places.get(name, ())):
                grown = np.full(stop, -1, np.int64)
                grown[: len(places.get(name, ()))] = places.get(name, ())
                places[name] = grown
            places[name][start:stop] = np.arange(first, first + stop - start)
        found, ours = [], list(self.parts)
        for part, start, stop in self.ranges.tolist():
            numbers = np.full(stop - start, -1, np.int64)
            inside = places.get(ours[part], numbers[:0])[start:stop]
            numbers[: len(inside)] = inside
            found.append(numbers)
        return np.concatenate(found)

    def counts(self) -> dict[str, Any]:
        """Returns what a manifest records of them."""
        return {
            "rows": self.num_rows,
            "streams": list(self.streams),
            JOINED: {"parts": self.parts, "ranges": self.ranges.tolist()},
        }

    def arrays(self, like: Manifest) -> dict[str, Any]:
        """Returns the arrays of a joined artifact, as those of a part but for their length."""
        return {
            name: {
                **{key: about[key] for key in ("dtype", "shard_rows", "chunk_rows")},
                "shape": [self.num_rows, *about["shape"][1:]],
                JOINED: True,
                SHARDS: [],
            }
            for name, about in like.arrays.items()
        }


def parts_of(artifact: Artifact, manifest: Manifest) -> list[Artifact]:
    """Returns the artifacts that hold the rows of a joined one.

    Raises:
        ArtifactError: One is missing, or was made again with other content.
    """
    parts = []
    for relative, fingerprint in manifest.counts[JOINED]["parts"].items():
        part = Artifact(artifact.root, relative, artifact.kind)
        found = part.load().fingerprint
        if found != fingerprint:
            raise ArtifactError(
                f"{artifact.path}: {artifact.label} is stale: {part.path} was rebuilt "
                f"({fingerprint}, now {found}); rebuild it with `{artifact.command} --rebuild`"
            )
        parts.append(part)
    return parts


def first_part(artifact: Artifact) -> Artifact:
    """Returns the artifact that holds the first rows: the first part of a joined one, or itself."""
    manifest = artifact.load()
    return parts_of(artifact, manifest)[0] if JOINED in manifest.counts else artifact


def stream_starts(artifact: Artifact) -> Sequence[int]:
    """Returns the rows of a datastore at which a token stream begins."""
    return tuple(artifact.load().counts.get("streams", (0,)))
