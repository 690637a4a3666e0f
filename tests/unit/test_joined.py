"""Joined artifacts: rows of several artifacts under one numbering."""

from pathlib import Path

import numpy as np
import pytest

from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.store.array_specs import ArraySpec
from mlpmem_jax.store.joined import Rows, first_part, stream_starts
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.shards import ShardWriter
from mlpmem_jax.store.stored_array import StoredArray

SPECS = {
    "key": ArraySpec((3,), np.float32, 16, 4),
    "label": ArraySpec((), np.int32, 16, 4),
}


def _made(root: Path, number: int, num_rows: int, seed: int = 0) -> tuple[Artifact, np.ndarray]:
    artifact = Artifact.of(root, "datastore", {"number": number})
    draws = np.random.default_rng([number, seed])
    key = draws.normal(size=(num_rows, 3)).astype(np.float32)
    artifact.begin({})
    writer = ShardWriter(artifact.path, SPECS, num_rows)
    for shard in range(writer.num_shards):
        rows = writer.rows_of(shard)
        label = np.arange(rows.start, rows.stop) + 1000 * number
        writer.put(rows.start, {"key": key[rows], "label": label})
    artifact.finish(counts={"rows": num_rows}, arrays=writer.close())
    return artifact, key


def _joined(root: Path, rows: Rows, like: Artifact, name: str = "joined") -> Artifact:
    artifact = Artifact.of(root, "datastore", {"joined": name})
    artifact.begin({})
    artifact.finish(counts=rows.counts(), arrays=rows.arrays(like.load()))
    return artifact


@pytest.fixture
def parts(tmp_path: Path) -> list[tuple[Artifact, np.ndarray]]:
    return [_made(tmp_path, number, size) for number, size in enumerate((37, 1, 20))]


def test_rows_are_read_across_parts(tmp_path: Path, parts: list[tuple[Artifact, np.ndarray]]):
    first, second, third = (Rows.of(artifact) for artifact, _ in parts)
    rows = first.followed_by(second).followed_by(third)
    joined = _joined(tmp_path, rows, parts[0][0])
    expected = np.concatenate([key for _, key in parts])
    key = StoredArray(joined, "key")
    assert key.shape == (58, 3) and key.dtype == np.float32
    for start, stop in ((0, 58), (0, 37), (36, 39), (37, 38), (38, 58), (5, 5), (58, 58)):
        np.testing.assert_array_equal(key.read(start, stop), expected[start:stop])
    picked = np.asarray([57, 0, 37, 36, 38, 0])
    np.testing.assert_array_equal(key.take(picked), expected[picked])
    assert tuple(stream_starts(joined)) == (0, 37, 38)
    assert first_part(joined).relative == parts[0][0].relative
    assert Rows.of(joined).counts() == rows.counts()


def test_rows_that_are_not_kept_are_gone(tmp_path: Path, parts: list[tuple[Artifact, np.ndarray]]):
    first, second, third = (Rows.of(artifact) for artifact, _ in parts)
    rows = first.followed_by(second).followed_by(third)
    expected = np.concatenate([key for _, key in parts])
    draws = np.random.default_rng(0)
    for share in (0.1, 0.5, 0.95):
        is_kept = draws.random(58) < share
        is_kept[37] = False  # All of the second part.
        kept = rows.kept(is_kept)
        joined = _joined(tmp_path, kept, parts[0][0], f"{share}")
        np.testing.assert_array_equal(StoredArray(joined, "key").read_all(), expected[is_kept])
        numbers = rows.numbers_in(kept)
        np.testing.assert_array_equal(numbers[is_kept], np.arange(is_kept.sum()))
        assert (numbers[~is_kept] == -1).all()
        np.testing.assert_array_equal(kept.numbers_in(rows), np.flatnonzero(is_kept))
        assert parts[1][0].relative not in kept.parts
        # Again: some of what is left.
        again = draws.random(kept.num_rows) < 0.5
        twice = kept.kept(again)
        np.testing.assert_array_equal(twice.numbers_in(rows), np.flatnonzero(is_kept)[again])
    assert rows.kept(np.arange(58) >= 10).streams == (0, 27, 28)
    assert rows.kept(np.arange(58) < 37).streams == (0,)


def test_a_part_that_was_rebuilt_makes_it_stale(
    tmp_path: Path, parts: list[tuple[Artifact, np.ndarray]]
):
    first, _, third = (Rows.of(artifact) for artifact, _ in parts)
    joined = _joined(tmp_path, first.followed_by(third), parts[0][0])
    parts[2][0].remove()
    with pytest.raises(ArtifactError, match="does not exist"):
        StoredArray(joined, "key")
    _made(tmp_path, 2, 20, seed=1)
    with pytest.raises(ArtifactError, match="is stale: .* was rebuilt"):
        StoredArray(joined, "key")
