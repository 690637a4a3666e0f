"""The metadata of a GGUF file as the settings of the Hugging Face family that it holds."""

import math
import os
import struct
from typing import Any

from mlpmem_jax.config.gguf import Header
from mlpmem_jax.config.rope import RopeScaling

HEAD, OUTPUT_BIAS, FREQUENCIES = "output.weight", "blk.0.attn_output.bias", "rope_freqs.weight"
_FAMILIES = ("gpt2", "llama", "olmo2", "qwen2", "qwen3")
_FLOAT32 = 0
# What Llama 3.1 and later have; a file holds the frequencies that they give.
_LLAMA3 = RopeScaling(kind="llama3", original_tokens=8192, slow_turns=1.0, fast_turns=4.0)
_GPT2 = {
    "n_embd": "embedding_length",
    "n_layer": "block_count",
    "n_head": "attention.head_count",
    "n_inner": "feed_forward_length",
    "n_positions": "context_length",
    "layer_norm_epsilon": "attention.layer_norm_epsilon",
}
_LLAMA = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
    "head_dim": "attention.key_length",
    "sliding_window": "attention.sliding_window",
}


def settings_of(header: Header, path: str) -> tuple[dict[str, Any], list[str]]:
    """Returns what would stand in a `config.json`, and a line for each thing that has no place.

    Args:
        header: Of the file.
        path: Of the file.
    """
    architecture = header.metadata.get("general.architecture")
    if architecture not in _FAMILIES:
        return {"model_type": architecture}, []

    def get(key: str) -> Any:
        return _rounded(header.metadata.get(f"{architecture}.{key}"))

    names = _GPT2 if architecture == "gpt2" else _LLAMA
    found = {key: get(name) for key, name in names.items()}
    found = {key: value for key, value in found.items() if value is not None}
    found |= {
        "model_type": architecture,
        "tie_word_embeddings": HEAD not in header.tensors,
        "bos_token_id": header.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": header.metadata.get("tokenizer.ggml.eos_token_id"),
    }
    if architecture == "gpt2":
        return found, []
    if architecture == "llama" and "sliding_window" in found:
        found["model_type"] = "mistral"
    found["attention_bias"] = OUTPUT_BIAS in header.tensors
    wrong = [f"{architecture}.expert_count={get('expert_count')}: mixtures of experts are not "
             "supported"] if get("expert_count") else []  # fmt: skip
    heads, width = found.get("num_attention_heads"), found.get("hidden_size")
    head_width = found.get("head_dim")
    if head_width is None and isinstance(heads, int) and isinstance(width, int) and heads > 0:
        head_width = width // heads
    for key in ("rope.dimension_count", "attention.value_length"):
        if get(key) not in (None, head_width):
            wrong.append(f"{architecture}.{key}={get(key)}: supported is the head's {head_width}")
    scaling, mistakes = _scaling(header, path, architecture, head_width, found.get("rope_theta"))
    return found | {"rope_scaling": scaling}, wrong + mistakes


def _scaling(
    header: Header, path: str, architecture: str, head_width: Any, theta: Any
) -> tuple[dict[str, Any] | None, list[str]]:
    """Returns `rope_scaling`; None where frequencies are not scaled."""
    prefix = f"{architecture}.rope.scaling."
    values = {
        key.removeprefix(prefix): _rounded(value)
        for key, value in header.metadata.items()
        if key.startswith(prefix)
    }
    kind = values.pop("type", "none")
    if FREQUENCIES in header.tensors:
        return _of_frequencies(header, path, head_width, theta or 10000.0)
    if kind == "none":
        return None, []
    names = {"factor": "factor", "original_context_length": "original_max_position_embeddings"}
    unknown = sorted(values.keys() - names.keys() - {"finetuned"})
    wrong = [f"{prefix}{key}={values[key]} is not supported" for key in unknown]
    options = {names[key]: value for key, value in values.items() if key in names}
    return {"rope_type": kind} | options, wrong


def _of_frequencies(
    header: Header, path: str, head_width: Any, theta: float
) -> tuple[dict[str, Any] | None, list[str]]:
    """Finds the options of Llama 3.1 that give the divisors of the frequencies in a file."""
    info = header.tensors[FREQUENCIES]
    wrong = [
        f"{FREQUENCIES}: frequencies that are not those of Llama 3.1 (low_freq_factor 1, "
        "high_freq_factor 4, original_max_position_embeddings 8192) are not supported"
    ]
    if info.kind != _FLOAT32 or not isinstance(head_width, int) or info.shape != (head_width // 2,):
        return None, wrong
    half = head_width // 2
    with open(os.path.expanduser(path), "rb") as file:
        file.seek(info.offset)
        content = file.read(4 * half)
    divisors = struct.unpack(f"<{half}f", content) if len(content) == 4 * half else (math.nan,)
    factor = _rounded(max(divisors))
    if factor == 1:
        return None, []
    if not factor > 1:
        return None, wrong
    scaling = _LLAMA3.model_copy(update={"factor": factor})
    expected = scaling.factors(half, theta)
    if any(abs(a * b - 1) > 1e-4 for a, b in zip(divisors, expected, strict=True)):
        return None, wrong
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": scaling.slow_turns,
        "high_freq_factor": scaling.fast_turns,
        "original_max_position_embeddings": scaling.original_tokens,
    }, []


def _rounded(value: Any) -> Any:
    """Returns the decimal that a float32 stands for, as a `config.json` has it."""
    return float(f"{value:.7g}") if isinstance(value, float) else value
