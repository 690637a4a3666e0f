"""Windows cover every row once, whatever the lengths and however large the row numbers."""

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from mlpmem_jax.corpus.windows import EmbeddingPlan, TokenWindows, segments_of

SEPARATOR = 7


class Stream:
    """A token stream of any length: token n is a function of n."""

    separator_id = SEPARATOR

    def __init__(self, num_tokens: int, base: int = 0):
        self.num_tokens = num_tokens
        self.base = base

    def token(self, places: Any) -> Any:
        return (np.asarray(places) + self.base) * 2654435761 % 1009 % 50

    def read_windows(self, starts: np.ndarray, length: int) -> np.ndarray:
        assert starts.dtype == np.int64
        assert (starts >= 0).all()
        places = starts[:, None] + np.arange(length)
        return np.where(places < self.num_tokens, self.token(places), SEPARATOR).astype(np.int32)


LENGTHS = (2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 23, 24, 25, 33, 64, 65)


@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_training_windows_count_every_row_once(num_tokens: int) -> None:
    for length in (1, 2, 3, 8, 16, 40):
        stream = Stream(num_tokens)
        windows = TokenWindows(stream, length, segments=True)
        numbers = np.arange(windows.num_windows)
        batch = windows.read(numbers)
        starts = windows.starts(numbers)
        rows = starts[:, None] + np.arange(length)
        counted = batch["weight"] > 0
        assert sorted(rows[counted]) == list(range(num_tokens - 1))
        np.testing.assert_array_equal(batch["token"][counted], stream.token(rows[counted]))
        np.testing.assert_array_equal(batch["label"][counted], stream.token(rows[counted] + 1))
        assert {name: array.dtype for name, array in batch.items()} == {
            "token": np.int32, "label": np.int32, "segment": np.int32, "weight": np.float32,
        }  # fmt: skip
        score = TokenWindows(stream, length, "score").read(numbers)
        scored = batch["weight"] * (batch["label"] != SEPARATOR)
        np.testing.assert_array_equal(score["weight"], scored)
        assert set(score) == {"token", "label", "weight"}


SHAPES = [
    (window, stride)
    for window, stride in itertools.product((1, 2, 4, 6, 8, 12), (1, 2, 3, 4, 6, 8, 12))
    if window % stride == 0
]


@pytest.mark.parametrize(("window", "stride"), SHAPES)
def test_embedding_scores_every_row_once_with_context(window: int, stride: int) -> None:
    for num_tokens in LENGTHS:
        stream = Stream(num_tokens)
        num_rows = num_tokens - 1
        plan = EmbeddingPlan(num_rows, window, stride)
        numbers = np.arange(plan.num_blocks)
        blocks = plan.blocks(numbers)
        columns, exists = plan.columns(blocks)
        rows = blocks.start[:, None] + columns
        assert rows[exists].tolist() == list(range(num_rows))
        assert columns.min() >= 0
        assert columns.max() < window
        context = columns[exists]
        assert (context >= np.minimum(rows[exists], window - stride)).all()
        batch = plan.read(stream, numbers)
        assert "segment" not in batch
        segmented = dataclasses.replace(plan, segments=True).read(stream, numbers)
        segment_BW = segments_of(batch["token"], SEPARATOR)
        np.testing.assert_array_equal(segmented.pop("segment"), segment_BW)
        assert set(segmented) == set(batch)
        picked = np.take_along_axis(batch["label"], columns, axis=1)[exists]
        np.testing.assert_array_equal(picked, stream.token(np.arange(1, num_tokens)))
        picked = np.take_along_axis(batch["token"], columns, axis=1)[exists]
        np.testing.assert_array_equal(picked, stream.token(np.arange(num_rows)))


def test_blocks_of_storage_shards() -> None:
    for num_rows in (1, 5, 16, 17, 31, 32, 33, 70):
        plan = EmbeddingPlan(num_rows, 8, 4)
        shards = [plan.shard_blocks(n, 16) for n in range(plan.num_shards(16))]
        assert [block for shard in shards for block in shard] == list(range(plan.num_blocks))
        for number, shard in enumerate(shards):
            blocks = plan.blocks(np.asarray(shard))
            assert (blocks.row // 16 == number).all()
            assert ((blocks.row + blocks.count - 1) // 16 == number).all()


def test_rows_beyond_the_range_of_int32() -> None:
    base = 2**33
    num_tokens = base + 1001
    far = Stream(num_tokens)
    plan = EmbeddingPlan(num_tokens - 1, 64, 32)
    numbers = np.arange(plan.num_blocks - 40, plan.num_blocks)
    blocks = plan.blocks(numbers)
    columns, exists = plan.columns(blocks)
    rows = (blocks.start[:, None] + columns)[exists]
    assert rows.dtype == np.int64
    assert rows.tolist() == list(range(int(numbers[0]) * 32, base + 1000))
    batch = plan.read(far, numbers)
    picked = np.take_along_axis(batch["token"], columns, axis=1)[exists]
    np.testing.assert_array_equal(picked, far.token(rows))
    shard = plan.num_shards(256) - 1
    assert plan.shard_blocks(shard, 256)[-1] == plan.num_blocks - 1

    # The same stream, cut at the base, gives the same windows.
    near = TokenWindows(Stream(1001, base=base), 64)
    windows = TokenWindows(far, 64)
    numbers = np.arange(near.num_windows - 1)
    shifted = numbers + base // 64
    assert windows.starts(shifted).tolist() == (near.starts(numbers) + base).tolist()
    for name, array in windows.read(shifted).items():
        np.testing.assert_array_equal(array, near.read(numbers)[name])
    assert windows.starts(np.asarray([windows.num_windows - 1])) == [base + 1000 - 64]


def test_segments_begin_at_separators() -> None:
    s = SEPARATOR
    tokens = np.asarray([[s, 1, 2, s, 3, s], [1, 1, s, 2, 2, 2]])
    assert segments_of(tokens, s).tolist() == [[0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 1]]
