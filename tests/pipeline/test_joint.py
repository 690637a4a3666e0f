"""Joint training, with targets made anew on the way: killed, resumed, evaluated, refused."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from mlpmem_jax.__main__ import main
from mlpmem_jax.config.load import load_config
from mlpmem_jax.evaluation.labels import whole_array
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.networks import finished_decoder, finished_networks
from mlpmem_jax.pipeline.resolve import resolved
from mlpmem_jax.pipeline.stage import run_stage
from mlpmem_jax.studies.tables.rows import model_parts
from mlpmem_jax.studies.tables.variants import Variant

HERE = Path(__file__).resolve().parent
TINY = HERE.parents[1] / "configs" / "tiny.yaml"
SAVE = "mlpmem_jax.training.checkpoint.Checkpoints.save"
FINISH = "mlpmem_jax.store.manifest.Artifact.finish"
JOINT = (
    "train.mode=joint",
    "memory.gate=learned",
    "train.num_steps=5",
)
REFRESHED = (*JOINT, "train.name=refreshed", "train.refresh_interval_steps=3")
# Where the process is killed, and the artifact that is then begun and not finished.
KILLS = [
    (FINISH, 1, "before", "joint/refreshed.phase-0"),
    (FINISH, 2, "before", "decoder/refreshed.refresh-0"),
    ("mlpmem_jax.store.shards.write_rows", 5, "after", "datastore/refreshed.refresh-0/train"),
    (FINISH, 5, "before", "targets/refreshed.refresh-0/train"),
    (SAVE, 1, "after", "joint/refreshed"),
]


def _main(workdir, command, *overrides):
    return main([command, "--config", str(TINY), "--workdir", str(workdir), *overrides])


def _copy(tiny_run, path):
    """A run whose decoder, datastore, targets and memory are finished."""
    shutil.copytree(tiny_run.workdir, path)
    return path


def _weights(workdir, overrides):
    config = load_config(TINY, overrides, {"workdir": str(workdir)})
    networks = finished_networks(config, single_device_mesh())
    return [np.asarray(leaf) for net in networks for leaf in jax.tree.leaves(nnx.state(net))]


@pytest.fixture(scope="module")
def refreshed(tiny_run, tmp_path_factory):
    """A finished joint run in two phases."""
    workdir = _copy(tiny_run, tmp_path_factory.mktemp("joint") / "run")
    assert _main(workdir, "train", *REFRESHED) == 0
    return workdir


@pytest.mark.timeout(900)
def test_killed_between_and_in_phases_equals_uninterrupted(tiny_run, refreshed, tmp_path):
    workdir = _copy(tiny_run, tmp_path / "run")
    arguments = ["train", "--config", str(TINY), "--workdir", str(workdir), *REFRESHED]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    for function, number, when, artifact in KILLS:
        command = [sys.executable, str(HERE / "killed.py"), function, str(number), when]
        died = subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True, timeout=300
        )
        assert died.returncode == -signal.SIGKILL, (function, number, died.stdout, died.stderr)
        assert (workdir / artifact / "building.json").exists(), (number, died.stdout)
        assert not (workdir / artifact / "manifest.json").exists(), (function, number)
    assert main(arguments) == 0
    for a, b in zip(_weights(workdir, REFRESHED), _weights(refreshed, REFRESHED), strict=True):
        np.testing.assert_array_equal(a, b)


def test_phases_change_the_targets_and_skip_where_they_still_agree(refreshed, tmp_path, capsys):
    config = load_config(TINY, REFRESHED, {"workdir": str(refreshed)})
    phase = json.loads((refreshed / "joint/refreshed.phase-0/manifest.json").read_text())
    assert 0 < phase["measured"]["neighbor_agreement"] < 1
    made_from = Artifacts(config).joint.load().made_from
    assert "targets/refreshed.refresh-0/train" in made_from
    assert "targets/base/train" not in made_from
    # Of five steps the first phase makes three; each is charged for its own.
    flops = Artifacts(config).joint.load().measured["model_flops"]
    assert phase["measured"]["model_flops"] / flops == pytest.approx(3 / 2)
    workdir = tmp_path / "run"
    shutil.copytree(refreshed, workdir)
    kept = [*REFRESHED, "train.name=kept", "train.refresh_agreement=0.001"]
    capsys.readouterr()
    assert _main(workdir, "train", *kept) == 0
    assert "decoder/kept.refresh-0: not needed (" in capsys.readouterr().out
    config = load_config(TINY, kept, {"workdir": str(workdir)})
    assert "targets/base/train" in Artifacts(config).joint.load().made_from


def test_evaluation_and_generation_use_the_gate(refreshed, capsys):
    assert _main(refreshed, "evaluate", *REFRESHED) == 0
    results = json.loads((refreshed / "results/joint-refreshed/evaluate.json").read_text())
    memory = results["systems"]["memory"]
    assert memory["interpolation_source"] == "gate"
    assert 0 < memory["interpolation"] < 1
    # The decoder of the joint model, not the one that it began with.
    beside = results["diagnostics"]["test"]["decoder_beside_memory_nats"]
    for command in (["generate"], ["evaluate", "--rebuild"]):  # also where a gate makes λ
        assert _main(refreshed, *command, *REFRESHED, "train.interpolation=0.7") == 2
        told = capsys.readouterr().err
        assert "λ = 0.3 where the gate begins, but the configuration has λ = 0.7" in told
    assert beside != pytest.approx(results["systems"]["decoder"]["test_nats"], abs=1e-6)
    assert memory["test_nats"] == pytest.approx(beside, abs=0.1)
    row = results["systems"]["joint_decoder"]
    assert row["test_nats"] == pytest.approx(beside, rel=1e-6)
    assert row["parameters"] == results["systems"]["decoder"]["parameters"]
    assert _main(refreshed, "generate", *REFRESHED) == 0
    assert "λ of the gate" in capsys.readouterr().out


@pytest.mark.parametrize("overrides", [REFRESHED, ()])
def test_what_the_memory_was_not_trained_to_read_is_refused(refreshed, capsys, overrides):
    """Before what is there is removed."""
    capsys.readouterr()
    layout = Artifacts(load_config(TINY, overrides, {"workdir": str(refreshed)}))
    if not layout.results.is_complete():
        assert _main(refreshed, "evaluate", *overrides) == 0
    results = layout.results.load()
    before = (refreshed / "config.yaml").read_text()
    for command, key, value in (
        ("evaluate", "datastore.input.layer", "0.5"),
        ("generate", "datastore.input.layer", "0.5"),
        ("evaluate", "retrieval.num_neighbors", "8"),
        ("evaluate", "corpus.attention", "within"),
    ):
        more = [f"{key}={value}", *(["--rebuild"] if command == "evaluate" else [])]
        assert _main(refreshed, command, *overrides, *more) == 2
        told = capsys.readouterr().err
        assert (
            "otherwise: " in told
            and f"{key}=" in told
            and f"now {json.dumps(value)}"
            in (told.replace("now 0.5", 'now "0.5"').replace("now 8", 'now "8"'))
        )
        assert layout.results.load() == results
        if command == "evaluate":
            assert _main(refreshed, command, *overrides, more[0], "--dry-run") == 0
            assert "REFUSED: " in capsys.readouterr().out
    assert (refreshed / "config.yaml").read_text() == before


def test_neighbours_of_other_keys_are_refused(refreshed, tmp_path, capsys):
    """What the settings do not tell apart: `retrieve` was not run after `embed`."""
    workdir = tmp_path / "run"
    shutil.copytree(refreshed, workdir)
    other = ("datastore.key.layer=0.5", *REFRESHED)
    assert _main(workdir, "embed", "--rebuild", *other) == 0
    capsys.readouterr()
    assert _main(workdir, "evaluate", "--rebuild", *other) == 2
    told = capsys.readouterr().err
    assert "was made otherwise: datastore/base/train=" in told and "index --rebuild" in told


def test_rows_that_the_memory_was_not_trained_on_are_refused(tiny_run, tmp_path, capsys):
    workdir = _copy(tiny_run, tmp_path / "run")
    other = ("datastore.name=other", "targets.name=other", "datastore.input.layer=0.5")
    for command in ("embed", "index", "retrieve"):
        assert _main(workdir, command, *other) == 0
    assert _main(workdir, "train", *other, "memory.name=other") == 0
    capsys.readouterr()
    # The decoder's state of another layer, by the name of the datastore alone.
    weight = "generate.interpolation=0.5"
    for command in ("evaluate", "generate"):
        assert _main(workdir, command, "memory.name=other", weight) == 2
        told = capsys.readouterr().err
        assert "datastore.input.layer=0.5, now 0.7" in told
    assert _main(workdir, "embed", "--rebuild", "datastore.input.layer=0.5") == 0
    capsys.readouterr()
    assert _main(workdir, "generate", "datastore.input.layer=0.5", weight) == 2
    assert "was trained on rows that have been made anew" in capsys.readouterr().err


def test_online_training_records_what_the_memory_reads(tiny_run, tmp_path, capsys):
    workdir = _copy(tiny_run, tmp_path / "run")
    online = ("train.inputs=online", "memory.name=online", "train.num_steps=2")
    online = (*online, "train.optimizer.warmup_steps=0")
    assert _main(workdir, "train", *online) == 0
    capsys.readouterr()
    assert _main(workdir, "train", *online, "datastore.input.layer=0.5") == 2
    assert "datastore.input.layer=0.7, now 0.5" in capsys.readouterr().err
    asked = ("datastore.input.layer=0.5", "generate.interpolation=0.5")
    assert _main(workdir, "generate", *online, *asked) == 2
    assert "datastore.input.layer=0.7, now 0.5" in capsys.readouterr().err


@pytest.mark.parametrize("gate", ["none", "learned"])
def test_decoder_and_memory_of_the_run_are_the_start(tiny_run, tmp_path, gate):
    """With nothing that moves, the joint model is the two networks that it began with."""
    workdir = _copy(tiny_run, tmp_path / "run")
    overrides = (
        "train.mode=joint", "train.memory_start=checkpoint", "train.num_steps=2",
        "train.optimizer.warmup_steps=0", "train.decoder_optimizer.warmup_steps=0",
        "train.decoder_freeze_steps=2", "train.memory_freeze_steps=1", f"memory.gate={gate}",
    )  # fmt: skip
    assert _main(workdir, "train", *overrides) == 0
    config = load_config(TINY, overrides, {"workdir": str(workdir)})
    mesh = single_device_mesh()
    decoder, memory = finished_networks(config, mesh)
    base = load_config(TINY, (), {"workdir": str(workdir)})
    for new, old in zip(
        jax.tree.leaves(nnx.state(decoder)),
        jax.tree.leaves(nnx.state(finished_decoder(base, mesh))),
        strict=True,
    ):
        np.testing.assert_array_equal(new, old)
    begun = dict(nnx.to_flat_state(nnx.state(finished_networks(base, mesh)[1])))
    ended = dict(nnx.to_flat_state(nnx.state(memory)))
    assert {path[0] for path in set(ended) - set(begun)} == (
        {"gate", "gate_bias"} if gate == "learned" else set()
    )
    # The input statistics are carried over, the parameters have made one step.
    moved = {
        path: float(np.abs(ended[path][...] - begun[path][...]).max(initial=0)) for path in begun
    }
    assert [path[0] for path, most in moved.items() if most == 0] == [
        "input_inverse_std", "input_mean",
    ]  # fmt: skip
    assert max(moved.values()) < 1.5 * config.train.optimizer.learning_rate


def test_a_gate_is_trained_offline_from_stored_logprobs(tiny_run, tmp_path, capsys):
    workdir = _copy(tiny_run, tmp_path / "run")
    overrides = ("memory.gate=learned", "memory.name=gated", "train.joint_weight=1")
    for command in ("train", "evaluate"):
        assert _main(workdir, command, *overrides) == 0
    results = json.loads((workdir / "results/gated/evaluate.json").read_text())
    assert results["systems"]["memory"]["interpolation_source"] == "gate"
    # Tables of several runs mix with the same gate.
    config = resolved(load_config(TINY, overrides, {"workdir": str(workdir)}))
    parts = model_parts(Variant.of(config))
    assert [part.kind for part in parts] == ["mixture"]
    for stage in parts[0].stages():
        run_stage(stage)
    scores = parts[0].scores("test")
    label, logprob = (whole_array(scores, name) for name in ("label", "logprob"))
    nats = -logprob[label != 0].astype(np.float64).mean()
    assert nats == pytest.approx(results["systems"]["memory"]["test_nats"], rel=1e-6)
    weight = results["systems"]["memory"]["interpolation"]
    counts = parts[0].scores("valid").load().counts
    assert counts["interpolation"] == pytest.approx(weight, rel=1e-6)
    # What was trained without a gate has none to use.
    ungated = ("memory.gate=learned", "train.joint_weight=1")
    assert _main(workdir, "evaluate", *ungated) == 2
    assert "memory.gate" in capsys.readouterr().err
    assert _main(workdir, "generate", *ungated) == 2
    assert "memory.gate=learned (trained with none)" in capsys.readouterr().err


def test_another_interpolation_than_the_trained_one_is_refused(tiny_run, tmp_path, capsys):
    workdir = _copy(tiny_run, tmp_path / "run")
    joint = ("train.mode=joint", "train.num_steps=2")
    assert _main(workdir, "train", *joint, "train.optimizer.warmup_steps=1") == 0
    capsys.readouterr()
    same = ("train.mode=joint",)
    assert _main(workdir, "generate", *same, "train.interpolation=0.9") == 2
    message = capsys.readouterr().err
    assert "was trained with λ = 0.3, but the configuration has λ = 0.9" in message
    assert _main(workdir, "generate", *same) == 0
    offline = ("train.joint_weight=1", "train.interpolation=0.9")
    results = (workdir / "results/base/manifest.json").read_bytes()
    for command in (
        ["generate"], ["evaluate", "--rebuild"], ["analyze"], ["cost", "cost.prompt_tokens=16"],
    ):  # fmt: skip
        assert _main(workdir, *command, *offline) == 2
        assert "was trained with a λ that is chosen on validation" in capsys.readouterr().err
    assert (workdir / "results/base/manifest.json").read_bytes() == results


@pytest.mark.parametrize("command", ["analyze", "cost", "search-quality"])
def test_what_is_about_a_frozen_decoder_refuses_joint_training(tmp_path, capsys, command):
    assert _main(tmp_path / "none", command, *JOINT[:1], "train.num_steps=5") == 2
    message = capsys.readouterr().err
    assert f"train.mode=joint: {command} is about a memory beside a frozen decoder" in message
    assert not (tmp_path / "none").exists()


def test_a_teacher_needs_the_same_tokens(tiny_run, tmp_path, capsys):
    workdir = tmp_path / "run"
    other = ["tokenizer.vocab_size=290"]
    assert _main(workdir, "tokenize", *other) == 0
    assert _main(workdir, "pretrain", *other) == 0
    teacher = f"targets.workdir={tiny_run.workdir}"
    assert _main(workdir, "train", *other, *JOINT, teacher) == 2
    message = capsys.readouterr().err
    assert "a teacher needs the same corpus, splits and tokenizer" in message
    assert not (workdir / "joint").exists()


def test_a_teacher_elsewhere_gives_the_same_targets(tiny_run, tmp_path):
    """Tokens and decoder of a run, targets of another run directory."""
    workdir = tmp_path / "run"
    for part in ("tokenizer", "tokens", "decoder"):
        shutil.copytree(f"{tiny_run.workdir}/{part}", workdir / part)
    own = _copy(tiny_run, tmp_path / "own")
    assert _main(workdir, "train", *JOINT, f"targets.workdir={tiny_run.workdir}") == 0
    assert _main(own, "train", *JOINT) == 0
    for a, b in zip(_weights(workdir, JOINT), _weights(own, JOINT), strict=True):
        np.testing.assert_array_equal(a, b)
