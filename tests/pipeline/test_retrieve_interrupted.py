"""`index` and `retrieve` killed on the way: the next start continues, bit for bit."""

import numpy as np
import pytest

from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.pipeline import index
from mlpmem_jax.pipeline.stage import run_stages
from mlpmem_jax.retrieval import approximate
from mlpmem_jax.store.shards import ShardWriter
from tests.pipeline.searching import read_array, run_maker, search


@pytest.fixture
def make_run(make_config):
    return run_maker(make_config)


class _Killed(BaseException):
    pass


@pytest.mark.parametrize(("engine", "share"), [("exact", 1), ("scann", 1), ("exact", 0.4)])
def test_a_killed_search_continues_bit_for_bit(make_run, monkeypatch, tmp_path, engine, share):
    if engine == "scann":
        pytest.importorskip("scann")
    overrides = (
        f"retrieval.engine={engine}", "retrieval.query_batch=500", "retrieval.shard_rows=1600",
        f"targets.share={share}", "targets.share_by=row",
    )  # fmt: skip
    whole = search(make_run(*overrides, workdir=tmp_path / "whole"))
    run = make_run(*overrides)
    write, count = ShardWriter.put, 0

    def killed(self, rows, arrays):
        nonlocal count
        count += 1
        if count in (2, 5):
            raise _Killed
        write(self, rows, arrays)

    monkeypatch.setattr(ShardWriter, "put", killed)
    for _ in range(2):
        with pytest.raises(_Killed):
            search(run)
    layout = search(run)
    for artifact, names in (
        ("neighbors", ("row", "distance")),
        ("targets", ("id", "prob", "mass")),
    ):
        for name in names:
            ours, other = (getattr(one, artifact)("valid") for one in (layout, whole))
            np.testing.assert_array_equal(read_array(ours, name), read_array(other, name))
    for name in ("id", "prob", "mass", "label"):
        np.testing.assert_array_equal(
            read_array(layout.targets("train"), name), read_array(whole.targets("train"), name)
        )
    assert layout.targets("valid").load().fingerprint == whole.targets("valid").load().fingerprint


def test_a_killed_index_build_continues(make_run, monkeypatch):
    pytest.importorskip("scann")
    run = make_run("retrieval.engine=scann", "retrieval.shard_rows=1600")
    check, count = approximate._check_written, 0

    def killed(path, files, rows):
        nonlocal count
        count += 1
        if count == 2:
            raise _Killed
        check(path, files, rows)

    monkeypatch.setattr(approximate, "_check_written", killed)
    with pytest.raises(_Killed):
        run_stages(index.stages(run))
    run_stages(index.stages(run))
    assert count == 3  # The first shard was not built again.
    assert sorted(p.name for p in run.index.path.glob("shard-*")) == [
        "shard-00000", "shard-00001",
    ]  # fmt: skip


def test_a_damaged_shard_of_an_interrupted_index_is_built_again(make_run, monkeypatch, capsys):
    """Else the manifest would record the damaged file as the right one."""
    pytest.importorskip("scann")
    run = make_run("retrieval.engine=scann", "retrieval.shard_rows=1600")
    with monkeypatch.context() as patch, pytest.raises(_Killed):
        patch.setattr("mlpmem_jax.retrieval.index_builder.choose_settings", _kill)
        run_stages(index.stages(run))
    shard = run.index.path / "shard-00001"
    for name in ("dataset.npy", "shard.json"):
        whole = (shard / name).read_bytes()
        (shard / name).write_bytes(whole.replace(whole[-40:-20], whole[-20:]))
        with monkeypatch.context() as patch, pytest.raises(_Killed):
            patch.setattr("mlpmem_jax.retrieval.index_builder.choose_settings", _kill)
            run_stages(index.stages(run))
        assert f"{shard / name}: damaged" in capsys.readouterr().err
        assert (shard / name).read_bytes() == whole
    run_stages(index.stages(run))
    assert not capsys.readouterr().err


def _kill(*_, **__):
    raise _Killed


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace('"temperature": ', '"temperature": 4'),
        lambda text: text.replace("temperature", "temperatur"),
        lambda text: text[:-9],
    ],
    ids=["another value", "another key", "cut"],
)
def test_a_changed_temperature_of_an_interrupted_start_is_named(make_run, monkeypatch, edit):
    run = make_run("retrieval.engine=exact")
    put = ShardWriter.put
    monkeypatch.setattr(
        ShardWriter, "put", lambda self, *rows: _kill() if "prob" in rows[1] else put(self, *rows)
    )
    with pytest.raises(_Killed):
        search(run)
    monkeypatch.undo()
    file = run.targets("train").path / "temperature.json"
    text = file.read_text()
    file.write_text(edit(text))
    with pytest.raises(ArtifactError, match=f"{file}: damaged"):
        search(run)
    file.unlink()  # Then it is chosen again, and is the same.
    search(run)
    assert file.read_text() == text
