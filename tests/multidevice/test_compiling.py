"""Trip counts and collectives of compiled programs; the command on a mesh."""

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from tests.multidevice.conftest import environment_of_eight_devices

pytestmark = pytest.mark.multidevice


@pytest.mark.parametrize("check", ["scan", "nested"])
def test_loops_and_collectives(on_eight_devices, check):
    assert on_eight_devices("compiling_script.py", check).strip().endswith("ok")


def test_the_command_on_a_mesh(tmp_path):
    """FSDP gathers weights, tensor parallelism reduces activations, model flops are right."""
    output = tmp_path / "report.json"
    environment = environment_of_eight_devices()
    command = [
        sys.executable, "-m", "mlpmem_jax", "compile", "--config", "configs/tiny.yaml",
        "--step", "train", "--output", str(output), "mesh.fsdp=2", "mesh.tensor=2",
        "train.batch_size=8", "memory.layer_loop=scan",
    ]  # fmt: skip
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert report["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    assert report["memory"]["fits"]
    assert report["unknown_loops"] == 0
    assert report["flops"]["compiled"] == pytest.approx(report["flops"]["model"], rel=0.1)
    kinds = {(row["kind"], row["axes"]) for row in report["collectives"]}
    assert ("all-gather", "fsdp") in kinds
    assert ("all-reduce", "tensor") in kinds
    assert "all-gather" in done.stdout
    assert "fits" in done.stdout
