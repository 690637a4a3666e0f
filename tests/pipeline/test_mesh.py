"""The whole pipeline on eight simulated devices, of one process or several, against one."""

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from mlpmem_jax.config.load import load_config
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.resolve import resolved
from mlpmem_jax.store.arrays import open_array, read_rows
from mlpmem_jax.store.run_record import ARTIFACTS
from tests.pipeline.roles import metrics_file, place_of

HERE = Path(__file__).resolve().parent
TINY = HERE.parents[1] / "configs" / "tiny.yaml"


def _read(artifact, name):
    store = open_array(artifact.path / name)
    return read_rows(store, 0, store.shape[0])


def _losses(run, *artifacts):
    lines = [metrics_file(run, one).read_text().splitlines() for one in artifacts]
    records = [json.loads(line) for line in itertools.chain(*lines)]
    return np.array([r["loss"] for r in records if "loss" in r])


def _run(changes, workdir):
    """Returns the artifacts of a changed configuration in a work directory."""
    return Artifacts(resolved(load_config(TINY, changes, {"workdir": str(workdir)})))


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
    tiny_run, run_sh, tmp_path, processes, devices, engine
):
    if engine == "scann":
        pytest.importorskip("scann")
    # 384 padded entries of the vocabulary (300 real ones) over tensor=2.
    changed = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    # Several index shards, so that each process builds some.
    changed += (f"retrieval.engine={engine}", "retrieval.shard_rows=20000")
    if engine == "scann":  # States of an untrained network are hard to search: all leaves.
        thorough = ("num_leaves=64", "num_leaves_to_search=64", "num_reorder=2000")
        changed += tuple(f"retrieval.{setting}" for setting in thorough)
    workdir = str(tmp_path / "run")
    files = ["--config", str(TINY), "--workdir", workdir]
    logs = tmp_path / "logs"
    started = ["--processes", str(processes), "--devices-per-process", str(devices)]
    if processes > 1:
        started += ["--logs", str(logs)]
    done = run_sh(*started, "run", *files, *changed)
    assert done.returncode == 0, done.stderr[-6000:]
    run = _run(changed, workdir)
    for artifact in (run.tokens, run.datastore("train"), run.memory, run.results):
        assert done.stdout.count(f"{artifact.title}: made in") == 1
    # Process 0 alone speaks; the others keep files.
    written = sorted(logs.glob("*")) if processes > 1 else []
    assert [log.name for log in written] == [f"process-{k}.log" for k in range(1, processes)]
    assert not any("made in" in log.read_text() for log in written)
    _check_same(Artifacts(tiny_run), run)
    if engine == "exact":
        return
    prompted = ["generate", *files, *changed, "--prompt", "def f("]
    done = run_sh(*started, *prompted)
    assert done.returncode == 0, done.stderr[-6000:]
    assert done.stdout.count("def f(") == 1


def _check_same(one, eight):
    """Compares all that a run makes, to the rounding of other shardings."""
    assert eight.tokens.load().fingerprint == one.tokens.load().fingerprint
    for role in ("decoder", "memory"):
        a, b = (_losses(each, getattr(each, role)) for each in (eight, one))
        np.testing.assert_allclose(a, b, rtol=2e-4)
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


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "changes",
    [
        ("train.inputs=online",),
        ("memory.gate=fitted",),
        (
            "train.mode=joint",
            "memory.gate=learned",
            "train.decoder_freeze_steps=3",
            "train.decoder_optimizer.warmup_steps=2",
        ),
        (
            "train.mode=joint",
            "train.refresh_interval_steps=5",
            "train.decoder_optimizer.warmup_steps=2",
        ),
    ],
)
def test_training_that_runs_the_decoder_on_two_processes(tiny_run, on_processes, tmp_path, changes):
    """The steps in which both networks run, against one device; also a λ learned or fitted."""
    mesh = ("mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    runs, texts = [], []
    for place, shape in enumerate((None, mesh)):
        workdir = str(shutil.copytree(tiny_run.workdir, tmp_path / f"run-{place}"))
        words = ["--config", str(TINY), "--workdir", workdir, *changes, *(shape or ())]
        for command in ("train", "evaluate", "generate"):
            more = ["--prompt", "def f(", "generate.sampling=greedy"]
            command = [command, *words, *(more if command == "generate" else [])]
            done = on_processes(*((2, 4) if shape else (1, 1)), "-m", "mlpmem_jax", *command)
            assert done.returncode == 0, done.stderr[-6000:]
        texts.append(done.stdout)
        runs.append(_run(changes, workdir))
    is_joint = "train.mode=joint" in changes
    one, several = (_losses(run, *(run.joint_phases if is_joint else [run.memory])) for run in runs)
    np.testing.assert_allclose(several, one, rtol=2e-4)
    results = [json.loads((each.results.path / "evaluate.json").read_text()) for each in runs]
    for system in results[0]["systems"]:
        nats = [each["systems"][system]["test_nats"] for each in results]
        assert nats[0] == pytest.approx(nats[1], abs=3e-3)
    # Greedy text is the same until two tokens are equally probable to rounding.
    assert texts[0].split("def f(")[1][:8] == texts[1].split("def f(")[1][:8]


SHARDS = "mlpmem_jax.store.shards.write_rows"


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.timeout(1800)
def test_one_of_two_processes_is_told_to_stop(tiny_run, on_processes, tmp_path):
    """In embed, in retrieve and while a checkpoint is saved: all stop, and go on as if not."""
    workdir = tmp_path / "run"
    changed = ("mesh.data=2",)
    arguments = ["run", "--config", str(TINY), "--workdir", str(workdir), *changed]
    notices = [
        ("mlpmem_jax.training.checkpoint.Checkpoints.save", 1, "decoder"),
        (SHARDS, 7, "datastore/train"),
        ("mlpmem_jax.retrieval.targets.sparse_distributions", 3, "targets/train"),
    ]
    for function, number, role in notices:
        told = on_processes(
            2, 1, str(HERE / "killed.py"), function, str(number), "after", *arguments,
            variables={
                "KILLED_BY": "SIGTERM", "KILLED_PROCESS": "1", "KILLED_WAIT": "3",
                "KILLED_PACE": "0.1",
            },
        )  # fmt: skip
        assert told.returncode == 75, (function, told.stdout, told.stderr[-6000:])
        assert "Traceback" not in told.stderr and "the same command continues" in told.stderr
        begun = place_of(workdir, role)
        assert (begun / "building.json").exists(), function
        assert not (begun / "manifest.json").exists(), function
    done = on_processes(2, 1, "-m", "mlpmem_jax", *arguments)
    assert done.returncode == 0, done.stderr[-6000:]
    _check_same(Artifacts(tiny_run), _run(changed, workdir))


FULL = """
import errno, os, sys
from mlpmem_jax.store import shards
from mlpmem_jax.__main__ import main
write, calls = shards.write_rows, 0
def fails(*arguments):
    global calls
    calls += 1
    if calls == 9 and os.environ["MLPMEM_PROCESS_INDEX"] == "1":
        raise OSError(errno.ENOSPC, "No space left on device", "/of/this/host")
    return write(*arguments)
shards.write_rows = fails
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.multidevice
@pytest.mark.timeout(900)
def test_the_disk_of_one_of_two_processes_is_full(tiny_run, on_processes, tmp_path):
    workdir = tmp_path / "run"
    for name in ("tokenizer", "tokens", "decoder"):
        shutil.copytree(Path(tiny_run.workdir) / ARTIFACTS / name, workdir / ARTIFACTS / name)
    command = ["embed", "--config", str(TINY), "--workdir", str(workdir), "mesh.data=2"]
    full = on_processes(2, 1, "-c", FULL, *command)
    assert full.returncode == 2, full.stderr[-6000:]
    lines = [line for line in full.stderr.splitlines() if "no space left on the disk" in line]
    assert len(lines) == 1 and "/of/this/host" in lines[0]
    assert "Traceback" not in full.stderr
    datastore = Artifacts(tiny_run).datastore("train")  # Of the same content, so with this id.
    begun = workdir / ARTIFACTS / datastore.relative
    assert not (begun / "manifest.json").exists()
    assert list(begun.rglob("c/*"))
    done = on_processes(2, 1, "-m", "mlpmem_jax", *command)
    assert done.returncode == 0, done.stderr[-6000:]
    assert f"{datastore.title}: continuing" in done.stdout
