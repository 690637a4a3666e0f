"""Decoders of Hugging Face directories: logits of `transformers`, and refusals.

The directories under golden/pretrained, and the logits in them, are made by the script there.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from mlpmem_jax.config.load import load_config
from mlpmem_jax.config.networks import DecoderConfig
from mlpmem_jax.config.pretrained import pretrained_decoder, pretrained_keys
from mlpmem_jax.errors import ConfigError, UserError
from mlpmem_jax.interop.huggingface import load_decoder, save_decoder
from mlpmem_jax.interop.settings import huggingface_settings
from mlpmem_jax.interop.tensors import TensorFiles
from mlpmem_jax.parallel.mesh import single_device_mesh

MODELS = Path(__file__).with_name("golden") / "pretrained"
VOCAB = 40
NEWER = [
    "llama-biases",
    "mistral-window",
    "olmo2",
    "qwen3",
    "rope-linear",
    "rope-llama3",
    "rope-yarn",
]
# Beyond its window, where by default the context ends.
LONGER = {"mistral-window": {"context_tokens": 32}}
GPT2 = {"norm": "layer", "positions": "learned", "activation": "gelu", "biases": "all"}


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A copy of a model, to be changed."""
    return Path(shutil.copytree(MODELS / "llama", tmp_path / "llama"))


def _edit(file: Path, **settings: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def _config(folder: Path, **changed: object) -> DecoderConfig:
    return pretrained_decoder(str(folder), **changed)


def _logits(folder: Path, tokens: np.ndarray, **changed: object) -> np.ndarray:
    decoder = load_decoder(str(folder), _config(folder, **changed), VOCAB, single_device_mesh())
    graphdef, state = nnx.split(decoder)

    @jax.jit
    def run(state, tokens_BL):
        decoder = nnx.merge(graphdef, state)
        return decoder.logits(decoder.hidden(tokens_BL)[0])

    return np.asarray(run(state, tokens.astype(np.int32)))


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-tied", "mistral", "qwen2", *NEWER])
def test_logits_are_those_of_transformers(name: str):
    stored = np.load(MODELS / name / "logits.npz")
    found = _logits(MODELS / name, stored["tokens"], **LONGER.get(name, {}))
    np.testing.assert_allclose(found[..., :VOCAB], stored["logits"], atol=1e-4)
    assert np.isneginf(found[..., VOCAB:]).all()


def test_shards_bfloat16_prefixes_and_spare_rows(llama: Path):
    """Other files of the same decoder: two shards, no prefix, more embeddings than tokens."""
    tensors = load_file(llama / "model.safetensors")
    stored = np.load(llama / "logits.npz")
    renamed = {name.removeprefix("model."): tensor for name, tensor in tensors.items()}
    for name in ("embed_tokens.weight", "lm_head.weight"):
        renamed[name] = np.concatenate([renamed[name], np.ones((24, 16), np.float32)])
    renamed["layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    shards = {"a.safetensors": {}, "b.safetensors": {}}
    for place, (name, tensor) in enumerate(renamed.items()):
        shards[list(shards)[place % 2]][name] = tensor
    (llama / "model.safetensors").unlink()
    index = {name: file for file, held in shards.items() for name in held}
    for file, held in shards.items():
        save_file(held, llama / file)
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    found = _logits(llama, stored["tokens"])
    np.testing.assert_allclose(found[..., :VOCAB], stored["logits"], atol=1e-4)

    rounded = {name: tensor.astype(jax.numpy.bfloat16) for name, tensor in tensors.items()}
    (llama / "model.safetensors.index.json").unlink()
    save_file(rounded, llama / "model.safetensors")
    wide = {name: tensor.astype(np.float32) for name, tensor in rounded.items()}
    half = _logits(llama, stored["tokens"])
    save_file(wide, llama / "model.safetensors")
    np.testing.assert_array_equal(half, _logits(llama, stored["tokens"]))


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-tied", "qwen2", *NEWER])
@pytest.mark.parametrize("file_bytes", [1 << 30, 5000], ids=["one-file", "many-files"])
def test_what_is_written_is_what_was_read(name: str, file_bytes: int, tmp_path: Path):
    """Every tensor bit for bit, and the same shape by its configuration."""
    changed = LONGER.get(name, {})
    config = _config(MODELS / name, **changed)
    decoder = load_decoder(str(MODELS / name), config, VOCAB, single_device_mesh())
    settings = huggingface_settings(config, VOCAB, separator_id=0)
    save_decoder(decoder, tmp_path, settings, file_bytes)
    assert _config(tmp_path, **changed) == config
    before, after = TensorFiles(str(MODELS / name)), TensorFiles(str(tmp_path))
    assert (len(after.files()) > 1) == (file_bytes == 5000)
    assert after.shapes == before.shapes
    for tensor in before.shapes:
        np.testing.assert_array_equal(after.read(tensor), before.read(tensor), err_msg=tensor)


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama-tied", "qwen2", *NEWER])
def test_transformers_loads_what_is_written(name: str, tmp_path: Path):
    torch = pytest.importorskip("torch", reason="needs torch and transformers (optional)")
    transformers = pytest.importorskip("transformers", reason="needs transformers (optional)")
    config = _config(MODELS / name, **LONGER.get(name, {}))
    decoder = load_decoder(str(MODELS / name), config, VOCAB, single_device_mesh())
    save_decoder(decoder, tmp_path, huggingface_settings(config, VOCAB, separator_id=0))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    stored = np.load(MODELS / name / "logits.npz")
    with torch.no_grad():
        logits = model(torch.tensor(stored["tokens"])).logits.numpy()
    np.testing.assert_allclose(logits, stored["logits"], atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"ngram_orders": (2,)}, r"ngram_orders=\[2\]: no Hugging Face family"),
        ({"norm": "layer"}, "decoder.norm=layer, .* no supported Hugging Face family"),
        (GPT2 | {"num_kv_heads": 2}, "decoder.num_kv_heads=2: GPT-2 has decoder.num_heads=4"),
    ],
)
def test_decoders_of_no_family_are_not_written(keys, expected: str):
    with pytest.raises(ConfigError, match=expected):
        huggingface_settings(DecoderConfig(**keys), VOCAB, 0)


def test_a_sliding_window_counts_beyond_it_alone():
    """The artifact of a decoder whose context fits its window does not depend on the window."""
    shorter, longer = (
        _config(MODELS / "mistral-window", context_tokens=tokens) for tokens in (7, 8)
    )
    assert shorter.attention_window is None and "sliding_window" not in shorter.recipe()
    assert longer.attention_window == 7 and longer.recipe()["sliding_window"] == 7
    assert _config(MODELS / "mistral-window").context_tokens == 4  # by default it fits


def test_older_spelling_of_scaled_positions(tmp_path: Path):
    """What transformers 4 calls rope_scaling and rope_theta."""
    folder = Path(shutil.copytree(MODELS / "rope-llama3", tmp_path / "older"))
    expected = _config(folder)
    settings = json.loads((folder / "config.json").read_text())
    rope = settings.pop("rope_parameters")
    settings |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    (folder / "config.json").write_text(json.dumps(settings))
    assert _config(folder) == expected
    assert expected.rope_scaling.kind == "llama3" and expected.rope_scaling.original_tokens == 16


def test_a_shorter_context_takes_the_first_positions():
    stored = np.load(MODELS / "gpt2" / "logits.npz")
    found = _logits(MODELS / "gpt2", stored["tokens"], context_tokens=24)
    np.testing.assert_allclose(found[..., :VOCAB], stored["logits"], atol=1e-4)


def test_wrong_tensors_are_all_named(llama: Path):
    tensors = load_file(llama / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.9.mlp.up_proj.weight"] = np.zeros(3, np.float32)
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((24, 15), np.float32)
    save_file(tensors, llama / "model.safetensors")
    with pytest.raises(UserError) as caught:
        load_decoder(str(llama), _config(llama), VOCAB, single_device_mesh())
    message = str(caught.value)
    assert "missing: norm.weight" in message
    assert "unexpected: layers.9.mlp.up_proj.weight" in message
    assert "layers.1.mlp.up_proj.weight has the shape [24, 15], config.json asks for [24, 16]" in (
        message
    )


def test_fewer_embeddings_than_tokens(llama: Path):
    with pytest.raises(UserError, match="40 embeddings for a tokenizer of 41 tokens"):
        load_decoder(str(llama), _config(llama), 41, single_device_mesh())


def test_tensors_that_would_be_taken_wrongly(llama: Path):
    """Fewer rows than tokens, values that are not finite, other dtypes, a tensor twice."""
    tensors = load_file(llama / "model.safetensors")

    def refused(changed: dict[str, np.ndarray], expected: str) -> None:
        save_file(tensors | changed, llama / "model.safetensors")
        with pytest.raises(UserError, match=expected):
            load_decoder(str(llama), _config(llama), VOCAB, single_device_mesh())

    head, norm = tensors["lm_head.weight"], tensors["model.norm.weight"]
    refused({"lm_head.weight": head[:30].copy()}, r"lm_head.weight has the shape \[30, 16\]")
    refused({"model.norm.weight": norm * np.nan}, "model.norm.weight has values that are not fini")
    refused({"model.norm.weight": norm.astype(np.int8)}, "has the dtype I8; supported are F16")
    refused({"norm.weight": norm}, "tensors with and without 'model.'")


@pytest.mark.parametrize(
    "index", [[], 5, {"weight_map": 5}, {"weight_map": {"a": [1]}}, {"weight_map": {"a": "../x"}}]
)
def test_damaged_indices(llama: Path, index):
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index\.json: damaged"):
        TensorFiles(str(llama))


def test_files_that_cannot_be_read(llama: Path):
    (llama / "model.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=r"model\.safetensors: cannot be read as safetensors"):
        TensorFiles(str(llama))
    for name in ("pytorch_model.bin", "consolidated.00.pth"):
        (llama / "model.safetensors").rename(llama / name)
        with pytest.raises(UserError, match=rf"{name} is a pickle, which is never read"):
            TensorFiles(str(llama))
        with pytest.raises(ConfigError, match="is a file, of pickled weights, which are never re"):
            pretrained_keys(str(llama / name))
        (llama / name).rename(llama / "model.safetensors")
    with pytest.raises(UserError, match="nowhere: no such directory"):
        TensorFiles(str(llama / "nowhere"))
    with pytest.raises(ConfigError, match=r"cannot be read \(model.safetensors is a file\)"):
        pretrained_keys(str(llama / "model.safetensors"))
    (llama / "model.safetensors").unlink()
    weight_map = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (llama / "model.safetensors.index.json").write_text(json.dumps(weight_map))
    with pytest.raises(UserError, match=r"one\.safetensors, two\.safetensors missing"):
        TensorFiles(str(llama))


def test_other_weights_have_another_digest(llama: Path):
    before = TensorFiles(str(llama)).digest()
    assert before == TensorFiles(str(MODELS / "llama")).digest()
    tensors = load_file(llama / "model.safetensors")
    save_file(
        {name: tensor * 1.001 for name, tensor in tensors.items()}, llama / "model.safetensors"
    )
    assert TensorFiles(str(llama)).digest() != before


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"model_type": "bert"},
            "model_type='bert'; supported are gpt2, llama, mistral, olmo2, qwen2, qwen3",
        ),
        ({"hidden_act": "gelu", "mlp_bias": True}, "hidden_act=gelu: supported is silu"),
        ({"hidden_act": "gelu", "mlp_bias": True}, "mlp_bias=True is not supported"),
        (
            {"rope_parameters": {"rope_type": "longrope"}},
            "rotary positions of type longrope: supported are default, linear, llama3, yarn",
        ),
        ({"rope_scaling": {"type": "dynamic"}, "rope_parameters": None}, "of type dynamic"),
        (
            {"rope_scaling": {"type": "linear"}},
            "rope_parameters and rope_scaling disagree: default and linear",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor=None must be a positive number"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "truncate": False}},
            "truncate=False is not supported",
        ),
        (
            {"model_type": "qwen3", "use_sliding_window": True},
            "use_sliding_window=True is not supported",
        ),
        ({"layer_types": ["sliding_attention"]}, "supported is full_attention alone"),
        ({"rope_parameters": [1]}, "rope_parameters=[1] must be a mapping"),
        ({"model_type": []}, "model_type=[]; supported are"),
        ({"max_position_embeddings": "64"}, "max_position_embeddings='64' must be a whole"),
        ({"num_attention_heads": 0}, "num_attention_heads=0 must be a whole number from 1"),
        ({"num_attention_heads": 5, "head_dim": None}, "num_attention_heads=5 must divide"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings='false' must be true or false"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps='x' must be a positive number"),
    ],
)
def test_what_is_not_supported_is_refused(llama: Path, settings, expected: str):
    _edit(llama / "config.json", **settings)
    with pytest.raises(ConfigError) as caught:
        pretrained_keys(str(llama))
    assert any(expected in line for line in caught.value.messages)


def test_a_directory_without_its_configuration(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"config\.json cannot be read \(No such file"):
        pretrained_keys(str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError) as caught:
        pretrained_keys(str(tmp_path))
    wrong = " ".join(caught.value.messages)
    for key in ("hidden_size", "num_attention_heads", "max_position_embeddings"):
        assert f"config.json: {key}=None must be a whole number" in wrong


@pytest.fixture
def yaml(llama: Path, tmp_path: Path) -> Path:
    tokenizer = {"added_tokens": [{"id": 0, "content": "<s>"}, {"id": 1, "content": "</s>"}]}
    (llama / "tokenizer.json").write_text(json.dumps(tokenizer))
    file = tmp_path / "run.yaml"
    file.write_text(f"decoder: {{pretrained: {llama}}}\nmemory: {{width: 16, head: tied}}\n")
    return file


def test_a_configuration_takes_the_shape_from_it(yaml: Path, llama: Path):
    config = load_config(yaml, ["decoder.context_tokens=32"])
    assert load_config(yaml, ["decoder.pretrained=null", "memory.head=untied"]).decoder.width == 128
    assert config.decoder.width == 16 and config.decoder.num_kv_heads == 2
    assert config.decoder.rope_theta == 500.0 and config.decoder.context_tokens == 32
    assert config.tokenizer.path == str(llama / "tokenizer.json")
    assert config.tokenizer.separator == "<s>"
    assert load_config(yaml, ["tokenizer.separator=</s>"]).tokenizer.separator == "</s>"
    assert load_config(yaml).decoder.context_tokens == 64
    with pytest.raises(ConfigError, match="decoder=5"):
        load_config(yaml, ["decoder=5"])
    (llama / "tokenizer.json").unlink()
    with pytest.raises(ConfigError, match="has no tokenizer.json; set tokenizer.path"):
        load_config(yaml)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("decoder.width=32", "decoder.width=32: the decoder in decoder.pretrained="),
        ("decoder.context_tokens=65", "reads at most 64"),
        ("decoder.qk_norm=head", "decoder.qk_norm=head: the decoder in"),
        ("decoder.rope_scaling.kind=linear", "decoder.rope_scaling.kind=linear: the decoder in"),
        ("decoder.ngram_orders=[2]", "decoder.ngram_orders: the decoder in"),
        ("decoder.pretrained=/nowhere", "decoder.pretrained=/nowhere: config.json cannot be read"),
    ],
)
def test_keys_that_it_does_not_have_are_refused(yaml: Path, override: str, expected: str):
    with pytest.raises(ConfigError) as caught:
        load_config(yaml, [override, "memory.head=untied"])
    assert any(expected in line for line in caught.value.messages)
