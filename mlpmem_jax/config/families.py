"""The keys of a decoder's shape, from the settings of each Hugging Face family."""

import math
from collections.abc import Callable, Mapping
from typing import Any

_GELU = ("gelu_new", "gelu_pytorch_tanh")
_MOST = 10**7
# What a decoder has where its family has no such option.
_PLAIN: dict[str, Any] = {
    "norm_place": "pre",
    "qk_norm": "none",
    "rope_scaling.kind": "none",
    "sliding_window": None,
}


class Settings:
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

    def number(
        self, key: str, default: float | None, values: Mapping[str, Any] | None = None
    ) -> float:
        """Returns a positive number, looked up in `values` first; the default if it is wrong."""
        value = (values or {}).get(key)
        value = self._values.get(key) if value is None else value
        value = default if value is None else value
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 1e12:
            return float(value)
        self.refuse(f"{key}={value!r} must be a positive number")
        return default or 1.0

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


def shape_of(settings: Settings) -> dict[str, Any]:
    """Returns the keys of a decoder, dotted below `decoder`; notes in `settings` what is wrong."""
    return FAMILIES[settings.get("model_type")](settings)


def longest_of(settings: Settings) -> int:
    """Returns the longest window that a decoder reads, in tokens."""
    if settings.get("model_type") == "gpt2":
        return settings.whole("n_positions")
    return settings.whole("max_position_embeddings")


def _gpt2(settings: Settings) -> dict[str, Any]:
    activation = settings.get("activation_function", "gelu_new")
    if activation not in _GELU:
        settings.refuse(f"activation_function={activation}: supported are {', '.join(_GELU)}")
    for option in ("scale_attn_by_inverse_layer_idx", "add_cross_attention"):
        if settings.flag(option, False):
            settings.refuse(f"{option}=True is not supported")
    if not settings.flag("scale_attn_weights", True):
        settings.refuse("scale_attn_weights=False is not supported")
    width, heads = settings.whole("n_embd"), settings.whole("n_head")
    return _PLAIN | {
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


def _llama(settings: Settings) -> dict[str, Any]:
    if settings.get("hidden_act", "silu") != "silu":
        settings.refuse(f"hidden_act={settings.get('hidden_act')}: supported is silu")
    if settings.flag("mlp_bias", False):
        settings.refuse("mlp_bias=True is not supported")
    kinds = settings.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or set(kinds) - {"full_attention"}):
        settings.refuse(f"layer_types={kinds}: supported is full_attention alone")
    width, heads = settings.whole("hidden_size"), settings.whole("num_attention_heads")
    own = settings.get("head_dim") is not None
    return (
        _PLAIN
        | {
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
            "biases": "attention" if settings.flag("attention_bias", False) else "none",
            "head": "tied" if settings.flag("tie_word_embeddings", False) else "untied",
            "norm_epsilon": settings.number("rms_norm_eps", 1e-6),
        }
        | _rope(settings)
    )


def _mistral(settings: Settings) -> dict[str, Any]:
    slides = settings.get("sliding_window") is not None
    return _llama(settings) | {
        "sliding_window": settings.whole("sliding_window") if slides else None
    }


def _qwen2(settings: Settings) -> dict[str, Any]:
    return _qwen(settings) | {"biases": "qkv"}


def _qwen3(settings: Settings) -> dict[str, Any]:
    return _qwen(settings) | {"qk_norm": "head"}


def _qwen(settings: Settings) -> dict[str, Any]:
    if settings.flag("use_sliding_window", False):
        settings.refuse("use_sliding_window=True is not supported")
    return _llama(settings)


def _olmo2(settings: Settings) -> dict[str, Any]:
    return _llama(settings) | {"norm_place": "post", "qk_norm": "projection"}


def _rope(settings: Settings) -> dict[str, Any]:
    """Returns the keys of rotary positions."""
    # Newer files keep the wavelength and the type together, older ones apart.
    rope, scaling = settings.mapping("rope_parameters"), settings.mapping("rope_scaling")
    kinds = [_kind(each) for each in (rope, scaling) if each]
    kind = next((each for each in kinds if each != "default"), "default")
    theta = {"rope_theta": settings.number("rope_theta", 10000.0, rope)}
    if len(set(kinds)) > 1 and {"rope_type", "type"} & rope.keys():
        settings.refuse(f"rope_parameters and rope_scaling disagree: {' and '.join(kinds)}")
    if kind == "default":
        return theta
    if kind not in _SCALINGS:
        supported = ", ".join(("default", *_SCALINGS))
        settings.refuse(f"rotary positions of type {kind}: supported are {supported}")
        return theta
    values = Settings({**scaling, **rope})
    found = _SCALINGS[kind](values, settings)
    settings.wrong += values.wrong
    # Those that the kind does not have stay at their defaults.
    return theta | {f"rope_scaling.{key}": value for key, value in {"kind": kind, **found}.items()}


def _kind(rope: Mapping[str, Any]) -> str:
    return str(rope.get("rope_type", rope.get("type", "default")))


def _linear(rope: Settings, settings: Settings) -> dict[str, Any]:
    return {"factor": rope.number("factor", None)}


def _llama3(rope: Settings, settings: Settings) -> dict[str, Any]:
    return {
        "factor": rope.number("factor", None),
        "original_tokens": _original(rope, settings),
        "slow_turns": rope.number("low_freq_factor", None),
        "fast_turns": rope.number("high_freq_factor", None),
    }


def _yarn(rope: Settings, settings: Settings) -> dict[str, Any]:
    if not rope.flag("truncate", True):
        rope.refuse("truncate=False is not supported")
    factor = rope.number("factor", None)

    def attention(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    scales = [rope.number(key, 1.0) for key in ("mscale", "mscale_all_dim") if rope.get(key)]
    default = attention(scales[0]) / attention(scales[1]) if len(scales) == 2 else attention(1.0)
    return {
        "factor": factor,
        "original_tokens": _original(rope, settings),
        "slow_turns": rope.number("beta_slow", 1.0),
        "fast_turns": rope.number("beta_fast", 32.0),
        "attention_factor": rope.number("attention_factor", default),
    }


def _original(rope: Settings, settings: Settings) -> int:
    return rope.whole("original_max_position_embeddings", settings.get("max_position_embeddings"))


def _head_width(settings: Settings, key: str, width: int, heads_key: str, heads: int) -> int:
    if width % heads:
        settings.refuse(f"{heads_key}={heads} must divide {key}={width}")
        return 2
    return width // heads


_SCALINGS = {"linear": _linear, "llama3": _llama3, "yarn": _yarn}
FAMILIES: dict[str, Callable[[Settings], dict[str, Any]]] = {
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _mistral,
    "olmo2": _olmo2,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
}
