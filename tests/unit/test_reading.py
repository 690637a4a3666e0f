"""What is read is what was written: each shard of each array, and each small file."""

import numpy as np
import pytest

from mlpmem_jax.corpus.writer import PROGRESS_FILE, TokenWriter, _read_progress
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.store import digests
from mlpmem_jax.store.appender import Appender
from mlpmem_jax.store.array_specs import ArraySpec
from mlpmem_jax.store.arrays import open_array
from mlpmem_jax.store.checked_json import read_checked_json, write_checked_json
from mlpmem_jax.store.copies import copy_rows
from mlpmem_jax.store.digests import shard_digest
from mlpmem_jax.store.files import is_foreign
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.shards import ShardWriter
from mlpmem_jax.store.stored_array import StoredArray

ROWS, SHARD, CHUNK = 100, 32, 8
SPECS = {
    "key": ArraySpec((3,), np.float16, SHARD, CHUNK),
    "label": ArraySpec((), np.int32, SHARD, CHUNK),
}
FOREIGN = (".DS_Store", "._0", "Thumbs.db", ".nfs000000000001", "0~", "1.swp", "x")


def _values(seed=0):
    generator = np.random.default_rng(seed)
    return {
        "key": generator.normal(size=(ROWS, 3)).astype(np.float16),
        "label": generator.integers(0, 9, ROWS).astype(np.int32),
    }


def _write(artifact, values, shards=None):
    writer = ShardWriter(artifact.path, SPECS, ROWS)
    for rows in writer.own_rows()[:shards]:
        writer.put(rows.start, {name: array[rows] for name, array in values.items()})
    if shards is None:
        return writer.close()
    writer.flush()
    return None


def _made(tmp_path, name="base", values=None):
    artifact = Artifact(tmp_path, f"datastore/{name}/train", "datastore")
    artifact.begin({})
    artifact.finish(arrays=_write(artifact, values or _values()))
    return artifact


def _file(artifact, array, shard):
    return artifact.path / array / "c" / (f"{shard}/0" if array == "key" else str(shard))


def _exchange(one, other):
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)


@pytest.fixture(params=[0, digests._WHOLE_BYTES], ids=["in pieces", "whole"])
def whole_bytes(request, monkeypatch):
    """Small shards are read at once for their digest, others in pieces: both find the same."""
    monkeypatch.setattr(digests, "_WHOLE_BYTES", request.param)


@pytest.mark.parametrize("name", SPECS)
def test_an_array_is_read_as_it_was_written(tmp_path, name):
    values = _values()[name]
    stored = StoredArray(_made(tmp_path), name)
    np.testing.assert_array_equal(stored.read_all(), values)
    np.testing.assert_array_equal(stored.read(30, 70), values[30:70])
    np.testing.assert_array_equal(stored.take(np.array([99, 0, 40])), values[[99, 0, 40]])
    assert stored.shape == values.shape and stored.dtype == values.dtype


@pytest.mark.usefixtures("whole_bytes")
@pytest.mark.parametrize("name", SPECS)
def test_shards_that_were_exchanged_are_named(tmp_path, name):
    artifact = _made(tmp_path)
    _exchange(_file(artifact, name, 1), _file(artifact, name, 2))
    # Each is intact by itself, and the others are read as before.
    stored = StoredArray(artifact, name)
    np.testing.assert_array_equal(stored.read(0, SHARD), _values()[name][:SHARD])
    for read in (stored.read_all, lambda: stored.take(np.array([SHARD]))):
        with pytest.raises(ArtifactError, match=f"{name}/c/1.*not the shard that was written"):
            read()


@pytest.mark.parametrize("row", range(0, ROWS, CHUNK))
def test_a_shard_of_another_artifact_is_noticed_wherever_it_differs(tmp_path, row):
    """One value of one chunk, as in a backup of before a small change."""
    before = _values()
    before["label"][row] += 1
    artifact, other = _made(tmp_path), _made(tmp_path, "before", before)
    shard = row // SHARD
    _file(artifact, "label", shard).write_bytes(_file(other, "label", shard).read_bytes())
    with pytest.raises(ArtifactError, match=f"label/c/{shard}: not the shard"):
        StoredArray(artifact, "label").read_all()


@pytest.mark.usefixtures("whole_bytes")
@pytest.mark.parametrize("damage", ["cut", "emptied", "longer", "missing"])
def test_a_shard_that_is_not_whole_is_named(tmp_path, damage):
    artifact = _made(tmp_path)
    file = _file(artifact, "key", 1)
    content = file.read_bytes()
    changed = {"cut": content[:-7], "emptied": b"", "longer": content + b"x"}
    file.write_bytes(changed.get(damage, b""))
    if damage == "missing":
        file.unlink()
    with pytest.raises(ArtifactError, match="key/c/1/0"):
        StoredArray(artifact, "key").read_all()
    np.testing.assert_array_equal(StoredArray(artifact, "key").read(0, 9), _values()["key"][:9])


@pytest.mark.usefixtures("whole_bytes")
def test_every_flipped_byte_of_a_shard_is_noticed(tmp_path):
    artifact = _made(tmp_path)
    file = _file(artifact, "label", 1)
    content = file.read_bytes()
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(damaged)
        with pytest.raises(ArtifactError, match="label"):
            StoredArray(artifact, "label").read_all()


def test_metadata_that_are_not_the_manifests_are_named(tmp_path):
    artifact = _made(tmp_path)
    file = artifact.path / "label" / "zarr.json"
    file.write_text(file.read_text().replace(f'"shape":[{ROWS}]', '"shape":[64]'))
    with pytest.raises(ArtifactError, match="label: damaged, its metadata"):
        StoredArray(artifact, "label")


def test_a_copy_of_exchanged_shards_is_not_made(tmp_path):
    artifact = _made(tmp_path)
    _exchange(_file(artifact, "key", 0), _file(artifact, "key", 1))
    target = Artifact(tmp_path, "datastore/part/train", "datastore")
    with pytest.raises(ArtifactError, match="key/c/0/0: not the shard"):
        copy_rows(artifact, target, SPECS, 64)


def test_manifests_depend_on_content_alone_and_not_on_interruptions(tmp_path):
    whole, stopped = _made(tmp_path), Artifact(tmp_path, "datastore/base2/train", "datastore")
    stopped.begin({})
    _write(stopped, _values(), shards=2)
    assert ShardWriter(stopped.path, SPECS, ROWS).missing_shards() == [2, 3]
    made = stopped.finish(arrays=_write(stopped, _values()))
    assert made.arrays == whole.load().arrays and made.fingerprint == whole.load().fingerprint
    assert not (stopped.path / "written").exists()
    other = _made(tmp_path, "other", _values(seed=1))
    assert other.load().fingerprint != made.fingerprint


def test_shards_exchanged_before_the_artifact_was_finished_are_noticed(tmp_path):
    artifact = Artifact(tmp_path, "datastore/base/train", "datastore")
    artifact.begin({})
    _write(artifact, _values(), shards=2)
    _exchange(_file(artifact, "key", 0), _file(artifact, "key", 1))
    artifact.finish(arrays=_write(artifact, _values()))
    with pytest.raises(ArtifactError, match="key/c/0/0: not the shard"):
        StoredArray(artifact, "key").read_all()


def test_a_damaged_record_of_an_interrupted_start_is_named(tmp_path):
    artifact = Artifact(tmp_path, "datastore/base/train", "datastore")
    artifact.begin({})
    _write(artifact, _values(), shards=2)
    record = artifact.path / "written" / "000001.json"
    record.write_text(record.read_text().replace("label", "labels"))
    arrays = _write(artifact, _values())
    with pytest.raises(ArtifactError, match="000001.json: damaged.*delete it and start"):
        artifact.finish(arrays=arrays)
    record.unlink()  # As it says.
    artifact.finish(arrays=_write(artifact, _values()))
    np.testing.assert_array_equal(StoredArray(artifact, "label").read_all(), _values()["label"])


def test_foreign_files_among_shards_are_nothing(tmp_path):
    artifact = Artifact(tmp_path, "datastore/base/train", "datastore")
    artifact.begin({})
    _write(artifact, _values(), shards=2)
    folders = [artifact.path / name / "c" for name in SPECS]
    for folder in [*folders, artifact.path, artifact.path / "written", artifact.path / "key/c/0"]:
        for name in FOREIGN:
            (folder / name).write_bytes(b"x")
    assert ShardWriter(artifact.path, SPECS, ROWS).missing_shards() == [2, 3]
    artifact.finish(arrays=_write(artifact, _values()))
    for name, values in _values().items():
        np.testing.assert_array_equal(StoredArray(artifact, name).read_all(), values)


def test_names_of_foreign_files():
    assert all(is_foreign(name) for name in (".DS_Store", "._0", "Thumbs.db", ".nfs01", "a.json~"))
    ours = ("0", "zarr.json", "_METADATA", "manifest.ocdbt", "d", "datapoint_to_token.npy")
    assert not any(map(is_foreign, ours))


def test_an_appended_array_has_the_digests_of_its_file(tmp_path):
    appender = Appender(tmp_path / "a", np.uint16, 64, 16)
    appender.append(np.arange(100))
    again = Appender(tmp_path / "a", np.uint16, 64, 16, state=appender.state())
    again.append(np.arange(100, 200))
    again.close()
    store = open_array(tmp_path / "a")
    assert again.describe()["shards"] == [shard_digest(store, shard) for shard in range(4)]
    assert len(set(again.describe()["shards"])) == 4


def test_every_flipped_byte_of_a_small_file_is_noticed(tmp_path):
    file = tmp_path / "temperature.json"
    content = {"temperature": 1.057, "weight": 0.25, "rows": {"3": [1, None, "ü"]}, "nan": 1e-7}
    write_checked_json(file, content)
    assert read_checked_json(file) == content
    whole = file.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            file.write_bytes(damaged)
            try:
                assert read_checked_json(file) == content  # White space became another.
            except ArtifactError as error:
                assert str(file) in str(error)
    for cut in range(len(whole) - 2):
        file.write_bytes(whole[:cut])
        with pytest.raises(ArtifactError, match="temperature.json"):
            read_checked_json(file)
    file.unlink()
    with pytest.raises(ArtifactError, match="temperature.json: missing"):
        read_checked_json(file)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', "{}", '{"checksum": null}', '{"a": 1}'])
def test_other_json_is_damage(tmp_path, text):
    file = tmp_path / "prepared-1.json"
    file.write_text(text)
    with pytest.raises(ArtifactError, match="prepared-1.json: damaged"):
        read_checked_json(file)


class _Tokenizer:
    vocab_size, separator_id, separator = 300, 0, "<s>"


def test_every_flipped_byte_of_the_progress_of_tokenize_is_noticed(tmp_path):
    TokenWriter(tmp_path, _Tokenizer()).save()
    file = tmp_path / PROGRESS_FILE
    whole = file.read_bytes()
    assert _read_progress(file) is not None
    for place in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        file.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=f"{PROGRESS_FILE}: damaged"):
            _read_progress(file)


def test_the_digest_does_not_depend_on_how_it_is_read(tmp_path, monkeypatch):
    store = open_array(_made(tmp_path).path / "key")
    found = [shard_digest(store, shard) for shard in range(4)]
    monkeypatch.setattr(digests, "_WHOLE_BYTES", 0)
    assert [shard_digest(store, shard) for shard in range(4)] == found
