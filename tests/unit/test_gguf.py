"""Decoders and tokenizers of GGUF files, written by the package `gguf`."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from mlpmem_jax.config.networks import DecoderConfig
from mlpmem_jax.config.pretrained import missing_tokenizer, pretrained_decoder, pretrained_keys
from mlpmem_jax.config.rope import RopeScaling
from mlpmem_jax.corpus.tokenizer import read_tokenizer, train_tokenizer
from mlpmem_jax.errors import ConfigError, UserError
from mlpmem_jax.interop import gguf as ours
from mlpmem_jax.interop.gguf import GgufTensors, tensor_files
from mlpmem_jax.interop.huggingface import load_decoder
from mlpmem_jax.parallel.mesh import single_device_mesh
from tests.gguf_files import byte_level_tables, write_gguf

gguf = pytest.importorskip("gguf", reason="needs the package gguf (optional)")
MODELS = Path(__file__).with_name("golden") / "pretrained"


def _config(path: Path, **changed: Any) -> DecoderConfig:
    return pretrained_decoder(str(path), **changed)


def _parameters(path: Path, config: DecoderConfig, vocab_size: int = 40) -> Any:
    decoder = load_decoder(str(path), config, vocab_size, single_device_mesh())
    return nnx.to_pure_dict(nnx.state(decoder, nnx.Param))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose rows are whole blocks of the quantised types."""
    folder = tmp_path_factory.mktemp("wide")
    settings = json.loads((MODELS / "llama" / "config.json").read_text())
    settings |= {"hidden_size": 64, "head_dim": 16, "intermediate_size": 96}
    (folder / "config.json").write_text(json.dumps(settings))
    rng = np.random.default_rng(0)
    sizes = {16: 64, 24: 96, 4: 16, 8: 32, 40: 40}
    tensors = {
        name: rng.standard_normal([sizes[n] for n in tensor.shape]).astype(np.float32)
        for name, tensor in load_file(MODELS / "llama" / "model.safetensors").items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-biases", "mistral", "qwen2", "qwen3",
                                  "olmo2", "llama-tied", "mistral-window"])  # fmt: skip
def test_each_family_equals_its_directory(name: str, tmp_path: Path):
    file = write_gguf(tmp_path / "model.gguf", MODELS / name)
    folder = MODELS / name
    assert _config(file) == _config(folder)
    config = _config(folder)
    expected, found = _parameters(folder, config), _parameters(file, config)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_quantised_tensors_are_those_that_the_package_makes(kind: str, wide: Path, tmp_path: Path):
    """Rows are quantised one by one, so that their order has no effect."""
    file = write_gguf(tmp_path / "model.gguf", wide, kind)
    quants = gguf.GGMLQuantizationType[kind]
    rounded = Path(shutil.copytree(wide, tmp_path / "rounded"))
    tensors = {
        name: gguf.quants.dequantize(gguf.quants.quantize(tensor, quants), quants)
        if tensor.ndim > 1
        else tensor
        for name, tensor in load_file(wide / "model.safetensors").items()
    }
    save_file(tensors, rounded / "model.safetensors")
    assert _config(file) == _config(rounded)
    found, expected = (_parameters(path, _config(wide)) for path in (file, rounded))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_frequencies_of_llama3(wide: Path, tmp_path: Path):
    """A file holds what the frequencies are divided by; others than Llama 3.1's are refused."""
    scaling = RopeScaling(kind="llama3", factor=32.0)
    divisors = 1 / np.array(scaling.factors(8, 500000.0), np.float32)
    tensors = load_file(wide / "model.safetensors")
    folder = Path(shutil.copytree(wide, tmp_path / "scaled"))
    settings = json.loads((folder / "config.json").read_text())
    settings["rope_parameters"]["rope_theta"] = 500000.0
    (folder / "config.json").write_text(json.dumps(settings))
    for changed in (1.0, 1.5):
        tensors["rope_freqs.weight"] = divisors * np.array([1] * 3 + [changed] + [1] * 4, "f4")
        save_file(tensors, folder / "model.safetensors")
        file = write_gguf(tmp_path / f"{changed}.gguf", folder)
        if changed == 1:
            assert _config(file).rope_scaling == scaling
            assert GgufTensors(str(file)).shapes.keys() == tensor_names(wide)
        else:
            with pytest.raises(ConfigError, match=r"rope_freqs\.weight: frequencies that are not"):
                pretrained_keys(str(file))


def tensor_names(folder: Path) -> set[str]:
    names = load_file(folder / "model.safetensors")
    return {name.removeprefix("model.") for name in names}


def test_scaled_positions_in_the_metadata(wide: Path, tmp_path: Path):
    linear = {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}
    file = write_gguf(tmp_path / "a.gguf", wide, **linear)
    assert _config(file).rope_scaling == RopeScaling(kind="linear", factor=4.0)
    other = {"llama__rope__scaling__type": "yarn", "llama__rope__scaling__yarn_ext_factor": 2.0}
    file = write_gguf(tmp_path / "b.gguf", wide, **other)
    with pytest.raises(ConfigError, match=r"llama\.rope\.scaling\.yarn_ext_factor=2\.0 is not"):
        pretrained_keys(str(file))


@pytest.fixture(scope="module")
def with_tokenizer(wide: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    text = "the cat sat on the mat, and the rat 123 ran\n\n  to the cat's 4 mats — été " * 9
    trained = train_tokenizer([text], 280, "<|endoftext|>").to_json()
    file = tmp_path_factory.mktemp("tokens") / "model.gguf"
    return write_gguf(file, wide, **byte_level_tables(trained)), trained


def test_its_tokenizer(with_tokenizer: tuple[Path, bytes], tmp_path: Path):
    file, trained = with_tokenizer
    (tmp_path / "tokenizer.json").write_bytes(trained)
    keys = pretrained_keys(str(file))
    assert keys["tokenizer.path"] == str(file)
    assert keys["tokenizer.separator"] == "<|endoftext|>"
    found = read_tokenizer(str(file), "<|endoftext|>")
    expected = read_tokenizer(str(tmp_path / "tokenizer.json"), "<|endoftext|>")
    assert (found.vocab_size, found.separator_id) == (expected.vocab_size, 0)
    texts = ["the cats' mat 1234", "  été\n\n", "<|endoftext|>", "ß\x00🎉"]
    for a, b in zip(found.encode(texts), expected.encode(texts), strict=True):
        np.testing.assert_array_equal(a, b)
        assert found.decode(a) == expected.decode(b)


def test_a_tokenizer_of_sentencepiece(wide: Path, tmp_path: Path):
    """The best merge is that of the highest score; characters without a token become bytes."""
    letters = [*"\u2581abcd", "ab", "\u2581a", "cd", "abcd", "bc"]
    tokens = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), *letters]
    scores = [0.0] * 258 + [-1e9] * 5 + [-1.0, -3.0, -2.0, -5.0, 0.0]
    tables = {
        "tokenizer__ggml__model": "llama",
        "tokenizer__ggml__tokens": tokens,
        "tokenizer__ggml__scores": scores,
        "tokenizer__ggml__token_type": [2, 3] + [6] * 256 + [1] * len(letters),
        "tokenizer__ggml__bos_token_id": 1,
    }
    file = write_gguf(tmp_path / "model.gguf", wide, **tables)
    assert pretrained_keys(str(file))["tokenizer.separator"] == "<s>"
    tokenizer = read_tokenizer(str(file), "<s>")

    def pieces(text: str) -> list[str]:
        [ids] = tokenizer.encode([text])
        assert tokenizer.decode(ids) == text
        return [tokens[number] for number in ids]

    assert pieces("abd") == ["\u2581", "ab", "d"]  # before "\u2581a", which has a lower score
    assert pieces("abcd a") == ["\u2581a", "bc", "d", "\u2581a"]  # "bc" is joined first
    assert pieces("\u00e9\n") == ["\u2581", "<0xC3>", "<0xA9>", "<0x0A>"]
    assert pieces("<s>") == ["\u2581", "<0x3C>", "<0x73>", "<0x3E>"]  # text stays text


@pytest.mark.parametrize(
    ("tables", "expected"),
    [
        ({"model": "t5"}, "its tokenizer is of the kind t5, and supported are gpt2, llama"),
        ({"model": "llama"}, "its tokenizer has no tokenizer.ggml.tokens"),
        ({"model": "gpt2", "pre": "tekken"}, "cuts words as tekken does; supported are gpt-2"),
        ({"model": "gpt2", "pre": "gpt-2"}, "has no tokenizer.ggml.tokens"),
    ],
)
def test_other_tokenizers_ask_for_a_path(tables, expected: str, wide: Path, tmp_path: Path):
    tables = {f"tokenizer__ggml__{key}": value for key, value in tables.items()}
    file = write_gguf(tmp_path / "model.gguf", wide, **tables)
    assert "tokenizer.path" not in pretrained_keys(str(file))
    assert expected in missing_tokenizer(str(file))
    with pytest.raises(ConfigError, match=expected):
        read_tokenizer(str(file), "<s>")


def test_what_is_damaged_or_not_supported(wide: Path, tmp_path: Path, monkeypatch):
    file = write_gguf(tmp_path / "model.gguf", wide)
    content = file.read_bytes()

    def refused(changed: bytes, expected: str) -> None:
        file.write_bytes(changed)
        with pytest.raises(ConfigError, match=expected):
            pretrained_keys(str(file))

    refused(b"", "is no whole GGUF file")
    refused(b"GGML" + content[4:], "does not begin with GGUF")
    refused(content[:4] + b"\x09\0\0\0" + content[8:], "version 9")
    refused(content[:300], "is no whole GGUF file")
    refused(content.replace(b"llama", b"gamma"), "general.architecture='gamma'; supported are gpt2")
    file.write_bytes(content[:-100])
    with pytest.raises(UserError, match="cut off, .* is not whole"):
        _parameters(file, _config(wide))
    with pytest.raises(ConfigError, match="cannot be read \\(no such file"):
        pretrained_keys(str(tmp_path / "other.gguf"))
    file.write_bytes(content)
    digest = tensor_files(str(file)).digest()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert tensor_files(str(file)).digest() != digest
    experts = write_gguf(tmp_path / "experts.gguf", wide, llama__expert_count=8)
    with pytest.raises(ConfigError, match="mixtures of experts are not supported"):
        pretrained_keys(str(experts))
    monkeypatch.setattr(ours, "_TYPES", ("F16",))
    with pytest.raises(UserError, match="is of the type F32; supported are F16"):
        GgufTensors(str(experts))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="GGUF files require the package gguf"):
        GgufTensors(str(experts))
