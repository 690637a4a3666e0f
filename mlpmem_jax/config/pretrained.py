"""The keys that a pretrained decoder decides, from the `config.json` of its Hugging Face directory.

Read without JAX, before a configuration is checked: rules that span keys see the real shape.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlpmem_jax.errors import ConfigError

HF_CONFIG, HF_TOKENIZER = "config.json", "tokenizer.json"
# Longer contexts cost memory whether text fills them or not; a configuration may ask for more.
_DEFAULT_CONTEXT = 1024
_GELU = ("gelu_new", "gelu_pytorch_tanh")

Settings = Mapping[str, Any]


def pretrained_keys(path: str) -> dict[str, Any]:
    """Returns the keys of a configuration that a pretrained decoder decides.

    Args:
        path: `decoder.pretrained`, a directory.

    Returns:
        Values by dotted path: the decoder's shape, tokenizer.path and tokenizer.separator. What
        the directory does not tell is left out.

    Raises:
        ConfigError: It cannot be read, or is of an architecture or has an option that is not
            supported; all of them are named.
    """
    folder = Path(path).expanduser()
    settings = _read_json(folder / HF_CONFIG, path)
    family = settings.get("model_type")
    if family not in _FAMILIES:
        raise ConfigError(
            f"decoder.pretrained={path}: {HF_CONFIG} has model_type={family!r}; supported are "
            + ", ".join(sorted(_FAMILIES))
        )
    unsupported: list[str] = []
    try:
        shape = _FAMILIES[family](settings, unsupported.append)
    except KeyError as error:
        raise ConfigError(
            f"decoder.pretrained={path}: {HF_CONFIG} of a {family} model has no {error}"
        ) from None
    if unsupported:
        raise ConfigError([f"decoder.pretrained={path}: {line}" for line in unsupported])
    found = {f"decoder.{key}": value for key, value in shape.items()}
    tokenizer = folder / HF_TOKENIZER
    if tokenizer.is_file():
        found["tokenizer.path"] = str(tokenizer)
        separator = _separator(settings, _read_json(tokenizer, path))
        if separator is not None:
            found["tokenizer.separator"] = separator
    return found


def longest_context(path: str) -> int:
    """Returns the longest window that a pretrained decoder reads, in tokens."""
    settings = _read_json(Path(path).expanduser() / HF_CONFIG, path)
    window = settings.get("sliding_window") if settings["model_type"] == "mistral" else None
    longest = settings.get("max_position_embeddings") or settings["n_positions"]
    return int(min(longest, window or longest))


def _gpt2(settings: Settings, refuse: Callable[[str], None]) -> dict[str, Any]:
    activation = settings.get("activation_function", "gelu_new")
    if activation not in _GELU:
        refuse(f"activation_function={activation}: supported are {', '.join(_GELU)}")
    for option in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if settings.get(option):
            refuse(f"{option}={settings[option]} is not supported")
    if not settings.get("scale_attn_weights", True):
        refuse("scale_attn_weights=False is not supported")
    width = settings["n_embd"]
    return {
        "width": width,
        "num_layers": settings["n_layer"],
        "num_heads": settings["n_head"],
        "ffn_width": settings.get("n_inner") or 4 * width,
        "context_tokens": min(settings["n_positions"], _DEFAULT_CONTEXT),
        "norm": "layer",
        "positions": "learned",
        "activation": "gelu",
        "biases": "all",
        "head": "tied" if settings.get("tie_word_embeddings", True) else "untied",
        "norm_epsilon": settings.get("layer_norm_epsilon", 1e-5),
    }


def _llama(settings: Settings, refuse: Callable[[str], None]) -> dict[str, Any]:
    if settings.get("hidden_act", "silu") != "silu":
        refuse(f"hidden_act={settings['hidden_act']}: supported is silu")
    for option in ("attention_bias", "mlp_bias"):
        if settings.get(option):
            refuse(f"{option}={settings[option]} is not supported")
    # Newer files keep both under rope_parameters.
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        refuse(f"rotary positions of type {kind} are not supported")
    heads = settings["num_attention_heads"]
    shape = {
        "width": settings["hidden_size"],
        "num_layers": settings["num_hidden_layers"],
        "num_heads": heads,
        "num_kv_heads": settings.get("num_key_value_heads") or heads,
        "head_width": settings.get("head_dim") or settings["hidden_size"] // heads,
        "ffn_width": settings["intermediate_size"],
        "context_tokens": min(settings["max_position_embeddings"], _DEFAULT_CONTEXT),
        "norm": "rms",
        "positions": "rope",
        "activation": "swiglu",
        "biases": "none",
        "head": "tied" if settings.get("tie_word_embeddings", False) else "untied",
        "rope_theta": float(rope.get("rope_theta") or settings.get("rope_theta") or 10000.0),
        "norm_epsilon": settings.get("rms_norm_eps", 1e-6),
    }
    return shape


def _mistral(settings: Settings, refuse: Callable[[str], None]) -> dict[str, Any]:
    # Within its window (`longest_context`) attention is that of any other decoder.
    shape = _llama(settings, refuse)
    window = settings.get("sliding_window") or shape["context_tokens"]
    return shape | {"context_tokens": min(shape["context_tokens"], window)}


def _qwen2(settings: Settings, refuse: Callable[[str], None]) -> dict[str, Any]:
    if settings.get("use_sliding_window"):
        refuse("use_sliding_window=True is not supported")
    return _llama(settings, refuse) | {"biases": "qkv"}


_FAMILIES: dict[str, Callable[[Settings, Callable[[str], None]], dict[str, Any]]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
}


def _separator(settings: Settings, tokenizer: Settings) -> str | None:
    """Returns the token that documents start with in training: the first that is named."""
    names = {one["id"]: one["content"] for one in tokenizer.get("added_tokens") or ()}
    for key in ("bos_token_id", "eos_token_id"):
        number = settings.get(key)
        for one in number if isinstance(number, list) else [number]:
            if one in names:
                return str(names[one])
    return None


def _read_json(file: Path, path: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not JSON"
        raise ConfigError(
            f"decoder.pretrained={path}: {file.name} cannot be read ({reason}); it must be a "
            "Hugging Face directory with config.json, *.safetensors and tokenizer.json"
        ) from None
    if not isinstance(value, dict):
        raise ConfigError(f"decoder.pretrained={path}: {file.name} is not a JSON object")
    return value
