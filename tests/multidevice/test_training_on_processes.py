"""Batches and training in several processes against one, and other shapes midway."""

import json
from pathlib import Path

import numpy as np
import pytest

from tests.pipeline.roles import place_of

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
TINY = str(ROOT / "configs" / "tiny.yaml")
KILLED = str(ROOT / "tests" / "pipeline" / "killed.py")
BATCHES = str(HERE / "batches_script.py")
AXES = ("data", "fsdp", "tensor")
SMALL = ("decoder.num_layers=1", "memory.num_layers=1")

pytestmark = [pytest.mark.multidevice, pytest.mark.timeout(1800)]


def _losses(workdir):
    (file,) = (workdir / "results" / "metrics").glob("decoder-*/metrics.jsonl")
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return {r["step"]: r["loss"] for r in records if "loss" in r}


@pytest.mark.slow
def test_the_same_batches_on_any_number_of_processes(on_processes):
    def digests(processes, devices, *mesh):
        done = on_processes(processes, devices, BATCHES, *mesh)
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    expected = digests(1, 1, "1", "1", "1")
    assert len(set(expected)) == 20
    shapes = [
        (2, 2, "2", "2", "1"),
        (4, 2, "4", "2", "1"),
        (4, 2, "1", "2", "4"),  # two processes hold the same rows
        (4, 2, "1", "1", "8"),  # all do
    ]
    for processes, devices, *mesh in shapes:
        assert digests(processes, devices, *mesh) == expected, (processes, mesh)


@pytest.mark.slow
def test_a_run_goes_on_in_another_shape_after_each_notice(on_processes, tmp_path):
    def start(name, processes, devices, mesh, term_at=None):
        command = ["pretrain", "--config", TINY, "--workdir", str(tmp_path / name), *SMALL]
        command += [f"mesh.{axis}={n}" for axis, n in zip(AXES, mesh, strict=True)]
        command += [
            "pretrain.num_steps=12",
            "pretrain.batch_size=8",
            "pretrain.log_interval_steps=1",
        ]
        if term_at is None:
            return on_processes(processes, devices, "-m", "mlpmem_jax", *command)
        step = "mlpmem_jax.training.monitor.Monitor.dispatched"
        told = {"KILLED_BY": "SIGTERM", "KILLED_PROCESS": str(processes - 1)}
        told |= {"KILLED_WAIT": "10"} if processes > 1 else {}
        killed = [KILLED, step, str(term_at), "after", *command]
        return on_processes(processes, devices, *killed, variables=told)

    for name in ("whole", "stopped"):
        tokenized = on_processes(
            1, 1, "-m", "mlpmem_jax", "tokenize", "--config", TINY, "--workdir",
            str(tmp_path / name), *SMALL
        )  # fmt: skip
        assert tokenized.returncode == 0
    assert start("whole", 1, 1, (1, 1, 1)).returncode == 0
    at = 0
    for processes, devices, mesh in ((4, 2, (2, 2, 2)), (2, 2, (4, 1, 1)), (1, 1, (1, 1, 1))):
        done = start("stopped", processes, devices, mesh, term_at=2)
        assert done.returncode == 75, done.stderr[-6000:]
        assert "; the same command continues" in done.stderr and "Traceback" not in done.stderr
        checkpoints = place_of(tmp_path / "stopped", "decoder") / "checkpoints"
        newest = max(int(path.name) for path in checkpoints.iterdir())
        assert at + 2 <= newest <= at + 5  # at once, or as soon as all can
        at = newest
    assert start("stopped", 1, 1, (1, 1, 1)).returncode == 0
    ours, theirs = _losses(tmp_path / "stopped"), _losses(tmp_path / "whole")
    assert list(ours) == list(theirs) == list(range(1, 13))
    np.testing.assert_allclose(list(ours.values()), list(theirs.values()), rtol=2e-4)
