"""Everything in a bucket, which a server of the tests keeps (bucket_server.py)."""

import json
import re
import shutil
from pathlib import Path

import fsspec
import numpy as np
import pytest
from etils import epath

from mlpmem_jax.__main__ import main
from mlpmem_jax.config.data import RetrievalConfig
from mlpmem_jax.config.load import load_config
from mlpmem_jax.errors import ArtifactError, UserError
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.resolve import resolved
from mlpmem_jax.retrieval import approximate, index_files
from mlpmem_jax.retrieval.approximate import ApproximateEngine, SearchSettings
from mlpmem_jax.store import replacement
from mlpmem_jax.store.appender import Appender
from mlpmem_jax.store.array_specs import SPLITS, ArraySpec, datastore_arrays
from mlpmem_jax.store.arrays import (
    array_path,
    create_array,
    finished_shards,
    open_array,
    read_rows,
    write_rows,
)
from mlpmem_jax.store.files import check_reachable
from mlpmem_jax.store.manifest import Artifact, Status
from mlpmem_jax.store.shards import ShardWriter
from mlpmem_jax.training.checkpoint import Checkpoints
from tests.pipeline.bucket_server import Objects, assert_same

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny.yaml"
# Two whole runs, here and in a bucket, are made before the first test that compares them.
pytestmark = pytest.mark.timeout(1800)


# Arrays.


def _array(path, rows=2500):
    store = create_array(path, shape=(rows, 3), dtype=np.float32, shard_rows=1024, chunk_rows=256)
    values = np.arange(rows * 3, dtype=np.float32).reshape(rows, 3)
    for start in range(0, rows, 1024):
        write_rows(store, start, values[start : start + 1024]).result()
    return values


@pytest.mark.parametrize("folder", ["run", "50%20 off/a?b#c/ü"])
def test_an_array_is_read_as_it_was_written(bucket, folder):
    path = f"{bucket}/{folder}/array"
    values = _array(path)
    store = open_array(path)
    np.testing.assert_array_equal(read_rows(store, 999, 2500), values[999:])
    assert finished_shards(store) == {0, 1, 2}
    assert array_path(store) == path
    assert (epath.Path(path) / "zarr.json").exists()  # Both libraries mean the same object.


def test_damaged_and_missing_shards_are_named(bucket, objects):
    path = f"{bucket}/run/array"
    _array(path)
    objects.damage(f"{path}/c/1/0")
    with pytest.raises(ArtifactError, match=f"^{path}: damaged.*{path}/c/1/0"):
        read_rows(open_array(path), 0, 2500)
    (epath.Path(path) / "c" / "1" / "0").unlink()
    with pytest.raises(ArtifactError, match=f"^{path}: a part is missing.*{path}/c/1/0"):
        read_rows(open_array(path), 0, 2500)
    with pytest.raises(ArtifactError, match=f"^{bucket}/none: a part is missing"):
        open_array(f"{bucket}/none")


def test_a_writer_of_shards_goes_on_and_writes_none_twice(bucket, objects):
    path = epath.Path(f"{bucket}/run/datastore")
    specs = {"key": ArraySpec((2,), np.float16, 100, 20), "label": ArraySpec((), np.int32, 100, 20)}
    rows = {"key": np.random.rand(250, 2).astype(np.float16), "label": np.arange(250, dtype="i4")}

    def put(writer, part):
        writer.put(part.start, {name: array[part] for name, array in rows.items()})

    first = ShardWriter(path, specs, 250)
    put(first, slice(0, 100))
    put(first, slice(100, 200))
    first.flush()
    (path / "label" / "c" / "1").unlink()  # Killed between the two.
    objects.written.clear()
    again = ShardWriter(path, specs, 250)
    assert again.missing_shards() == [1, 2]
    for part in again.own_rows():
        put(again, part)
    arrays = again.close()
    assert not [name for name in objects.written if re.search(r"/c/0", name)]
    for name in specs:
        np.testing.assert_array_equal(read_rows(open_array(path / name), 0, 250), rows[name])
    chunking = {"shard_rows": 100, "chunk_rows": 20}
    assert arrays["key"] == {"shape": [250, 2], "dtype": "float16", **chunking}


def test_an_appender_goes_on_and_a_fresh_one_forgets(bucket):
    path = f"{bucket}/run/tokens"
    first = Appender(path, np.uint16, 64, 16)
    first.append(np.arange(100))
    state = first.state()
    first.append(np.arange(100, 300))  # Killed here; it is appended again.
    again = Appender(path, np.uint16, 64, 16, state=state)
    again.append(np.arange(100, 200))
    assert again.close() == 200
    np.testing.assert_array_equal(read_rows(open_array(path), 0, 200), np.arange(200))
    fresh = Appender(path, np.uint16, 64, 16)
    fresh.append(np.arange(7))
    assert fresh.close() == 7
    assert finished_shards(open_array(path)) == {0}


# Artifacts.


def test_the_life_of_an_artifact(bucket, objects):
    artifact = Artifact(f"{bucket}/run", "tokens", "tokens", recipe={"a": 1})
    origin = {"tokenizer": "1234"}
    assert artifact.status(origin) is Status.MISSING
    artifact.begin(origin)
    assert artifact.status({}) is Status.MISSING  # It holds nothing yet.
    (artifact.path / "train" / "token" / "c" / "0").write_bytes(b"content")
    assert artifact.status(origin) is Status.PARTIAL
    manifest = artifact.finish(files=["train/token/c/0"])
    assert artifact.status(origin) is Status.COMPLETE
    assert artifact.verify() == manifest
    assert not (artifact.path / "building.json").exists()
    with pytest.raises(ArtifactError, match=f"^{artifact.path}: tokens is stale"):
        artifact.status({"tokenizer": "5678"})
    part = f"{artifact.path}/train/token/c/0"
    objects.damage(part)
    with pytest.raises(ArtifactError, match=f"^{part}: damaged, checksum"):
        artifact.verify()
    objects.damage(f"{artifact.path}/manifest.json")
    with pytest.raises(ArtifactError, match=f"^{artifact.path}/manifest.json: damaged"):
        artifact.load()
    artifact.remove()
    assert not objects.below(bucket.removeprefix("gs://"))
    artifact.remove()  # Nothing is there: no error.


def test_a_removal_that_was_killed_is_finished_by_the_next_start(bucket, objects, monkeypatch):
    """Buckets cannot rename: what is left says that it is being removed until nothing is left."""
    artifact = Artifact(f"{bucket}/run", "tokens", "tokens")
    artifact.begin({})
    (artifact.path / "train" / "token" / "c" / "0").write_bytes(b"old")
    artifact.finish()

    def killed(path):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(replacement, "finish_removal", killed)
        replacement.set_aside(artifact)
    assert not artifact.is_complete() and replacement.replaced(artifact) is None
    assert artifact.status({}) is Status.MISSING  # Of what is left, nothing is used.
    artifact.begin({})
    (left,) = objects.below(bucket.removeprefix("gs://"))
    assert left.endswith("run/tokens/building.json")


def test_objects_of_somebody_else_are_not_removed(bucket, objects):
    artifact = Artifact(f"{bucket}/run", "tokens", "tokens")
    (artifact.path / "mine").write_bytes(b"mine")
    with pytest.raises(ArtifactError, match="run/tokens/mine: not written by this program"):
        artifact.begin({})
    (artifact.path / "mine").unlink()
    artifact.begin({})
    artifact.finish()
    (artifact.path / "train" / "token" / "mine").write_bytes(b"mine")
    with pytest.raises(ArtifactError, match="tokens/train/token/mine: not written"):
        replacement.set_aside(artifact)
    assert artifact.is_complete() and len(objects.below(bucket.removeprefix("gs://"))) == 2


@pytest.mark.parametrize(
    ("error", "why"),
    [(FileNotFoundError("b/a"), "there is no such bucket"), (OSError("403\nyou"), "403")],
)
def test_a_bucket_that_takes_nothing_is_named(bucket, monkeypatch, error, why):
    def fail(*_):
        raise error

    monkeypatch.setattr(Objects, "put", fail)
    artifact = Artifact(f"{bucket}/run", "tokens", "tokens")
    with pytest.raises(UserError, match=rf"^{artifact.path}/building.json: .*written \({why}\)$"):
        artifact.begin({})


# ScaNN.


class Keys:
    """Random keys in memory."""

    num_rows, width, dtype = 3000, 8, np.dtype(np.float32)
    values = np.random.default_rng(0).normal(size=(3000, 8)).astype(np.float32)

    def read(self, start, stop):
        return self.values[start:stop]


RETRIEVAL = RetrievalConfig(num_neighbors=10, shard_rows=1500)


@pytest.fixture
def index(bucket):
    """An index of two shards in a bucket."""
    pytest.importorskip("scann")
    path = epath.Path(f"{bucket}/run/index")
    list(approximate.build_shards(Keys(), path, RETRIEVAL))
    return path


@pytest.fixture
def staging(tmp_path, monkeypatch):
    """Where temporary files lie; it is empty in the end."""
    folder = tmp_path / "staging"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())


def test_an_index_in_a_bucket_finds_what_a_local_one_finds(index, staging, tmp_path):
    list(approximate.build_shards(Keys(), epath.Path(tmp_path / "index"), RETRIEVAL))
    names = index_files.shard_files(index, 2)
    assert names == index_files.shard_files(epath.Path(tmp_path / "index"), 2)
    for name in names:
        assert (index / name).read_bytes() == (tmp_path / "index" / name).read_bytes(), name
    settings = SearchSettings(num_leaves_to_search=10, num_reorder=40)
    remote = ApproximateEngine(index, settings)
    local = ApproximateEngine(epath.Path(tmp_path / "index"), settings)
    assert remote.num_rows == local.num_rows == 3000
    queries = Keys.values[::7]
    found, expected = remote.search(queries, 11), local.search(queries, 11)
    np.testing.assert_array_equal(found.row_QK, expected.row_QK)
    np.testing.assert_array_equal(found.distance_QK, expected.distance_QK)
    every = slice(0, 3000)
    np.testing.assert_array_equal(remote.visiting_order(every), local.visiting_order(every))


@pytest.mark.parametrize("name", ["dataset.npy", "datapoint_to_token.npy", "scann_config.pb"])
def test_a_damaged_copy_of_an_index_file_is_named(index, objects, staging, name):
    """Whether it was damaged in the bucket or on the way here: the copy is what is compared."""
    objects.damage(f"{index}/shard-00001/{name}")
    with pytest.raises(ArtifactError, match=f"^{index}/shard-00001/{name}: damaged, checksum"):
        ApproximateEngine(index, SearchSettings(10, 40))


def test_a_missing_index_file_is_named(index, staging):
    (index / "shard-00000" / "dataset.npy").unlink()
    with pytest.raises(ArtifactError, match=f"^{index}/shard-00000/dataset.npy: missing"):
        ApproximateEngine(index, SearchSettings(10, 40))


def test_a_shard_whose_upload_was_interrupted_is_built_again(bucket, objects, staging, monkeypatch):
    pytest.importorskip("scann")
    path = epath.Path(f"{bucket}/run/index")
    put = objects.put

    def interrupted(name, data):
        if name.endswith("shard-00001/dataset.npy"):
            raise OSError("connection reset by peer")
        put(name, data)

    with monkeypatch.context() as patch:
        patch.setattr(objects, "put", interrupted)
        with pytest.raises(OSError, match="connection reset"):
            list(approximate.build_shards(Keys(), path, RETRIEVAL))
    objects.written.clear()
    list(approximate.build_shards(Keys(), path, RETRIEVAL))
    assert all("shard-00001" in name for name in objects.written)
    assert ApproximateEngine(path, SearchSettings(10, 40)).num_rows == 3000


# The whole pipeline.


@pytest.fixture(scope="module")
def remote_run(objects, tiny_run):
    """A run of configs/tiny.yaml in a bucket, killed while it pretrains and started again."""
    workdir = "gs://whole/run"
    flags = ["--config", str(TINY), "--workdir", workdir]
    save = Checkpoints.save

    def killed(self, step, items):
        if step == 8:
            self.wait()  # Of the checkpoint before, which is on its way.
            raise RuntimeError("killed")
        save(self, step, items)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoints, "save", killed)
        with pytest.raises(RuntimeError, match="killed"):
            main(["run", *flags])
    assert main(["run", *flags]) == 0
    return resolved(load_config(TINY, (), {"workdir": workdir}))


@pytest.mark.slow
def test_the_whole_pipeline_makes_what_it_makes_here(remote_run, tiny_run):
    there, here = Artifacts(remote_run), Artifacts(tiny_run)
    arrays = datastore_arrays(tiny_run.datastore, tiny_run.decoder.width)
    for split in SPLITS:
        assert_same(here.tokens.path / split, there.tokens.path / split, ["token"])
        assert_same(here.datastore(split).path, there.datastore(split).path, arrays)
    for split in ("train", "valid"):
        names = ["id", "prob", "mass", "label"]
        assert_same(here.targets(split).path, there.targets(split).path, names)
    scores = [json.loads((one.results.path / "evaluate.json").read_text()) for one in (here, there)]
    assert scores[0]["systems"] == scores[1]["systems"]
    for artifact in (there.tokenizer, there.decoder, there.index, there.memory, there.results):
        artifact.verify()
    metrics = here.decoder.relative.replace("/", "-")
    logged = [_steps(one.workdir / "results" / "metrics" / metrics) for one in (here, there)]
    assert logged[0] == logged[1]  # Steps that were repeated are there once.


def _steps(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


@pytest.mark.slow
def test_a_finished_run_is_not_made_again(remote_run, objects, capsys):
    objects.written.clear()
    flags = ["--config", str(TINY), "--workdir", remote_run.workdir]
    assert main(["run", *flags]) == 0
    assert f"{Artifacts(remote_run).decoder.title}: complete" in capsys.readouterr().out
    assert not objects.written


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named(remote_run, objects, capsys):
    decoder = Artifacts(remote_run).decoder
    largest = max(decoder.load().files, key=lambda name: (decoder.path / name).stat().length)
    kept = (decoder.path / largest).read_bytes()
    objects.damage(f"{decoder.path}/{largest}")
    flags = ["--config", str(TINY), "--workdir", remote_run.workdir]
    assert main(["generate", *flags]) == 2
    (decoder.path / largest).write_bytes(kept)
    assert f"{decoder.path}/{largest}: damaged" in capsys.readouterr().err


@pytest.mark.slow
def test_targets_of_a_teacher_in_a_bucket(remote_run, tiny_run, tmp_path):
    shutil.copytree(tiny_run.workdir, tmp_path / "run")
    flags = ["--config", str(TINY), "--workdir", f"{tmp_path}/run"]
    before = Artifacts(tiny_run).memory.relative
    taught = [f"targets.workdir={remote_run.workdir}", "train.alpha=0.3"]
    assert main(["train", *flags, *taught]) == 0
    config = resolved(load_config(TINY, taught, {"workdir": f"{tmp_path}/run"}))
    memory, targets = Artifacts(config).memory, Artifacts(config).targets("train")
    assert memory.relative != before and memory.path.is_relative_to(tmp_path / "run")
    assert str(targets.path).startswith(remote_run.workdir)
    assert memory.load().made_from[targets.relative] == targets.load().fingerprint


def test_listings_are_not_remembered(bucket):
    """TensorStore and other processes write past the drivers, which would not notice."""
    check_reachable({"workdir": f"{bucket}/run"})
    for protocol in ("gcs", "gs", "s3"):
        assert fsspec.config.conf[protocol]["use_listings_cache"] is False
