"""A gate that is fitted to validation after training (memory.gate=fitted)."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from mlpmem_jax.__main__ import main
from mlpmem_jax.config.load import load_config
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.networks import finished_memory
from mlpmem_jax.pipeline.resolve import resolved
from mlpmem_jax.training import gate_fitting

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny.yaml"
FITTED = "memory.gate=fitted"


def _main(workdir: Path, command: str, *overrides: str) -> int:
    return main([command, "--config", str(TINY), "--workdir", str(workdir), *overrides])


def _artifacts(workdir: Path, *overrides: str) -> Artifacts:
    return Artifacts(resolved(load_config(str(TINY), overrides, {"workdir": str(workdir)})))


def _system(workdir: Path, *overrides: str) -> dict[str, float]:
    assert _main(workdir, "evaluate", *overrides) == 0
    path = _artifacts(workdir, *overrides).results.path / "evaluate.json"
    return dict(json.loads(path.read_text())["systems"]["memory"])


def test_the_memory_stays_and_tokens_get_weights_of_their_own(tiny_run, tmp_path, capsys):
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run.workdir, workdir)
    one = _system(workdir)
    assert _main(workdir, "train", FITTED) == 0
    assert "gate fitted to" in capsys.readouterr().out
    mesh = single_device_mesh()
    plain, gated = (
        dict(nnx.to_flat_state(nnx.state(finished_memory(_artifacts(workdir, *texts), mesh))))
        for texts in ((), (FITTED,))
    )
    assert {path[0] for path in set(gated) - set(plain)} == {"gate", "gate_bias"}
    for path, value in plain.items():
        np.testing.assert_array_equal(gated[path][...], value[...])
    assert float(np.abs(gated["gate_bias",][...]).max()) > 0
    fitted = _system(workdir, FITTED)
    assert fitted["interpolation_source"] == "gate"
    # One λ is what it falls back to; it may be worse on other text, not on its own.
    assert fitted["valid_nats"] <= one["valid_nats"] + 1e-3
    assert _main(workdir, "generate", FITTED, "--prompt", "The") == 0


def test_few_rows_leave_the_weight_as_configured(tiny_run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gate_fitting, "_LEAST_ROWS", 10**9)
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run.workdir, workdir)
    assert _main(workdir, "train", FITTED, "train.interpolation=0.4") == 0
    assert "too few to fit a gate" in capsys.readouterr().out
    run = _artifacts(workdir, FITTED, "train.interpolation=0.4")
    memory = finished_memory(run, single_device_mesh())
    weight = memory.interpolation(jax.numpy.ones((2, memory.input_width)))
    assert np.asarray(weight) == pytest.approx([0.4, 0.4])


def test_curves_by_epoch_are_refused(tmp_path, capsys):
    assert _main(tmp_path / "run", "overfitting", FITTED) == 2
    assert "memory.gate=fitted is fitted after the last step" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["train.mode=joint", "train.inputs=online"])
def test_a_decoder_that_runs_is_refused(tmp_path, capsys, mode):
    assert _main(tmp_path / "run", "train", FITTED, mode) == 2
    assert "memory.gate=fitted is fitted to stored rows" in capsys.readouterr().err
