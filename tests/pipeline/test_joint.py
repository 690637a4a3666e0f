"""Joint training, with targets made anew on the way: killed, resumed, evaluated, refused."""

import json
import os
import re
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
from mlpmem_jax.pipeline.refresh import Phases
from mlpmem_jax.pipeline.resolve import resolved
from mlpmem_jax.pipeline.stage import run_stage
from mlpmem_jax.store.run_record import RunRecord
from mlpmem_jax.studies.tables.seed_plan import model_parts
from mlpmem_jax.studies.tables.variants import Variant
from tests.pipeline.tokenizing import files_of

HERE = Path(__file__).resolve().parent
TINY = HERE.parents[1] / "configs" / "tiny.yaml"
SAVE = "mlpmem_jax.training.checkpoint.Checkpoints.save"
FINISH = "mlpmem_jax.store.manifest.Artifact.finish"
JOINT = (
    "train.mode=joint",
    "memory.gate=learned",
    "train.num_steps=5",
)
REFRESHED = (*JOINT, "train.refresh_interval_steps=3")
# Where the process is killed, and the role of the artifact that is then begun and not finished.
KILLS = [
    (FINISH, 1, "before", "joint/step-3"),
    (FINISH, 2, "before", "decoder [step 3]"),
    ("mlpmem_jax.store.shards.write_rows", 5, "after", "datastore/train [step 3]"),
    (FINISH, 5, "before", "targets/train [step 3]"),
    (SAVE, 1, "after", "joint"),
]


def _main(workdir, command, *overrides):
    return main([command, "--config", str(TINY), "--workdir", str(workdir), *overrides])


def _copy(tiny_run, path):
    """A run whose decoder, datastore, targets and memory are finished."""
    shutil.copytree(tiny_run.workdir, path)
    return path


def _artifacts(workdir, overrides=()):
    return Artifacts(resolved(load_config(TINY, overrides, {"workdir": str(workdir)})))


def _rebuilt_with_other_bits(artifact):
    """Stands for a rebuild on other hardware: another fingerprint under the same id."""
    manifest = artifact.load()
    artifact.begin(manifest.made_from)
    artifact.finish(
        counts={**manifest.counts, "again": 1}, arrays=manifest.arrays, files=manifest.files
    )


def _weights(workdir, overrides):
    networks = finished_networks(_artifacts(workdir, overrides), single_device_mesh())
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
    for function, number, when, role in KILLS:
        command = [sys.executable, str(HERE / "killed.py"), function, str(number), when]
        died = subprocess.run(
            [*command, *arguments], env=environment, capture_output=True, text=True, timeout=300
        )
        assert died.returncode == -signal.SIGKILL, (function, number, died.stdout, died.stderr)
        path = RunRecord.read(workdir).artifact(role, "killed").path
        assert (path / "building.json").exists(), (number, died.stdout)
        assert not (path / "manifest.json").exists(), (function, number)
    assert main(arguments) == 0
    for a, b in zip(_weights(workdir, REFRESHED), _weights(refreshed, REFRESHED), strict=True):
        np.testing.assert_array_equal(a, b)


def test_phases_change_the_targets_and_skip_where_they_still_agree(refreshed, tmp_path, capsys):
    run = _artifacts(refreshed, REFRESHED)
    phase, joint = run.joint_phases[0].load(), run.joint.load()
    assert 0 < phase.measured["neighbor_agreement"] < 1
    assert Phases(run).refreshed(0).targets("train").relative in joint.made_from
    assert run.targets("train").relative not in joint.made_from
    # They do not take the place of the run's own where others look for its targets.
    roles = RunRecord.read(refreshed).roles
    assert roles["targets/train"] == run.targets("train").relative
    # Of five steps the first phase makes three; each is charged for its own.
    flops = joint.measured["model_flops"]
    assert phase.measured["model_flops"] / flops == pytest.approx(3 / 2)
    workdir = tmp_path / "run"
    shutil.copytree(refreshed, workdir)
    kept = [*REFRESHED, "train.refresh_agreement=0.001"]
    capsys.readouterr()
    assert _main(workdir, "train", *kept) == 0
    assert re.search(r"decoder \[step 3\] \(\w{8}\): not needed \(", capsys.readouterr().out)
    other = _artifacts(workdir, kept)
    assert other.targets("train").relative in other.joint.load().made_from
    assert _artifacts(workdir, REFRESHED).joint.load() == joint


def test_evaluation_and_generation_use_the_gate(refreshed, capsys):
    assert _main(refreshed, "evaluate", *REFRESHED) == 0
    run = _artifacts(refreshed, REFRESHED)
    made = run.results.load()
    results = json.loads((run.results.path / "evaluate.json").read_text())
    memory = results["systems"]["memory"]
    assert memory["interpolation_source"] == "gate"
    assert 0 < memory["interpolation"] < 1
    # The decoder of the joint model, not the one that it began with.
    beside = results["diagnostics"]["test"]["decoder_beside_memory_nats"]
    for command in (["generate"], ["evaluate", "--rebuild"]):  # also where a gate makes λ
        assert _main(refreshed, *command, *REFRESHED, "train.interpolation=0.7") == 2
        told = capsys.readouterr().err
        assert f"(the nearest is {run.joint.path.name[:8]}: train.interpolation=0.3, now" in told
        assert run.results.load() == made
    assert beside != pytest.approx(results["systems"]["decoder"]["test_nats"], abs=1e-6)
    assert memory["test_nats"] == pytest.approx(beside, abs=0.1)
    row = results["systems"]["joint_decoder"]
    assert row["test_nats"] == pytest.approx(beside, rel=1e-6)
    assert row["parameters"] == results["systems"]["decoder"]["parameters"]
    assert _main(refreshed, "generate", *REFRESHED) == 0
    assert "λ of the gate" in capsys.readouterr().out


@pytest.mark.parametrize("overrides", [REFRESHED, ()])
def test_what_the_memory_was_not_trained_to_read_is_not_mixed_with_it(refreshed, capsys, overrides):
    """Other settings are other artifacts: those that are not there are named with the nearest."""
    run = _artifacts(refreshed, overrides)
    if not run.results.is_complete():
        assert _main(refreshed, "evaluate", *overrides) == 0
    results = run.results.load()
    before = [(refreshed / name).read_text() for name in ("config.yaml", "run.json")]
    capsys.readouterr()
    for command, key, value, missing in (
        ("evaluate", "datastore.input.layer", "0.5", "datastore/train"),
        ("generate", "datastore.input.layer", "0.5", "the memory"),
        ("evaluate", "retrieval.num_neighbors", "8", "index"),
        ("evaluate", "corpus.attention", "within", "decoder"),
    ):
        more = [f"{key}={value}", *(["--rebuild"] if command == "evaluate" else [])]
        assert _main(refreshed, command, *overrides, *more) == 2
        (told,) = capsys.readouterr().err.splitlines()
        now = value if value != "within" else json.dumps(value)
        assert f": {missing} " in told and f"{key}=" in told and f", now {now})" in told
        assert run.results.load() == results
        if command == "evaluate":
            assert _main(refreshed, command, *overrides, more[0], "--dry-run") == 0
            shown = capsys.readouterr().out
            assert "REFUSED: " in shown and "(the nearest is " in shown and key in shown
    after = [(refreshed / name).read_text() for name in ("config.yaml", "run.json")]
    assert after == before


def test_neighbours_of_other_keys_are_not_mixed_with_them(refreshed, tmp_path, capsys):
    """`retrieve` was not run after `embed`, or after it has built the same rows anew."""
    workdir = tmp_path / "run"
    shutil.copytree(refreshed, workdir)
    other = ("datastore.key.layer=0.5", *REFRESHED)
    assert _main(workdir, "embed", *other) == 0
    capsys.readouterr()
    assert _main(workdir, "evaluate", "--rebuild", *other) == 2
    told = capsys.readouterr().err
    assert "index does not exist; make it with the command `index` (the nearest is" in told
    assert "datastore.key.layer=" in told and "now 0.5" in told
    run = _artifacts(workdir, REFRESHED)
    _rebuilt_with_other_bits(run.datastore("train"))
    assert _main(workdir, "evaluate", "--rebuild", *REFRESHED) == 2
    told = capsys.readouterr().err
    assert f"index is stale, built from another {run.datastore('train').relative}=" in told
    assert "index --rebuild" in told


def test_another_input_makes_another_memory_beside_the_old_one(tiny_run, tmp_path, capsys):
    workdir = _copy(tiny_run, tmp_path / "run")
    base, other = _artifacts(workdir), _artifacts(workdir, ["datastore.input.layer=0.5"])
    before = files_of(base.memory)
    for command in ("embed", "index", "retrieve", "train"):
        assert _main(workdir, command, "datastore.input.layer=0.5") == 0
    assert other.memory.is_complete() and other.memory.relative != base.memory.relative
    assert other.decoder.relative == base.decoder.relative
    assert files_of(base.memory) == before
    # Neither has anything to do with the rows of the other.
    weight = "generate.interpolation=0.5"
    for overrides in ((), ("datastore.input.layer=0.5",)):
        assert _main(workdir, "generate", weight, *overrides) == 0
    # A network whose input was rebuilt with other bits is refused.
    _rebuilt_with_other_bits(base.decoder)
    capsys.readouterr()
    assert _main(workdir, "generate", weight) == 2
    told = capsys.readouterr().err
    assert f"memory was trained with another {base.decoder.path} (" in told
    assert "`train --rebuild`" in told


def test_online_training_records_what_the_memory_reads(tiny_run, tmp_path, capsys):
    workdir = _copy(tiny_run, tmp_path / "run")
    online = ("train.inputs=online", "train.num_steps=2", "train.optimizer.warmup_steps=0")
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
    run, base = _artifacts(workdir, overrides), _artifacts(workdir)
    mesh = single_device_mesh()
    decoder, memory = finished_networks(run, mesh)
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
    assert max(moved.values()) < 1.5 * run.config.train.optimizer.learning_rate


def test_a_gate_is_trained_offline_from_stored_logprobs(tiny_run, tmp_path, capsys):
    workdir = _copy(tiny_run, tmp_path / "run")
    overrides = ("memory.gate=learned", "train.joint_weight=1")
    # What was trained without a gate has none to use.
    for command in ("evaluate", "generate"):
        assert _main(workdir, command, *overrides) == 2
        assert 'memory.gate="none", now "learned"' in capsys.readouterr().err
    for command in ("train", "evaluate"):
        assert _main(workdir, command, *overrides) == 0
    run = _artifacts(workdir, overrides)
    results = json.loads((run.results.path / "evaluate.json").read_text())
    assert results["systems"]["memory"]["interpolation_source"] == "gate"
    # Tables of several runs mix with the same gate.
    parts = model_parts(Variant.of(run))
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


def test_another_interpolation_than_the_trained_one_is_another_memory(tiny_run, tmp_path, capsys):
    workdir = _copy(tiny_run, tmp_path / "run")
    joint = ("train.mode=joint", "train.num_steps=2", "train.optimizer.warmup_steps=1")
    assert _main(workdir, "train", *joint) == 0
    capsys.readouterr()
    assert _main(workdir, "generate", *joint, "train.interpolation=0.9") == 2
    assert ": train.interpolation=0.3, now 0.9)" in capsys.readouterr().err
    assert _main(workdir, "generate", *joint) == 0
    offline = ("train.joint_weight=1", "train.interpolation=0.9")
    kept = _artifacts(workdir).results.path / "manifest.json"
    results = kept.read_bytes()
    capsys.readouterr()
    for command in (
        ["generate"], ["evaluate", "--rebuild"], ["analyze"], ["cost", "cost.prompt_tokens=16"],
    ):  # fmt: skip
        assert _main(workdir, *command, *offline) == 2
        (told,) = capsys.readouterr().err.splitlines()
        assert "train.interpolation=0.3, now 0.9" in told
        assert "train.joint_weight=0.0, now 1.0" in told
    assert kept.read_bytes() == results


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
    assert not (workdir / "artifacts" / "joint").exists()


def test_a_teacher_elsewhere_gives_the_same_targets(tiny_run, tmp_path):
    """Tokens and decoder of a run, targets of another run directory."""
    workdir = tmp_path / "run"
    for part in ("tokenizer", "tokens", "decoder"):
        shutil.copytree(f"{tiny_run.workdir}/artifacts/{part}", workdir / "artifacts" / part)
    own = _copy(tiny_run, tmp_path / "own")
    assert _main(workdir, "train", *JOINT, f"targets.workdir={tiny_run.workdir}") == 0
    assert _main(own, "train", *JOINT) == 0
    for a, b in zip(_weights(workdir, JOINT), _weights(own, JOINT), strict=True):
        np.testing.assert_array_equal(a, b)
