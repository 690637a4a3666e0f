"""Two runs do not make the same artifact at the same time."""

import contextlib
import errno
import os
import re

import numpy as np
import pytest
from etils import epath
from orbax.checkpoint._src.serialization import tensorstore_utils

from mlpmem_jax.errors import ArtifactError, UserError
from mlpmem_jax.store import arrays, files, lock
from mlpmem_jax.store.lock import LOCKS, BeingMade, only_maker
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.training import checkpoint


def test_one_that_does_not_wait_is_refused_and_the_first_named(tmp_path):
    artifact = Artifact(tmp_path / "run", "memory/base", "memory")
    other = Artifact(tmp_path / "run", "memory/other", "memory")
    refused = pytest.raises(BeingMade, match=r"is being made by another run \(process \d+ on")
    with only_maker(artifact), only_maker(other), refused, only_maker(artifact, waits=False):
        raise AssertionError("held twice")
    with only_maker(artifact, waits=False):
        assert list((tmp_path / "run" / LOCKS).iterdir())
    assert not (tmp_path / "run" / LOCKS).exists()


def test_the_second_maker_waits_and_says_so_once(tmp_path, monkeypatch, capsys):
    artifact = Artifact(tmp_path / "run", "memory/base", "memory")
    first = contextlib.ExitStack()
    first.enter_context(only_maker(artifact))
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        if len(waited) == 3:
            first.close()

    monkeypatch.setattr(lock.time, "sleep", sleep)
    with only_maker(artifact):
        assert waited == [1.0] * 3
        with pytest.raises(BeingMade), only_maker(artifact, waits=False):
            raise AssertionError("held twice")
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"memory/base \(base\): being made by another run \(process \d+ on .+\); waiting", line
    )
    assert not (tmp_path / "run" / LOCKS).exists()


def test_what_a_killed_maker_left_does_not_hold(tmp_path):
    artifact = Artifact(tmp_path, "memory/base", "memory")
    (tmp_path / LOCKS).mkdir()
    (tmp_path / LOCKS / "memory.base").write_text("process 1 on nowhere")
    with only_maker(artifact):
        pass
    assert not (tmp_path / LOCKS).exists()


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.parametrize("call", ["flock", "lockf"])
def test_where_there_are_no_locks_arrays_are_written_without(
    tmp_path, monkeypatch, capsys, number, call
):
    """As on some network file systems; two runs are not kept apart then, and that is said once."""

    def no_locks(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files, "_has_locks", {})
    monkeypatch.setattr(files.fcntl, call, no_locks)
    for name in ("memory/base", "memory/other"):
        with only_maker(Artifact(tmp_path / "run", name, "memory")):
            pass
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path}/run: this file system does not lock files")
    assert not (tmp_path / "run").exists()
    path = tmp_path / "array"
    assert arrays.kvstore_spec(path)["file_io_locking"] == {"mode": "none"}
    array = arrays.create_array(path, shape=(4,), dtype=np.int32, shard_rows=4, chunk_rows=4)
    arrays.write_rows(array, 0, np.arange(4, dtype=np.int32)).result()
    assert arrays.read_rows(arrays.open_array(path), 0, 4).tolist() == [0, 1, 2, 3]


def test_where_there_are_locks_tensorstore_uses_them(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_has_locks", {})
    assert "file_io_locking" not in arrays.kvstore_spec(tmp_path / "array")


def test_checkpoints_are_written_without_locks_too(tmp_path, monkeypatch):
    contexts = tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT
    for context in contexts:
        monkeypatch.setitem(context, "file_io_locking", {})
    monkeypatch.setattr(checkpoint, "has_locks", lambda path: False)
    made = checkpoint.Checkpoints(epath.Path(tmp_path), 1, ("params",))
    made.save(1, {"params": {"x": np.arange(3.0)}})
    made.close()
    for ocdbt in (True, False):
        spec = tensorstore_utils.get_ts_context(use_ocdbt=ocdbt).spec.to_json()
        assert spec["file_io_locking"] == {"mode": "none"}
    monkeypatch.delattr(tensorstore_utils, "_BASE_TS_CONTEXT")
    with pytest.raises(UserError, match="does not lock files.*use another workdir"):
        checkpoint.Checkpoints(epath.Path(tmp_path), 1, ("params",))


def test_a_file_of_the_users_in_the_place_of_a_lock(tmp_path):
    artifact = Artifact(tmp_path, "memory/base", "memory")
    (tmp_path / LOCKS).mkdir()
    mine = tmp_path / LOCKS / "memory.base"
    mine.write_text("mine")
    with pytest.raises(ArtifactError, match=f"{mine}: not written"), only_maker(artifact):
        raise AssertionError("held")
    assert mine.read_text() == "mine"
