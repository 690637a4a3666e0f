"""The whole pipeline on eight simulated devices, of one process or several, against one."""

import json
from pathlib import Path

import numpy as np
import pytest

from mlpmem_jax.config.load import load_config
from mlpmem_jax.datastore.layout import Layout
from mlpmem_jax.datastore.store import open_array, read_rows

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny.yaml"


def _read(artifact, name):
    store = open_array(artifact.path / name)
    return read_rows(store, 0, store.shape[0])


def _losses(layout, name):
    file = layout.workdir / "results" / "metrics" / name / "metrics.jsonl"
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return np.array([r["loss"] for r in records if "loss" in r])


@pytest.mark.multidevice
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    ("processes", "devices", "engine"),
    [
        (2, 4, "exact"),
        pytest.param(1, 8, "exact", marks=pytest.mark.slow),
        pytest.param(4, 2, "exact", marks=pytest.mark.slow),
        pytest.param(2, 4, "scann", marks=pytest.mark.slow),
    ],
)
def test_a_run_on_eight_devices_equals_one_on_one(
    tiny_run, on_processes, tmp_path, processes, devices, engine
):
    if engine == "scann":
        pytest.importorskip("scann")
    # 384 padded entries of the vocabulary (300 real ones) over tensor=2.
    changed = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    # Several index shards, so that each process builds some.
    changed += (f"retrieval.engine={engine}", "retrieval.shard_rows=20000")
    workdir = str(tmp_path / "run")
    files = ["--config", str(TINY), "--workdir", workdir]
    done = on_processes(processes, devices, "-m", "mlpmem_jax", "run", *files, *changed)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.count("datastore/base/train: made in") == 1  # process 0 alone speaks
    _check_same(tiny_run, load_config(TINY, changed, {"workdir": workdir}))
    if engine == "exact":
        return
    prompted = ["generate", *files, *changed, "--prompt", "def f("]
    done = on_processes(processes, devices, "-m", "mlpmem_jax", *prompted)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.count("def f(") == 1


def _check_same(tiny_run, other):
    """Compares all that a run makes, to the rounding of other shardings."""
    one, eight = Layout(tiny_run), Layout(other)
    for name in ("decoder-base", "memory-base"):
        np.testing.assert_allclose(_losses(eight, name), _losses(one, name), rtol=2e-4)
    for name, atol in (("key", 5e-3), ("input", 5e-3), ("logprob", 2e-3)):
        a, b = _read(eight.datastore("train"), name), _read(one.datastore("train"), name)
        np.testing.assert_allclose(a.astype(np.float32), b.astype(np.float32), atol=atol)
    np.testing.assert_array_equal(
        _read(eight.datastore("test"), "label"), _read(one.datastore("test"), "label")
    )
    # Keys agree to rounding, so neighbours at nearly equal distances may change places.
    a, b = (_read(each.neighbors("test"), "distance") for each in (eight, one))
    np.testing.assert_allclose(a, b, rtol=2e-2, atol=2e-2)
    a, b = (_read(each.neighbors("test"), "row") for each in (eight, one))
    shared = np.mean([len(np.intersect1d(x, y)) / len(x) for x, y in zip(a, b, strict=True)])
    assert shared > 0.97
    a, b = (_read(each.targets("train"), "mass") for each in (eight, one))
    assert np.mean(np.abs(a - b) < 1e-2) > 0.95
    a, b = (
        json.loads((each.results.path / "evaluate.json").read_text())["systems"]
        for each in (eight, one)
    )
    for system in ("decoder", "knn", "memory"):
        assert a[system]["test_nats"] == pytest.approx(b[system]["test_nats"], abs=3e-3)
