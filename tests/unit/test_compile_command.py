"""`compile`: steps that fit and that do not, what it refuses, a step for a TPU."""

import importlib.util
import json
import math
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from mlpmem_jax.__main__ import main
from mlpmem_jax.config.compile import CompileConfig
from mlpmem_jax.roofline import memory as fitting
from tests.conftest import ROOT

TINY = str(ROOT / "configs" / "tiny.yaml")

REFUSAL = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory \
space hbm. Used 17.69G of 15.75G hbm. Exceeded hbm capacity by 1.94G.

Total hbm usage >= 17.94G:
    reserved        258.00M
    program          17.69G

  Largest program allocations in hbm:

  1. Size: 4.00G
     Operator: op_name="jit(step)/dot_general" source_file="a.py"
     Shape: f32[8,8,2048,4,2048]{2,4,3,1,0:T(8,128)}
     Unpadded size: 4.00G
     XLA label: fusion.1 = fusion(...)
     Allocation type: HLO temp
     ==========================

  2. Size: 500.0M
     Shape: f32[1000]{0}
     Allocation type: HLO temp
"""


def test_what_a_compiler_says_that_gave_up():
    found = fitting.refused(RuntimeError(REFUSAL), {}, 16 << 30)
    assert found is not None
    assert not found.fits
    assert found.total == int(17.69 * 2**30)
    assert found.capacity == int(15.75 * 2**30)
    assert [each.bytes for each in found.largest] == [4 << 30, 500 << 20]
    assert "jit(step)/dot_general" in found.largest[0].name
    assert fitting.refused(RuntimeError("INTERNAL: something else"), {}, None) is None


def test_where_the_compiler_names_no_buffer_the_arguments_are_named():
    whole = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    kernel = jax.ShapeDtypeStruct((1024, 1024), "float32", sharding=whole)
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (18.57G) exceeds available HBM (15.75G)."
    )
    found = fitting.refused(RuntimeError(message), {"networks": {"kernel": kernel}}, 16 << 30)
    assert found is not None and not found.fits
    assert found.temporaries == int(18.57 * 2**30)
    assert found.total == found.temporaries + (4 << 20)
    assert found.capacity == int(15.75 * 2**30)
    (buffer,) = found.largest
    assert buffer.bytes == 4 << 20 and buffer.name.startswith("networks/kernel float32[1024, 1024]")


def test_a_step_that_does_not_fit_ends_with_3_and_names_buffers(tmp_path, capsys):
    output = tmp_path / "report.json"
    arguments = ["compile", "--config", TINY, "--step", "pretrain", "--output", str(output)]
    assert main([*arguments, "compile.memory_bytes=100_000"]) == 3
    text = capsys.readouterr().out
    assert "does not fit" in text
    assert "state/params/embedding" in text
    report = json.loads(output.read_text())
    assert not report["memory"]["fits"]
    largest = report["memory"]["largest"]
    assert largest[0]["bytes"] >= 32 * 384 * 4
    assert largest[0]["name"].startswith("state/")
    assert any(each["name"].startswith("jit(step)") for each in largest)  # a temporary array
    assert max(each["bytes"] for each in largest) <= report["memory"]["total"]
    parts = report["memory"]
    assert parts["total"] == (
        parts["arguments"] + parts["temporaries"] + parts["outputs"] + parts["code"]
        - parts["aliased"]
    )  # fmt: skip
    assert main([*arguments]) == 0


@pytest.mark.parametrize("step", ["train", "embed", "decode"])
def test_every_step_compiles_here(capsys, step):
    """Model flops by formula against the products that were compiled."""
    arguments = ["compile", "--config", TINY, "--step", step, "compile.num_prompts=2"]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    numbers = {
        name: float(line.split("│")[1].split()[-1])
        for line in out.splitlines()
        for name in ("model flops", "matrix products")
        if name in line
    }
    assert numbers["matrix products"] == pytest.approx(numbers["model flops"], rel=0.25)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v9:2x2", "must be local or FAMILY:SIZES"),
        ("V5E:2x2", "must be local or FAMILY:SIZES"),
        ("v5p", "must be local or FAMILY:SIZES"),
        ("", "must be local or FAMILY:SIZES"),
        ("v5e:0x4", "must be local or FAMILY:SIZES"),
        ("v5p:4x4", "v5p slices have 3 dimensions"),
        ("v5e:2x2x2", "v5e slices have 2 dimensions"),
    ],
)
@pytest.mark.parametrize("command", ["compile", "train"])  # found before any work
def test_unknown_topologies_end_with_2(capsys, command, name, expected):
    assert main([command, "--config", TINY, f"compile.topology={name}"]) == 2
    err = capsys.readouterr().err
    assert expected in err
    assert "v5p:4x4x4" in err
    assert "Traceback" not in err


def test_without_libtpu_the_way_out_is_named(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["compile", "--config", TINY, "--topology", "v5e:2x2"]) == 2
    assert "pip install -r requirements-tpu.txt" in capsys.readouterr().err


def test_unknown_step(capsys):
    assert main(["compile", "--config", TINY, "--step", "trian"]) == 2
    assert "pretrain, train, embed or decode" in capsys.readouterr().err


def test_output_is_checked_first(tmp_path, capsys):
    assert main(["compile", "--config", TINY, "--output", str(tmp_path / "no" / "a.json")]) == 2
    assert "no directory" in capsys.readouterr().err


def test_known_topologies_pass():
    for name in ("local", "v5p:8x8x8", "v5e:16x16", "v6e:2x4"):
        assert CompileConfig(topology=name).topology == name


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu is not installed (pip install -r requirements-tpu.txt)",
)
def test_for_a_tpu_the_step_is_a_tpu_step(tmp_path):
    """bfloat16 and scanned layers although this host is a CPU."""
    output = tmp_path / "report.json"
    command = [
        sys.executable, "-m", "mlpmem_jax", "compile", "--config", TINY, "--topology", "v5e:2x2",
        "--step", "pretrain", "--output", str(output), "mesh.fsdp=4",
    ]  # fmt: skip
    optimized = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    done = subprocess.run(
        command, cwd=ROOT, env=optimized, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(output.read_text())
    assert report["devices"] == {"count": 4, "kind": "TPU v5 lite"}
    assert report["memory"]["capacity"] == 16 << 30
    assert report["unknown_loops"] == 0
    line = report["roofline"]
    assert 0 < line["share_of_peak"] < 1
    assert math.isclose(sum(line["bound_secs"].values()), line["secs"], rel_tol=1e-9)
    assert {row["axes"] for row in report["collectives"]} <= {"fsdp", "data+fsdp"}
    assert any("while" in each["source"] for each in report["heaviest"])
    assert np.isfinite(line["tokens_per_sec"])
