"""kill -9 in every stage: the same command continues, and the numbers are those of a run
that nobody interrupted, bit for bit."""

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from mlpmem_jax.config.load import load_config
from mlpmem_jax.errors import PREEMPTED
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.networks import finished_decoder, finished_memory
from mlpmem_jax.pipeline.resolve import resolved
from mlpmem_jax.store.array_specs import SPLITS, datastore_arrays
from mlpmem_jax.store.arrays import open_array, read_rows
from tests.pipeline.roles import metrics_file, place_of

HERE = Path(__file__).resolve().parent
TINY = HERE.parents[1] / "configs" / "tiny.yaml"
SHARDS = "mlpmem_jax.store.shards.write_rows"
SAVE = "mlpmem_jax.training.checkpoint.Checkpoints.save"
SUMS = "mlpmem_jax.training.checkpoint.write_checksums"
STEP = "mlpmem_jax.training.monitor.Monitor.dispatched"
INTERVAL = 4  # checkpoint_interval_steps of both networks in configs/tiny.yaml

# In the order of the stages, all in one work directory: where the process is killed, and
# the role of the artifact that is then begun and not finished.
KILLS = [
    ("mlpmem_jax.store.appender.Appender.append", 5, "after", "tokens"),
    ("mlpmem_jax.store.manifest.Artifact.finish", 1, "before", "tokens"),
    (STEP, 3, "after", "decoder"),  # before the first checkpoint
    (SAVE, 1, "after", "decoder"),  # while it is being written
    (STEP, 2, "after", "decoder"),
    (SUMS, 1, "before", "decoder"),  # written, and not yet known to be whole
    (SUMS, 1, "after", "decoder"),  # from here on it is not trained again up to there
    (STEP, 2, "after", "decoder"),
    (SHARDS, 7, "after", "datastore/train"),
    (SHARDS, 100, "after", "datastore/train"),
    ("mlpmem_jax.store.manifest.Artifact.finish", 3, "before", "datastore/test"),
    ("mlpmem_jax.store.manifest.Artifact.finish", 2, "before", "index"),
    (SHARDS, 5, "after", "neighbors/valid"),
    (SHARDS, 90, "after", "targets/train"),
    (SAVE, 1, "after", "memory"),
    (STEP, 2, "after", "memory"),
    (SUMS, 1, "after", "memory"),
    (STEP, 3, "after", "memory"),
    ("mlpmem_jax.store.manifest.Artifact.finish", 2, "before", "results"),
]


# Where it is told to stop: before a loop that can, within one, while a checkpoint is saved.
NOTICES = [
    ("mlpmem_jax.store.appender.Appender.append", 5, "tokens"),
    (STEP, 3, "decoder"),
    (SAVE, 1, "decoder"),
    (SHARDS, 7, "datastore/train"),
    (SHARDS, 90, "targets/train"),
    (STEP, 2, "memory"),
]


def _run(command, **variables):
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])} | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def _arrays(run):
    config = run.config
    paths = [run.tokens.path / s / "token" for s in SPLITS]
    for split in SPLITS:
        folder = run.datastore(split).path
        paths += [
            folder / name for name in datastore_arrays(config.datastore, config.decoder.width)
        ]
    paths += [run.neighbors(s).path / n for s in ("valid", "test") for n in ("row", "distance")]
    paths += [run.targets(s).path / n for s in ("train", "valid") for n in ("id", "prob", "mass")]
    stores = {str(p.relative_to(run.workdir)): open_array(p) for p in paths}
    return {name: read_rows(store, 0, store.shape[0]) for name, store in stores.items()}


def _weights(run):
    mesh = single_device_mesh()
    networks = finished_decoder(run, mesh), finished_memory(run, mesh)
    return [np.asarray(leaf) for net in networks for leaf in jax.tree.leaves(nnx.state(net))]


def _numbers(run):
    raw = json.loads((run.results.path / "evaluate.json").read_text())
    return {name: value for name, value in raw.items() if name not in ("latency", "seconds")}


def _losses(run, artifact):
    lines = metrics_file(run, artifact).read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [(r["step"], r["loss"]) for r in records if "loss" in r]


class Steps:
    """What starts of the same command have trained, and which checkpoints they left.

    Attributes:
        file: Where killed.py writes the steps of a start.
    """

    def __init__(self, workdir, file):
        self.file = file
        self._workdir = workdir
        self._good = {}  # By artifact: the newest checkpoint with checksums.

    def check_start(self, *about):
        """Looks at a start that has ended: it went on from the newest good checkpoint."""
        lines = self.file.read_text().splitlines() if self.file.exists() else []
        self.file.unlink(missing_ok=True)
        trained = {}
        for line in lines:
            path, step = line.rsplit(" ", 1)
            trained.setdefault(str(Path(path).relative_to(self._workdir)), []).append(int(step))
        for artifact, steps in trained.items():
            start = self._good.get(artifact, 0)
            assert steps == list(range(start + 1, steps[-1] + 1)), (artifact, *about)
            sums = (self._workdir / artifact / "checksums").glob("*.json")
            self._good[artifact] = max((int(path.stem) for path in sums), default=0)
            assert self._good[artifact] >= start, (artifact, *about)
        return {artifact: (steps[0] - 1, steps[-1]) for artifact, steps in trained.items()}


@pytest.mark.timeout(1800)  # A dozen starts of the whole pipeline.
def test_killed_in_every_stage_equals_uninterrupted(tiny_run, tmp_path):
    workdir = tmp_path / "run"
    arguments = ["run", "--config", str(TINY), "--workdir", str(workdir)]
    steps, trained = Steps(workdir, tmp_path / "steps"), []
    for function, number, when, role in KILLS:
        command = [sys.executable, str(HERE / "killed.py"), function, str(number), when]
        died = _run([*command, *arguments], KILLED_STEPS=str(steps.file))
        assert died.returncode == -signal.SIGKILL, (function, number, died.stdout, died.stderr)
        begun = place_of(workdir, role)
        assert (begun / "building.json").exists(), (function, number, died.stdout)
        assert not (begun / "manifest.json").exists(), (function, number)
        artifact = str(begun.relative_to(workdir))
        trained.append((function, when, artifact, steps.check_start(function, number)))
    _check_at_most_one_interval_is_lost(trained)
    _check_continued(arguments, workdir, tiny_run, steps)


def _check_at_most_one_interval_is_lost(trained):
    """Compares neighbouring starts: what one had trained when it died, where the next began."""
    compared = 0
    for (function, when, artifact, died), (*_, continued) in itertools.pairwise(trained):
        # Before its checksums a checkpoint does not count, and the next one waits for them.
        intervals = 2 if (function, when) == (SUMS, "before") else 1
        if artifact in died and artifact in continued:
            lost = died[artifact][1] - continued[artifact][0]
            assert 0 <= lost <= intervals * INTERVAL, (function, when, artifact, died, continued)
            compared += continued[artifact][0] > 0
    # Of each network the kill after its first checksums, and the one after that.
    assert compared >= 4, trained


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_told_to_stop_in_every_stage_equals_uninterrupted(tiny_run, tmp_path):
    workdir = tmp_path / "run"
    arguments = ["run", "--config", str(TINY), "--workdir", str(workdir)]
    steps = Steps(workdir, tmp_path / "steps")
    for function, number, role in NOTICES:
        command = [sys.executable, str(HERE / "killed.py"), function, str(number), "after"]
        told = _run([*command, *arguments], KILLED_BY="SIGTERM", KILLED_STEPS=str(steps.file))
        assert told.returncode == PREEMPTED, (function, number, told.stdout, told.stderr)
        (line,) = [line for line in told.stderr.splitlines() if "preempted" in line]
        assert line.startswith("preempted: ") and line.endswith("; the same command continues")
        assert not (place_of(workdir, role) / "manifest.json").exists(), (function, number)
        steps.check_start(function, number)
    _check_continued(arguments, workdir, tiny_run, steps)


def _check_continued(arguments, workdir, tiny_run, steps):
    """Runs to the end and compares with a run that nobody interrupted."""
    command = [sys.executable, str(HERE / "killed.py"), STEP, "0", "after", *arguments]
    last = _run(command, KILLED_STEPS=str(steps.file))
    assert last.returncode == 0, last.stderr
    steps.check_start("the last start")
    whole = Artifacts(tiny_run)
    run = Artifacts(resolved(load_config(TINY, (), {"workdir": str(workdir)})))
    expected, found = _arrays(whole), _arrays(run)
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    for a, b in zip(_weights(run), _weights(whole), strict=True):
        np.testing.assert_array_equal(a, b)
    assert _losses(run, run.decoder) == _losses(whole, whole.decoder)
    assert _losses(run, run.memory) == _losses(whole, whole.memory)
    assert _numbers(run) == _numbers(whole)


@pytest.mark.usefixtures("tiny_run")
def test_a_second_start_makes_nothing(tiny_run, capsys):
    from mlpmem_jax.__main__ import main

    def manifests():
        files = Path(tiny_run.workdir).rglob("manifest.json")
        return {file: file.stat().st_mtime_ns for file in files}

    before = manifests()
    assert main(["run", "--config", str(TINY), "--workdir", tiny_run.workdir]) == 0
    output = capsys.readouterr().out
    assert output.count(": complete (") == len(before)
    assert ": making" not in output and ": continuing" not in output
    assert before == manifests()
