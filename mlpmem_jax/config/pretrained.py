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
_MOST = 10**7


class _Settings:
    """Values of a `config.json`; collects what is wrong with them."""

    def __init__(self, values: Mapping[str, Any]):
        self._values = values
        self.wrong: list[str] = []

    def refuse(self, line: str) -> None:
        """Notes a mistake."""
        self.wrong.append(line)

    def whole(self, key: str, default: int | None = None) -> int:
        """Returns a whole number; 1 in place of a wrong one."""
        value = self._values.get(key)
        value = default if value is None else value
        if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= _MOST:
            return value
        self.refuse(f"{key}={value!r} must be a whole number from 1 to {_MOST:.0e}")
        return 1

    def number(self, key: str, default: float, values: Mapping[str, Any] | None = None) -> float:
        """Returns a positive number, looked up in `values` first; the default if it is wrong."""
        value = (values or {}).get(key)
        value = self._values.get(key) if value is None else value
        value = default if value is None else value
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e12:
            return float(value)
        self.refuse(f"{key}={value!r} must be a positive number")
        return default

    def flag(self, key: str, default: bool) -> bool:
        """Returns a truth value."""
        value = self._values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            self.refuse(f"{key}={value!r} must be true or false")
        return value is True

    def mapping(self, key: str) -> Mapping[str, Any]:
        """Returns a mapping, empty where it is not set."""
        value = self._values.get(key) or {}
        if isinstance(value, Mapping):
            return value
        self.refuse(f"{key}={value!r} must be a mapping")
        return {}

    def get(self, key: str, default: Any = None) -> Any:
        """Returns a value of any type."""
        return self._values.get(key, default)


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
    settings = _Settings(_read_json(folder / HF_CONFIG, path))
    family = settings.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        raise ConfigError(
            f"decoder.pretrained={path}: {HF_CONFIG} has model_type={family!r}; supported are "
            + ", ".join(sorted(_FAMILIES))
        )
    shape = _FAMILIES[family](settings)
    longest = _longest(family, settings)
    # A power of two divides the shards of a datastore, as its windows must.
    shape["context_tokens"] = 1 << (min(longest, _DEFAULT_CONTEXT).bit_length() - 1)
    if settings.wrong:
        lines = [f"decoder.pretrained={path}: {HF_CONFIG}: {line}" for line in settings.wrong]
        raise ConfigError(lines)
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
    settings = _Settings(_read_json(Path(path).expanduser() / HF_CONFIG, path))
    return _longest(settings.get("model_type"), settings)


def _longest(family: str, settings: _Settings) -> int:
    if family == "gpt2":
        return settings.whole("n_positions")
    longest = settings.whole("max_position_embeddings")
    # Within its window attention is that of any other decoder.
    window = settings.whole("sliding_window", longest) if family == "mistral" else longest
    return min(longest, window)


def _gpt2(settings: _Settings) -> dict[str, Any]:
    activation = settings.get("activation_function", "gelu_new")
    if activation not in _GELU:
        settings.refuse(f"activation_function={activation}: supported are {', '.join(_GELU)}")
    for option in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if settings.flag(option, False):
            settings.refuse(f"{option}=True is not supported")
    if not settings.flag("scale_attn_weights", True):
        settings.refuse("scale_attn_weights=False is not supported")
    width, heads = settings.whole("n_embd"), settings.whole("n_head")
    return {
        "width": width,
        "num_layers": settings.whole("n_layer"),
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_width": _head_width(settings, "n_embd", width, "n_head", heads),
        "ffn_width": settings.whole("n_inner", 4 * width),
        "norm": "layer",
        "positions": "learned",
        "activation": "gelu",
        "biases": "all",
        "head": "tied" if settings.flag("tie_word_embeddings", True) else "untied",
        "norm_epsilon": settings.number("layer_norm_epsilon", 1e-5),
    }


def _llama(settings: _Settings) -> dict[str, Any]:
    if settings.get("hidden_act", "silu") != "silu":
        settings.refuse(f"hidden_act={settings.get('hidden_act')}: supported is silu")
    for option in ("attention_bias", "mlp_bias"):
        if settings.flag(option, False):
            settings.refuse(f"{option}=True is not supported")
    # Newer files keep the wavelength and the type together, older ones apart.
    rope, scaling = settings.mapping("rope_parameters"), settings.mapping("rope_scaling")
    for each in (rope, scaling):
        kind = each.get("rope_type", each.get("type", "default"))
        if kind != "default":
            settings.refuse(f"rotary positions of type {kind} are not supported")
    width, heads = settings.whole("hidden_size"), settings.whole("num_attention_heads")
    own = settings.get("head_dim") is not None
    return {
        "width": width,
        "num_layers": settings.whole("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": settings.whole("num_key_value_heads", heads),
        "head_width": settings.whole("head_dim")
        if own
        else _head_width(settings, "hidden_size", width, "num_attention_heads", heads),
        "ffn_width": settings.whole("intermediate_size"),
        "norm": "rms",
        "positions": "rope",
        "activation": "swiglu",
        "biases": "none",
        "head": "tied" if settings.flag("tie_word_embeddings", False) else "untied",
        "rope_theta": settings.number("rope_theta", 10000.0, rope),
        "norm_epsilon": settings.number("rms_norm_eps", 1e-6),
    }


def _qwen2(settings: _Settings) -> dict[str, Any]:
    if settings.flag("use_sliding_window", False):
        settings.refuse("use_sliding_window=True is not supported")
    return _llama(settings) | {"biases": "qkv"}


def _head_width(settings: _Settings, key: str, width: int, heads_key: str, heads: int) -> int:
    if width % heads:
        settings.refuse(f"{heads_key}={heads} must divide {key}={width}")
        return 2
    return width // heads


_FAMILIES: dict[str, Callable[[_Settings], dict[str, Any]]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _llama,
    "qwen2": _qwen2,
}


def _separator(settings: _Settings, tokenizer: Mapping[str, Any]) -> str | None:
    """Returns the token that documents start with in training: the first that is named."""
    added = tokenizer.get("added_tokens")
    names = {
        one["id"]: one["content"]
        for one in (added if isinstance(added, list) else [])
        if isinstance(one, dict)
        and isinstance(one.get("id"), int)
        and isinstance(one.get("content"), str)
    }
    for key in ("bos_token_id", "eos_token_id"):
        number = settings.get(key)
        for one in number if isinstance(number, list) else [number]:
            if isinstance(one, int) and one in names:
                return str(names[one])
    return None


def _read_json(file: Path, path: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not JSON"
        raise ConfigError(
            f"decoder.pretrained={path}: {file.name} cannot be read ({reason}); it must be a "
            "local Hugging Face directory with config.json, *.safetensors and tokenizer.json"
        ) from None
    if not isinstance(value, dict):
        raise ConfigError(f"decoder.pretrained={path}: {file.name} is not a JSON object")
    return value
