"""Memories of the official release: outputs, the way in and out, and refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mlpmem_jax.config.load import load_config
from mlpmem_jax.config.networks import DecoderConfig, MemoryConfig
from mlpmem_jax.config.pretrained_memory import memory_keys
from mlpmem_jax.errors import ConfigError, UserError
from mlpmem_jax.interop.huggingface import save_tensors
from mlpmem_jax.interop.memories import load_memory, memory_tensors, official_settings
from mlpmem_jax.interop.settings import huggingface_settings
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.parallel.mesh import single_device_mesh
from tests.unit.official_memories import FORMS, official_logits, write_official

VOCAB, WIDTH = 40, 16


def _memory(folder: Path, width: int = WIDTH, vocab: int = VOCAB, **given: int) -> Memory:
    keys = {key.removeprefix("memory."): v for key, v in memory_keys(str(folder)).items()}
    mesh = single_device_mesh()
    return load_memory(str(folder), MemoryConfig(**keys), width, vocab, mesh, **given)


@pytest.fixture
def official(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    write_official(tmp_path / "memory", "llama", VOCAB, WIDTH, WIDTH)
    return tmp_path / "memory"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("input_width", [WIDTH, 24], ids=["equal-widths", "transform"])
def test_outputs_are_those_of_the_official_forward_pass(form, input_width, tmp_path: Path):
    write_official(tmp_path / "memory", form, VOCAB, WIDTH, input_width)
    memory = _memory(tmp_path / "memory", input_width)
    state = 3 * np.random.default_rng(1).standard_normal((2, 5, input_width)).astype(np.float32)
    found = np.asarray(memory.logits(memory.hidden(memory.inputs(state))))
    tensors = load_file(tmp_path / "memory" / "model.safetensors")
    expected = official_logits(form, tensors, state)
    np.testing.assert_allclose(found[..., :VOCAB], expected, atol=1e-4)
    assert np.isneginf(found[..., VOCAB:]).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("input_width", [WIDTH, 24], ids=["equal-widths", "transform"])
def test_what_is_written_is_what_was_read(form, input_width, tmp_path: Path):
    """Every tensor bit for bit, by the official names, and the same shape by its configuration."""
    write_official(tmp_path / "memory", form, VOCAB, WIDTH, input_width)
    memory = _memory(tmp_path / "memory", input_width)
    gpt2 = {"norm": "layer", "positions": "learned", "activation": "gelu", "biases": "all"}
    decoder = DecoderConfig(width=input_width, **gpt2 if form == "gpt2" else {})
    settings = official_settings(
        memory.config, input_width, "ffn_input", huggingface_settings(decoder, VOCAB, 0)
    )
    out = tmp_path / "out"
    out.mkdir()
    save_tensors(memory_tensors(memory, input_width), out, file_bytes=5000)
    (out / "config.json").write_text(json.dumps(settings))
    assert memory_keys(str(out)) == memory_keys(str(tmp_path / "memory"))
    index = json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]
    written = {name: load_file(out / file)[name] for name, file in index.items()}
    read = load_file(tmp_path / "memory" / "model.safetensors")
    assert written.keys() == read.keys()
    for name, tensor in read.items():
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)


def test_a_temperature_divides_the_logits(official: Path):
    state = np.random.default_rng(1).standard_normal((3, WIDTH)).astype(np.float32)
    memory = _memory(official)
    config = memory.config.model_copy(update={"temperature": 2.5})
    warm = load_memory(str(official), config, WIDTH, VOCAB, single_device_mesh())
    one, other = (np.asarray(each.logits(each.hidden(state)))[:, :VOCAB] for each in (memory, warm))
    np.testing.assert_allclose(other, one / 2.5, atol=1e-5)


def test_spare_rows_of_the_decoder_are_left_out(official: Path):
    found = _memory(official, vocab=37, decoder_rows=VOCAB)
    tensors = load_file(official / "model.safetensors")
    np.testing.assert_array_equal(found.head_VE()[:37], tensors["lm_head.weight"][:37])
    assert not np.any(found.head_VE()[37:])


@pytest.mark.parametrize("vocab", [37, 41])
def test_another_vocabulary_is_refused(official: Path, vocab: int):
    with pytest.raises(UserError, match=f"has 40 rows for a tokenizer of {vocab} tokens"):
        _memory(official, vocab=vocab)


def test_wrong_tensors_are_all_named(official: Path):
    tensors = load_file(official / "model.safetensors")
    del tensors["norm.weight"], tensors["lm_head.weight"]
    tensors["layers.0.mlp.other.weight"] = np.zeros(3, np.float32)
    tensors["layers.1.mlp.up_proj.weight"] = np.zeros((9, WIDTH), np.float32)
    save_file(tensors, official / "model.safetensors")
    with pytest.raises(UserError) as caught:
        _memory(official)
    message = str(caught.value)
    assert message.startswith(f"memory.pretrained={official}: missing: lm_head.weight, norm.weight")
    assert "unexpected: layers.0.mlp.other.weight" in message
    assert "layers.1.mlp.up_proj.weight has the shape [9, 16], a memory" in message


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_hidden_layers": 3}, "num_hidden_layers=3: the tensors are those of 2 blocks"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu': supported are silu"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps='x' must be a number above 0"),
    ],
)
def test_what_is_not_supported_is_refused(official: Path, settings, expected: str):
    file = official / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    with pytest.raises(ConfigError) as caught:
        memory_keys(str(official))
    assert any(expected in line for line in caught.value.messages)


def test_other_directories_are_refused(official: Path):
    tensors = load_file(official / "model.safetensors")

    def refused(held: dict[str, np.ndarray], expected: str) -> None:
        save_file(held, official / "model.safetensors")
        with pytest.raises(ConfigError, match=expected):
            memory_keys(str(official))

    refused({"a": tensors["norm.weight"]}, "its tensors are those of no supported memory")
    query = {"layers.0.self_attn.q_proj.weight": tensors["norm.weight"]}
    refused(tensors | query, r"holds a decoder \(layers.0.self_attn.q_proj.weight and 0 more")
    flat = {"layers.0.mlp.gate_proj.weight": tensors["norm.weight"]}
    refused(tensors | flat, r"has the shape \[16\]: it must have two dims")
    save_file(tensors, official / "model.safetensors")
    (official / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json cannot be read \(No such file"):
        memory_keys(str(official))
    (official / "model.safetensors").rename(official / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"pytorch_model\.bin is a pickle, which is never read"):
        memory_keys(str(official))


def test_a_configuration_takes_the_shape_from_it(official: Path, tmp_path: Path):
    file = tmp_path / "run.yaml"
    file.write_text(f"decoder: {{width: 16}}\nmemory: {{pretrained: {official}}}\n")
    config = load_config(file)
    assert config.memory.width == 16 and config.memory.num_layers == 2
    assert config.memory.ffn_width == 64 and config.memory.input_norm == "none"
    assert config.datastore.input.site == "ffn_input" and config.datastore.input.layer == 1.0
    assert load_config(file, ["datastore.input.layer=0.5"]).datastore.input.layer == 0.5
    for override, expected in {
        "memory.width=32": "memory.width=32: the memory in memory.pretrained=",
        "memory.recent_tokens=2": "memory.recent_tokens=2: the memory in",
        "memory.gate=learned": "memory.gate=learned: the memory in",
        "decoder.width=32": "reads states of width 16, and decoder.width=32",
        "train.mode=joint": "set train.memory_start=checkpoint",
    }.items():
        with pytest.raises(ConfigError) as caught:
            load_config(file, [override])
        assert any(expected in line for line in caught.value.messages), override
