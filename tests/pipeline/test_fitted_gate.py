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
from mlpmem_jax.pipeline.networks import finished_memory, finished_networks
from mlpmem_jax.pipeline.resolve import resolved
from mlpmem_jax.pipeline.stage import run_stage
from mlpmem_jax.pipeline.train import stages as memory_stages
from mlpmem_jax.store.manifest import Artifact

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny.yaml"
FITTED = "memory.gate=fitted"
# Enough that the memory is better than the decoder on some rows.
LONGER = (
    "train.num_steps=150", "train.optimizer.learning_rate=1e-2", "train.log_interval_steps=150",
    "train.eval_interval_steps=150", "train.checkpoint_interval_steps=150",
)  # fmt: skip


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
    assert _main(workdir, "train", *LONGER) == 0
    one = _system(workdir, *LONGER)
    assert _main(workdir, "train", FITTED, *LONGER) == 0
    assert "gate fitted to" in capsys.readouterr().out
    mesh = single_device_mesh()
    plain, gated = (
        dict(nnx.to_flat_state(nnx.state(finished_memory(_artifacts(workdir, *texts), mesh))))
        for texts in (LONGER, (FITTED, *LONGER))
    )
    assert {path[0] for path in set(gated) - set(plain)} == {"gate", "gate_bias"}
    for path, value in plain.items():
        # The gradient's norm is summed in another order beside a gate.
        np.testing.assert_allclose(gated[path][...], value[...], atol=1e-4)
    memory = finished_memory(_artifacts(workdir, FITTED, *LONGER), mesh)
    states = jax.random.normal(jax.random.key(0), (50, memory.input_width)) * 3
    weight = np.asarray(memory.interpolation(states))
    assert np.ptp(weight) > 0.05
    found = _artifacts(workdir, FITTED, *LONGER).memory.load().measured["validation"]
    assert found["gate_nats"] < found["gate_nats_one"]
    fitted = _system(workdir, FITTED, *LONGER)
    assert fitted["interpolation_source"] == "gate"
    assert fitted["valid_nats"] < one["valid_nats"]
    assert _main(workdir, "generate", FITTED, *LONGER, "--prompt", "The") == 0


def test_a_run_killed_after_the_fit_has_the_same_gate(tiny_run, tmp_path, monkeypatch):
    """The last checkpoint holds it; started again, nothing is fitted."""
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run.workdir, workdir)
    run = _artifacts(workdir, FITTED)

    def stop(*_args: object, **_kwargs: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Artifact, "finish", stop)
        with pytest.raises(KeyboardInterrupt):
            run_stage(memory_stages(run)[0])
    assert not run.memory.is_complete()
    with monkeypatch.context() as patched:
        patched.setattr("mlpmem_jax.training.memory_training.fitted_gate", stop)
        assert _main(workdir, "train", FITTED) == 0
    killed = finished_memory(run, single_device_mesh())
    assert _main(workdir, "train", FITTED, "--rebuild") == 0
    whole = finished_memory(run, single_device_mesh())
    np.testing.assert_array_equal(killed.gate[...], whole.gate[...])
    np.testing.assert_array_equal(killed.gate_bias[...], whole.gate_bias[...])


@pytest.mark.parametrize("gate", ["learned", "none"])
def test_joint_training_begins_with_it(tiny_run, tmp_path, gate):
    """A learned gate begins where the fitted one ended; without a gate it is left out."""
    workdir = tmp_path / "run"
    shutil.copytree(tiny_run.workdir, workdir)
    assert _main(workdir, "train", FITTED) == 0
    joint = (
        "train.mode=joint", "train.memory_start=checkpoint", "train.num_steps=2",
        "train.memory_freeze_steps=2", "train.optimizer.warmup_steps=0",
        "train.decoder_optimizer.warmup_steps=0",
        f"memory.gate={gate}",
    )  # fmt: skip
    assert _main(workdir, "train", *joint) == 0
    run = _artifacts(workdir, *joint)
    _, memory = finished_networks(run, single_device_mesh())
    fitted = finished_memory(_artifacts(workdir, FITTED), single_device_mesh())
    np.testing.assert_array_equal(memory.head[...], fitted.head[...])
    assert memory.config.has_gate == (gate == "learned")
    if gate == "learned":
        np.testing.assert_array_equal(memory.gate_bias[...], fitted.gate_bias[...])


def test_curves_by_epoch_are_refused(tmp_path, capsys):
    assert _main(tmp_path / "run", "overfitting", FITTED) == 2
    assert "memory.gate=fitted is fitted after the last step" in capsys.readouterr().err


@pytest.mark.parametrize("mode", ["train.mode=joint", "train.inputs=online"])
def test_a_decoder_that_runs_is_refused(tmp_path, capsys, mode):
    assert _main(tmp_path / "run", "train", FITTED, mode) == 2
    assert "memory.gate=fitted is fitted to stored rows" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["joint_weight=0.5", "interpolation_final=0.1", "gate_prior=1"])
def test_keys_of_a_learned_gate_are_refused(tmp_path, capsys, key):
    assert _main(tmp_path / "run", "train", FITTED, f"train.{key}") == 2
    assert "λ is fitted after training (memory.gate=fitted)" in capsys.readouterr().err
