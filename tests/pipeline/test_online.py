"""Stored inputs and inputs of a decoder that runs in the step give the same loss."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from mlpmem_jax.__main__ import main
from mlpmem_jax.config.load import load_config
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.networks import finished_decoder
from mlpmem_jax.pipeline.resolve import resolved
from mlpmem_jax.pipeline.tasks import memory_task
from mlpmem_jax.store import stored_array
from mlpmem_jax.store.arrays import open_array, write_rows
from mlpmem_jax.training.optimizer import make_optimizer
from mlpmem_jax.training.state import Blueprint
from mlpmem_jax.training.step import make_train_step

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny.yaml"
# Embedding windows that are training windows, and no rounding in storage.
SAME_WINDOWS = (
    "datastore.dtype=float32",
    "datastore.window_tokens=32",
    "datastore.stride_tokens=32",
    "train.window_tokens=32",
)


@pytest.fixture(scope="module")
def workdir(tiny_run, tmp_path_factory):
    path = tmp_path_factory.mktemp("online") / "run"
    for part in ("tokenizer", "tokens", "decoder"):
        shutil.copytree(f"{tiny_run.workdir}/artifacts/{part}", path / "artifacts" / part)
    for command in ("embed", "index", "retrieve"):
        arguments = [command, "--config", str(TINY), "--workdir", str(path)]
        assert main([*arguments, *SAME_WINDOWS]) == 0
    return str(path)


def _losses(workdir, inputs, *keys, steps=4):
    # Windows of tokens are not mixed, so neither are those of rows here.
    keys = (*SAME_WINDOWS, "train.mix_windows=1", f"train.inputs={inputs}", *keys)
    config = resolved(load_config(TINY, keys, {"workdir": workdir}))
    mesh = single_device_mesh()
    task = memory_task(Artifacts(config), mesh)
    optimizer = make_optimizer(config.train.optimizer, config.train.num_steps)
    blueprint = Blueprint(task.build, optimizer, config.seed, mesh)
    state = task.prepare(blueprint.create())
    step = make_train_step(task.loss, blueprint.graphdef, optimizer, config.train)
    losses = []
    with jax.set_mesh(mesh):
        for batch in task.feed(range(steps)):
            state, metrics = step(state, task.frozen, batch)
            losses.append({name: float(metrics[name]) for name in ("loss", "ce", "kl")})
        validation = task.validate(state)
    return losses, validation


@pytest.mark.parametrize(
    "keys",
    [
        ("memory.recent_tokens=0",),
        ("memory.recent_tokens=3", "memory.ngram_orders=[2,5]"),
        ("memory.recent_tokens=5", "memory.recent_table=own"),
    ],
    ids=["state", "recent", "own-table"],
)
def test_the_same_loss_stored_and_online(workdir, keys):
    stored, stored_validation = _losses(workdir, "stored", *keys)
    online, online_validation = _losses(workdir, "online", *keys)
    for a, b in zip(stored, online, strict=True):
        assert a == pytest.approx(b, rel=2e-5)
    assert stored_validation == pytest.approx(online_validation, rel=2e-4)


def test_the_head_can_start_as_the_decoders(tiny_run):
    keys = ("train.head_start=checkpoint",)
    config = resolved(load_config(TINY, keys, {"workdir": tiny_run.workdir}))
    run, mesh = Artifacts(config), single_device_mesh()
    task = memory_task(run, mesh)
    optimizer = make_optimizer(config.train.optimizer, config.train.num_steps)
    state = task.prepare(Blueprint(task.build, optimizer, config.seed, mesh).create())
    decoder = finished_decoder(run, mesh)
    np.testing.assert_array_equal(state.params["head"][...], decoder.head_VD())


@pytest.mark.parametrize("inputs", ["stored", "online"])
def test_targets_of_other_tokens_are_refused(workdir, tmp_path, monkeypatch, inputs):
    # Other labels under the same manifest: what compares shards with it is not asked here.
    monkeypatch.setattr(stored_array._Shards, "_compare", lambda *_: None)
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    config = resolved(load_config(TINY, SAME_WINDOWS, {"workdir": str(copy)}))
    array = Artifacts(config).targets("train").path / "label"
    labels = np.array(open_array(array)[:1024].read().result())
    shutil.rmtree(array / "c" / "0", ignore_errors=True)
    (array / "c" / "0").unlink(missing_ok=True)
    import tensorstore as ts

    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{array}/"}}
    write_rows(ts.open(spec, open=True).result(), 0, labels + 1).result()
    with pytest.raises(ArtifactError, match="labels differ at row"):
        _losses(str(copy), inputs, steps=10)
