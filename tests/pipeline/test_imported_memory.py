"""A run whose memory is read from a directory of the official form, and exports of memories."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file, save_file

from mlpmem_jax.__main__ import main
from mlpmem_jax.config.load import load_config
from mlpmem_jax.config.schema import Config
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.networks import finished_memory
from mlpmem_jax.pipeline.opened_run import open_run
from mlpmem_jax.pipeline.resolve import resolved
from tests.pipeline.conftest import TINY
from tests.unit.official_memories import official_tensors, write_official


@pytest.fixture
def run(tiny_run: Config, tmp_path: Path) -> tuple[Path, Path]:
    """A configuration that shares all but the memory with the tiny run, and its memory."""
    workdir = Path(shutil.copytree(tiny_run.workdir, tmp_path / "run"))
    width = tiny_run.decoder.width
    vocab = open_run(workdir).tokenizer().vocab_size
    write_official(tmp_path / "memory", "llama", vocab, width, width)
    settings = yaml.safe_load(TINY.read_text()) | {"workdir": str(workdir)}
    settings["memory"] = {"pretrained": str(tmp_path / "memory")}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file, tmp_path / "memory"


def test_it_is_evaluated_used_and_written_again(run, tmp_path: Path, capsys):
    file, folder = run
    assert main(["run", "--config", str(file)]) == 0
    assert "parameters read from" in capsys.readouterr().out
    made = Artifacts(resolved(load_config(file)))
    assert made.results.is_complete()
    tensors = load_file(folder / "model.safetensors")
    memory = finished_memory(made, single_device_mesh())
    np.testing.assert_array_equal(
        np.asarray(memory.head_VE())[: memory.vocab_size], tensors["lm_head.weight"]
    )

    out = tmp_path / "out"
    arguments = ["export", "--config", str(file), "--output"]
    assert main([*arguments, str(out), "--what", "memory"]) == 0
    assert "a memory in the official layout (llama); it reads the input" in capsys.readouterr().out
    written = load_file(out / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)
    assert main([*arguments, str(tmp_path / "both"), "generate.interpolation=0.25"]) == 0
    both = load_file(tmp_path / "both" / "model.safetensors")
    held = {name.removeprefix("memory."): both[name] for name in both if "memory." in name}
    assert held.keys() == tensors.keys()

    # Nothing is read twice; other weights are noticed, and are another memory beside it.
    assert main(["train", "--config", str(file)]) == 0
    assert "parameters read from" not in capsys.readouterr().out
    vocab, width = tensors["lm_head.weight"].shape
    changed = official_tensors("llama", vocab, width, width, seed=1)
    save_file(changed, folder / "model.safetensors")
    assert main(["train", "--config", str(file)]) == 0
    assert "parameters read from" in capsys.readouterr().out
    assert Artifacts(made.config).memory.path != made.memory.path
    del changed["norm.weight"]
    save_file(changed, folder / "model.safetensors")
    assert main(["train", "--config", str(file)]) == 2
    assert "missing: norm.weight" in capsys.readouterr().err
    assert main(["compare", "--config", str(file)]) == 2
    assert "compare trains memories, and an imported one is not" in capsys.readouterr().err


def test_joint_training_begins_with_it_and_with_no_other(run, tmp_path: Path):
    file, folder = run
    vocab, width = load_file(folder / "model.safetensors")["lm_head.weight"].shape
    write_official(tmp_path / "other", "llama", vocab, width, width)
    tensors = official_tensors("llama", vocab, width, width, seed=1)
    save_file(tensors, tmp_path / "other" / "model.safetensors")
    joint = [
        "train.mode=joint", "train.memory_start=checkpoint", "train.num_steps=2",
        "train.optimizer.warmup_steps=1", "train.decoder_optimizer.warmup_steps=1",
    ]  # fmt: skip
    other = [*joint, f"memory.pretrained={tmp_path / 'other'}"]
    config = resolved(load_config(file, joint))
    for command in ("embed", "index", "retrieve", "train"):  # Official memories read another state.
        assert main([command, "--config", str(file), *joint]) == 0
    made = Artifacts(config)
    weights = made.memory.load().recipe["weights"]
    assert made.memory.relative in made.joint.load().made_from
    # Another one is imported, and trained beside it.
    assert main(["train", "--config", str(file), "--dry-run", *other]) == 0
    beside = Artifacts(resolved(load_config(file, other)))
    assert beside.sources.weights(str(tmp_path / "other")) != weights
    assert beside.joint.relative != made.joint.relative


def test_decoder_and_memory_are_written(tiny_run: Config, tmp_path: Path, capsys):
    arguments = ["export", "--config", str(TINY), "--workdir", tiny_run.workdir, "--output"]
    assert main([*arguments, str(tmp_path / "both")]) == 0
    assert "with its memory (λ = " in capsys.readouterr().out
    about = json.loads((tmp_path / "both" / "config.json").read_text())
    assert about["text_config"]["model_type"] == "llama"
    assert about["mlp_memory"]["recent_tokens"] == tiny_run.memory.recent_tokens
    results = open_run(tiny_run.workdir).results()["systems"]["memory"]
    assert about["mlp_memory"]["interpolation"] == results["interpolation"]
    names = {file.name for file in (tmp_path / "both").iterdir()}
    assert {"modeling_mlpmem.py", "tokenizer.json", "generation_config.json"} < names
    assert main([*arguments, str(tmp_path / "alone"), "--what", "decoder"]) == 0
    both, alone = (load_file(tmp_path / name / "model.safetensors") for name in ("both", "alone"))
    assert {name for name in both if not name.startswith("memory.")} == alone.keys()


def test_what_cannot_be_written_is_refused(tiny_run: Config, tmp_path: Path, capsys):
    arguments = ["export", "--config", str(TINY), "--workdir", tiny_run.workdir, "--output"]
    out = tmp_path / "out"

    def refused(expected: str, *more: str) -> None:
        assert main([*arguments, str(out), *more]) == 2
        assert expected in capsys.readouterr().err
        assert not list(tmp_path.iterdir())

    refused(
        "no official memory has memory.input_norm=standardize, memory.recent_tokens=2",
        "--what", "memory",
    )  # fmt: skip
    refused("argument --what: invalid choice: 'both'", "--what", "both")
    refused("the memory is not trained yet", "--what", "model", "memory.width=40")
