"""Arrays on disk: round trips, checksums, missing shards, appending across kills."""

import ml_dtypes
import numpy as np
import pytest

from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.store.appender import Appender
from mlpmem_jax.store.arrays import create_array, finished_shards, open_array, read_rows, write_rows


def _array(path, rows=2500, dtype=np.float32):
    store = create_array(path, shape=(rows, 3), dtype=dtype, shard_rows=1024, chunk_rows=256)
    values = np.arange(rows * 3).reshape(rows, 3).astype(dtype)
    for start in range(0, rows, 1024):
        write_rows(store, start, values[start : start + 1024]).result()
    return values


@pytest.mark.parametrize("dtype", [np.uint16, np.int64, np.float16, ml_dtypes.bfloat16])
def test_round_trip(tmp_path, dtype):
    values = _array(tmp_path / "a", dtype=dtype)
    np.testing.assert_array_equal(read_rows(open_array(tmp_path / "a"), 0, 2500), values)
    np.testing.assert_array_equal(
        read_rows(open_array(tmp_path / "a"), 999, 1030), values[999:1030]
    )


def test_zeros_are_written(tmp_path):
    store = create_array(tmp_path / "a", shape=(4,), dtype=np.int32, shard_rows=4, chunk_rows=2)
    write_rows(store, 0, np.zeros(4, np.int32)).result()
    assert finished_shards(store) == {0}
    assert not read_rows(open_array(tmp_path / "a"), 0, 4).any()


def test_a_missing_shard_is_an_error_and_not_zeros(tmp_path):
    _array(tmp_path / "a")
    (tmp_path / "a" / "c" / "1" / "0").unlink()
    store = open_array(tmp_path / "a")
    assert finished_shards(store) == {0, 2}
    with pytest.raises(ArtifactError, match="a part is missing.*c/1/0"):
        read_rows(store, 0, 2500)


def test_a_flipped_byte_is_named(tmp_path):
    _array(tmp_path / "a")
    shard = tmp_path / "a" / "c" / "1" / "0"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged.*c/1/0"):
        read_rows(open_array(tmp_path / "a"), 0, 2500)


def test_a_truncated_shard_is_named(tmp_path):
    _array(tmp_path / "a")
    shard = tmp_path / "a" / "c" / "2" / "0"
    shard.write_bytes(shard.read_bytes()[:-7])
    with pytest.raises(ArtifactError, match="c/2/0"):
        read_rows(open_array(tmp_path / "a"), 0, 2500)


def test_an_array_of_another_shape_is_not_continued(tmp_path):
    _array(tmp_path / "a")
    with pytest.raises(ArtifactError, match="shape"):
        create_array(
            tmp_path / "a", shape=(10, 3), dtype=np.float32, shard_rows=1024, chunk_rows=256
        )


@pytest.mark.parametrize("killed_at", [0, 3, 9, 19])
def test_an_appender_continues_from_its_state(tmp_path, killed_at):
    pieces = [np.full((130 + n, 3), n, np.uint16) for n in range(20)]
    appender = Appender(tmp_path / "a", np.uint16, 1024, 256, width=3)
    state, saved_at = appender.state(), 0
    for n, piece in enumerate(pieces[: killed_at + 1]):
        if appender.append(piece):
            state, saved_at = appender.state(), n + 1
    # The process is killed here; what came after the saved state is appended again.
    appender = Appender(tmp_path / "a", np.uint16, 1024, 256, width=3, state=state)
    for piece in pieces[saved_at:]:
        appender.append(piece)
    rows = appender.close()
    expected = np.concatenate(pieces)
    assert rows == len(expected) == appender.describe()["shape"][0]
    np.testing.assert_array_equal(read_rows(open_array(tmp_path / "a"), 0, rows), expected)


def test_a_fresh_appender_forgets_what_was_there(tmp_path):
    first = Appender(tmp_path / "a", np.int64, 8, 4)
    first.append(np.arange(40))
    first.close()
    second = Appender(tmp_path / "a", np.int64, 8, 4)
    second.append(np.arange(3))
    assert second.close() == 3
    np.testing.assert_array_equal(read_rows(open_array(tmp_path / "a"), 0, 3), np.arange(3))
    assert finished_shards(open_array(tmp_path / "a")) == {0}
