"""GGUF files of decoders and tokenizers, for tests."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

# Names of transformers and of llama.cpp.
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "input_layernorm": "attn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_feedforward_layernorm": "post_ffw_norm", "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm", "ln_1": "attn_norm",
    "ln_2": "ffn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down", "rope_freqs": "rope_freqs",
}  # fmt: skip
KEYS = {
    "hidden_size": "embedding_length", "n_embd": "embedding_length",
    "num_hidden_layers": "block_count", "n_layer": "block_count",
    "num_attention_heads": "attention.head_count", "n_head": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv", "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length", "n_positions": "context_length",
    "head_dim": "attention.key_length", "sliding_window": "attention.sliding_window",
}  # fmt: skip


def write_gguf(file: Path, folder: Path, kind: str = "F32", **extra: Any) -> Path:
    """Writes a Hugging Face directory as llama.cpp would.

    Args:
        file: Where.
        folder: The directory.
        kind: Type of ggml of its matrices.
        **extra: Further metadata; `__` stands for a dot.
    """
    gguf = pytest.importorskip("gguf", reason="needs the package gguf (optional)")
    settings = json.loads((folder / "config.json").read_text())
    family = {"mistral": "llama"}.get(settings["model_type"], settings["model_type"])
    writer = gguf.GGUFWriter(file, family)
    for key, name in KEYS.items():
        if settings.get(key) is not None:
            writer.add_uint32(f"{family}.{name}", settings[key])
    if family == "gpt2":
        epsilon = settings["layer_norm_epsilon"]
        writer.add_float32("gpt2.attention.layer_norm_epsilon", epsilon)
    else:
        writer.add_float32(
            f"{family}.attention.layer_norm_rms_epsilon", settings.get("rms_norm_eps", 1e-6)
        )
        theta = settings.get("rope_parameters", {}).get("rope_theta", 10000.0)
        writer.add_float32(f"{family}.rope.freq_base", theta)
    for key, value in extra.items():
        add = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        add.get(type(value), writer.add_array)(key.replace("__", "."), value)
    for name, tensor in load_file(folder / "model.safetensors").items():
        stem, _, end = name.rpartition(".")
        block = re.fullmatch(r"(?:model\.layers|transformer\.h)\.(\d+)\.(.*)", stem)
        inner = block[2] if block else stem
        after = "post_attention_norm" if family == "olmo2" else "ffn_norm"
        found = NAMES.get(inner, after)
        if family == "llama" and found in ("attn_q", "attn_k"):
            heads = "num_attention_heads" if found == "attn_q" else "num_key_value_heads"
            halves = tensor.reshape(settings[heads], 2, -1, *tensor.shape[1:])
            tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        if inner in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj") and end == "weight":
            tensor = tensor.T.copy()
        full = f"blk.{block[1]}.{found}.{end}" if block else f"{found}.{end}"
        quants = gguf.GGMLQuantizationType[kind if tensor.ndim > 1 else "F32"]
        writer.add_tensor(full, gguf.quants.quantize(tensor, quants), raw_dtype=quants)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def byte_level_tables(trained: bytes) -> dict[str, Any]:
    """Returns the metadata of a `tokenizer.json` of byte-level BPE whose token 0 is special."""
    model = json.loads(trained)["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "tokenizer__ggml__model": "gpt2",
        "tokenizer__ggml__pre": "gpt-2",
        "tokenizer__ggml__tokens": tokens,
        "tokenizer__ggml__merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer__ggml__token_type": [3] + [1] * (len(tokens) - 1),
        "tokenizer__ggml__eos_token_id": 0,
    }
