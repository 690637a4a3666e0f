"""`index` and `retrieve` with keys that do not fit in memory, over a made-up datastore."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlpmem_jax.__main__ import main
from mlpmem_jax.pipeline import index, retrieve
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.resolve import resolved
from mlpmem_jax.pipeline.stage import run_stages
from mlpmem_jax.retrieval import estimates, running_lists
from mlpmem_jax.store.array_specs import SPLITS, datastore_arrays
from mlpmem_jax.store.arrays import open_array, read_rows
from mlpmem_jax.store.contents import RUNNING
from mlpmem_jax.store.files import read_json
from mlpmem_jax.store.shards import ShardWriter
from tests.conftest import ROOT

HERE = Path(__file__).resolve().parent
WIDTH, SEPARATOR = 32, 0
ROWS = {"train": 3000, "valid": 700, "test": 500}
# One of three key shards of 1,024 rows; one of four shards of the index, and all keys.
MEMORY = {"exact": 140_000, "scann": 1_300_000, "routed": 140_000}
SETTINGS = {
    "exact": ("retrieval.engine=exact", "retrieval.keep_train=all"),
    "scann": (
        "retrieval.engine=scann", "retrieval.shard_rows=800", "retrieval.num_leaves=30",
        "targets.min_recall=0.5",
    ),
    "routed": (
        "retrieval.engine=routed", "retrieval.shard_rows=800", "retrieval.cells=40",
        "retrieval.exact_rows=100", "targets.min_recall=0.6",
    ),
}  # fmt: skip
SHARED = (
    "datastore.shard_rows=1024", f"decoder.width={WIDTH}", "retrieval.num_neighbors=12",
    "retrieval.query_batch=300", "targets.num_tokens=6",
)  # fmt: skip


@pytest.fixture
def make_run(make_config):
    """Returns a maker of runs whose datastore is there."""

    def make(*overrides, workdir):
        run = Artifacts(resolved(make_config(*SHARED, *overrides, workdir=workdir)))
        for artifact in (run.tokens, run.decoder):
            artifact.begin({})
            counts = {"separator_id": SEPARATOR, "vocab_size": 300}
            artifact.finish(counts=counts | {f"{s}_tokens": ROWS[s] + 1 for s in SPLITS})
        origin = {one.relative: one.load().fingerprint for one in (run.tokens, run.decoder)}
        for seed, split in enumerate(SPLITS):
            _fill(run, split, np.random.default_rng(seed), origin)
        return run

    return make


def _fill(run, split, generator, origin):
    config, num_rows = run.config, ROWS[split]
    centres = np.random.default_rng(5).normal(size=(60, WIDTH))
    cluster = generator.integers(0, 60, num_rows)
    arrays = {
        "key": centres[cluster] + 0.3 * generator.normal(size=(num_rows, WIDTH)),
        "label": np.where(generator.random(num_rows) < 0.6, cluster + 1, 200),
        "logprob": np.full(num_rows, -np.log(300)),
    }
    artifact = run.datastore(split)
    artifact.begin(origin)
    specs = datastore_arrays(config.datastore, config.decoder.width)
    specs = {name: specs[name] for name in arrays}
    writer = ShardWriter(artifact.path, specs, num_rows)
    for rows in writer.own_rows():
        writer.put(rows.start, {name: values[rows] for name, values in arrays.items()})
    artifact.finish(counts={"rows": num_rows}, arrays=writer.close())


def _made(run):
    run_stages([*index.stages(run), *retrieve.stages(run)])
    return run


def _contents(run):
    """Returns what was found and made, and the fingerprints of it all."""
    kinds = {"neighbors": ("valid", "test"), "targets": ("train", "valid")}
    if run.config.retrieval.keep_train == "all":
        kinds["neighbors"] += ("train",)
    arrays, prints = {}, {"index": run.index.load().fingerprint}
    for kind, splits in kinds.items():
        for split in splits:
            artifact = getattr(run, kind)(split)
            assert not (artifact.path / RUNNING).exists()
            manifest = artifact.verify()
            prints[f"{kind}/{split}"] = manifest.fingerprint
            for name in manifest.arrays:
                store = open_array(artifact.path / name)
                arrays[f"{kind}/{split}/{name}"] = read_rows(store, 0, store.shape[0])
    return arrays, prints


def _assert_equal(run, whole):
    (found, prints), (expected, others) = _contents(run), _contents(whole)
    assert list(found) == list(expected)
    for name, values in found.items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)
    assert prints == others


@pytest.mark.parametrize("engine", ["exact", "scann", "routed"])
def test_everything_is_as_with_all_keys_in_memory(make_run, tmp_path, capsys, engine):
    """Neighbours, calibration, recall, τ and targets."""
    if engine == "scann":
        pytest.importorskip("scann")
    whole = _made(make_run(*SETTINGS[engine], workdir=tmp_path / "whole"))
    capsys.readouterr()
    memory = f"retrieval.memory_bytes={MEMORY[engine]}"
    run = _made(make_run(*SETTINGS[engine], memory, workdir=tmp_path / "parts"))
    said = capsys.readouterr().out
    _assert_equal(run, whole)
    shards = {"exact": 3, "scann": 4, "routed": 4}[engine]
    assert f"retrieve train: key shards 2 to 2 of {shards} loaded in" in said
    searched, other = (
        [one.neighbors("train") if engine == "exact" else one.targets("train")]
        for one in (run, whole)
    )
    about, before = (one[0].load().measured for one in (searched, other))
    assert about["recall"] == before["recall"]
    assert (about["key_shards"], about["key_shards_at_once"]) == (shards, 1)
    assert "key_shards" not in before
    calibrated = [one.index.load().measured.get("calibration_recall") for one in (run, whole)]
    assert calibrated[0] == calibrated[1]
    assert (calibrated[0] is not None) == (engine != "exact")


def _command(command, workdir, engine, memory_bytes):
    arguments = ["--config", str(ROOT / "configs" / "tiny.yaml"), "--workdir", str(workdir)]
    return [
        command, *arguments, *SHARED, *SETTINGS[engine],
        f"retrieval.memory_bytes={memory_bytes}",
    ]  # fmt: skip


def _retrieve(workdir, engine, *killed, command="retrieve"):
    arguments = _command(command, workdir, engine, MEMORY[engine])
    at = killed or ("mlpmem_jax.retrieval.running_lists.RunningLists.write", "0", "after")
    return subprocess.run(
        [sys.executable, str(HERE / "killed.py"), *at, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_killed_while_it_spills_it_continues_bit_for_bit(make_run, tmp_path):
    settings = SETTINGS["exact"]
    whole = _made(make_run(*settings, workdir=tmp_path / "whole"))
    run = make_run(*settings, workdir=tmp_path / "killed")
    run_stages(index.stages(run))
    module = "mlpmem_jax.retrieval.running_lists"
    kills = (
        (f"{module}.RunningLists.write", "2", "before"),
        (f"{module}.write_bytes", "4", "after"),  # In the second round of valid or later.
        (f"{module}.RunningLists.read", "5", "after"),
        (f"{module}.RunningLists.write", "12", "after"),
        ("mlpmem_jax.store.shards.ShardWriter.put", "6", "before"),
        ("mlpmem_jax.store.shards.ShardWriter.put", "4", "after"),
        (f"{module}.RunningLists._remove_folder", "1", "before"),
    )
    for kill in kills:
        done = _retrieve(tmp_path / "killed", "exact", *kill)
        assert done.returncode == -signal.SIGKILL, (kill, done.stderr[-2000:])
    last = _retrieve(tmp_path / "killed", "exact")
    assert last.returncode == 0, last.stderr[-4000:]
    _assert_equal(run, whole)


@pytest.fixture
def refused(capsys):
    """Returns a function that retrieves in parts, and the one line with which that ends."""

    def call(engine, workdir, *overrides):
        capsys.readouterr()
        settings = (*SHARED, *SETTINGS[engine], f"retrieval.memory_bytes={MEMORY[engine]}")
        arguments = ("retrieve", "--config", str(ROOT / "configs" / "tiny.yaml"))
        assert main([*arguments, "--workdir", str(workdir), *settings, *overrides]) == 2
        err = capsys.readouterr().err
        (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in err
        return line

    return call


@pytest.fixture
def indexed(make_run, tmp_path):
    """Returns a function that makes a run with an index."""

    def make(engine, workdir="run"):
        if engine == "scann":
            pytest.importorskip("scann")
        run = make_run(*SETTINGS[engine], workdir=tmp_path / workdir)
        run_stages(index.stages(run))
        return run

    return make


# Bytes for less than a key shard, and the key that lowers what it takes; enough for the exact
# search of valid and test. For cells see tests/unit/test_key_shards.py.
TOO_LITTLE = {
    "exact": (1000, "datastore.shard_rows=1024"),
    "scann": (140_000, "retrieval.shard_rows=800"),
}


@pytest.mark.parametrize("engine", MEMORY)
def test_no_room_is_one_line_before_anything_is_made(indexed, refused, monkeypatch, engine):
    """Memory for less than a key shard; a disk without room for running lists."""
    run = indexed(engine)
    if engine in TOO_LITTLE:
        memory, key = TOO_LITTLE[engine]
        line = refused(engine, run.workdir, f"retrieval.memory_bytes={memory}")
        assert f"retrieval.memory_bytes={memory} holds no key shard, which takes " in line
        assert f"lower {key}" in line
    assert not run.neighbors("valid").path.exists()
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 50_000))
        assert "and 48.8 KiB are free" in refused(engine, run.workdir)
    assert not run.neighbors("valid").path.exists()

    def full(path, data):
        raise OSError(errno.ENOSPC, "full", str(path))

    monkeypatch.setattr(running_lists, "write_bytes", full)
    line = refused(engine, run.workdir)
    assert "no space left on the disk" in line and ".lists" in line
    monkeypatch.undo()
    run_stages(retrieve.stages(run))  # It goes on.


@pytest.mark.parametrize("engine", MEMORY)
def test_damaged_key_shards_are_named(indexed, refused, monkeypatch, engine):
    """Missing, cut, flipped, exchanged with another."""
    monkeypatch.setattr(estimates, "_RUN_BYTES", 60_000)  # Cells in several shards.
    run = indexed(engine)
    folder = run.datastore("train").path if engine == "exact" else run.index.path
    one, other = {
        "exact": ("key/c/1/0", "key/c/0/0"),
        "scann": ("shard-00001/dataset.npy", "shard-00000/dataset.npy"),
        "routed": ("key/c/1/0", "key/c/0/0"),
    }[engine]
    file = Path(folder) / one
    whole = file.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 1
    exchanged = (Path(folder) / other).read_bytes()
    for damaged in (None, whole[: len(whole) // 2], bytes(flipped), exchanged):
        file.unlink() if damaged is None else file.write_bytes(damaged)
        line = refused(engine, run.workdir)
        assert one.split("/c/")[0] in line and str(folder) in line, line
    file.write_bytes(whole)
    run_stages(retrieve.stages(run))


@pytest.mark.parametrize("engine", MEMORY)
def test_an_index_of_another_datastore_is_refused(indexed, refused, engine):
    run, other = indexed(engine), indexed(engine, "other")
    train = other.datastore("train")
    origin = train.load().made_from
    shutil.rmtree(train.path)
    _fill(other, "train", np.random.default_rng(9), origin)
    shutil.rmtree(other.index.path)
    run_stages(index.stages(other))
    shutil.rmtree(run.index.path)
    shutil.copytree(other.index.path, run.index.path)
    line = refused(engine, run.workdir)
    assert f"{run.index.path}: index is stale, built from another datastore/" in line, line
    assert "`index --rebuild`" in line, line


def test_the_plan_shows_key_shards_and_what_lies_on_disk_for_a_time(make_run, tmp_path, capsys):
    make_run(*SETTINGS["exact"], workdir=tmp_path / "run")
    capsys.readouterr()
    command = _command("retrieve", tmp_path / "run", "exact", MEMORY["exact"])
    assert main([*command, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    (valid,) = [part for part in shown.split("neighbors/") if part.startswith("valid")]
    shown = [line.split() for line in valid.splitlines()]
    assert ["key", "shards", "3"] in shown
    assert ["key", "shards", "in", "memory", "at", "a", "time", "1"] in shown
    assert ["bytes", "on", "disk", "for", "a", "time", "98.4", "KiB"] in shown  # 700 · 12 · 12


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_routed_search_killed_anywhere_continues_bit_for_bit(make_run, tmp_path):
    """In the index: k-means, the second run, the cells; in the search: a spilled list."""
    whole = _made(make_run(*SETTINGS["routed"], workdir=tmp_path / "whole"))
    run = make_run(*SETTINGS["routed"], workdir=tmp_path / "killed")
    made = "mlpmem_jax.retrieval.routed_index"
    kills = (
        ("index", "mlpmem_jax.retrieval.index_files.write_whole", "1", "before"),
        ("index", f"{made}._write_runs", "1", "after"),
        ("index", "mlpmem_jax.store.shards.ShardWriter.put", "1", "before"),
        ("index", f"{made}._remove_intermediate", "1", "before"),
        ("index", f"{made}._remove_intermediate", "0", "after"),  # It lives.
        ("retrieve", "mlpmem_jax.retrieval.running_lists.RunningLists.write", "13", "after"),
        ("retrieve", "mlpmem_jax.retrieval.running_lists.RunningLists.write", "0", "after"),
    )
    for command, *kill in kills:
        done = _retrieve(tmp_path / "killed", "routed", *kill, command=command)
        expected = 0 if "0" in kill else -signal.SIGKILL
        assert done.returncode == expected, (kill, done.stderr[-2000:])
    _assert_equal(run, whole)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_whole_run_in_parts_and_what_cannot_be_timed(tmp_path):
    command = [sys.executable, "-m", "mlpmem_jax", "run"]
    arguments = ["--config", str(ROOT / "configs" / "tiny.yaml"), "--workdir", str(tmp_path)]
    done = subprocess.run(
        [*command, *arguments, "retrieval.memory_bytes=1_000_000"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert "evaluate: the kNN-LM is not timed: memory holds 7 of" in done.stdout
    (measured,) = tmp_path.glob("results/evaluate-*/measured.json")
    assert sorted(read_json(measured)["latency_ms"]) == ["decoder", "memory"]
