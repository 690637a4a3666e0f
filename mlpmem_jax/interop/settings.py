"""The `config.json` of a decoder, as `transformers` reads it."""

from typing import Any

from mlpmem_jax.config.networks import DecoderConfig
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.models.layers import ffn_width


def huggingface_settings(
    config: DecoderConfig, vocab_size: int, separator_id: int
) -> dict[str, Any]:
    """Returns the `config.json` of a decoder; `pretrained_keys` reads it back.

    Args:
        config: The section `decoder`, without `auto`.
        separator_id: The token that starts, and so ends, each document.

    Raises:
        ConfigError: No supported family has this decoder; says why.
    """
    family = _family_of(config)
    width, heads = config.width, config.num_heads
    head_width = config.resolved_head_width
    hidden = ffn_width(config.ffn_width, width, config.activation)
    shared = {
        "model_type": family,
        "vocab_size": vocab_size,
        "bos_token_id": separator_id,
        "eos_token_id": separator_id,
        "tie_word_embeddings": config.head == "tied",
        "dtype": "float32",
    }
    if family == "gpt2":
        if config.resolved_kv_heads != heads:
            raise ConfigError(
                f"decoder.num_kv_heads={config.num_kv_heads}: GPT-2 has decoder.num_heads={heads}"
            )
        if head_width * heads != width:
            raise ConfigError(f"decoder.head_width={head_width}: GPT-2 has width / num_heads")
        return shared | {
            "architectures": ["GPT2LMHeadModel"],
            "n_embd": width,
            "n_layer": config.num_layers,
            "n_head": heads,
            "n_inner": hidden,
            "n_positions": config.context_tokens,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": config.norm_epsilon,
        }
    rope = _rope_parameters(config)
    scaled = {} if config.rope_scaling.kind == "none" else {"rope_scaling": rope}
    slides = {"sliding_window": config.sliding_window} if family == "mistral" else {}
    return shared | {
        "architectures": [f"{_CLASSES[family]}ForCausalLM"],
        "hidden_size": width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": config.resolved_kv_heads,
        "head_dim": head_width,
        "intermediate_size": hidden,
        "hidden_act": "silu",
        "max_position_embeddings": config.context_tokens,
        "rms_norm_eps": config.norm_epsilon,
        "attention_bias": config.biases == "attention",
        # Both spellings: that of transformers 5, and the one before.
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
        **scaled,
        **slides,
    }


def _rope_parameters(config: DecoderConfig) -> dict[str, Any]:
    """Returns the scaling of rotary positions in the names of `transformers`."""
    scaling = config.rope_scaling
    if scaling.kind == "none":
        return {"rope_type": "default"}
    found: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind == "linear":
        return found
    slow, fast = _TURNS[scaling.kind]
    found |= {
        "original_max_position_embeddings": scaling.original_tokens,
        slow: scaling.slow_turns,
        fast: scaling.fast_turns,
    }
    if scaling.kind == "yarn":
        found["attention_factor"] = scaling.attention_factor
    return found


def _family_of(config: DecoderConfig) -> str:
    """Returns the family that has such a decoder."""
    if config.ngram_orders:
        raise ConfigError(
            f"decoder.ngram_orders={list(config.ngram_orders)}: no Hugging Face family has n-grams"
        )
    window = "none" if config.attention_window is None else "sliding"
    given = {key: getattr(config, key) for key in _KEYS} | {"sliding_window": window}
    for family, options in _FAMILIES.items():
        wanted = _KEYS | options
        if all(value in wanted[key] for key, value in given.items()):
            return family
    given["sliding_window"] = str(config.sliding_window)
    listed = ", ".join(f"decoder.{key}={value}" for key, value in given.items())
    raise ConfigError(
        f"{listed}: no supported Hugging Face family ({', '.join(sorted(_CLASSES.values()))}) has "
        "this decoder"
    )


_TURNS = {
    "llama3": ("low_freq_factor", "high_freq_factor"),
    "yarn": ("beta_slow", "beta_fast"),
}
_CLASSES = {
    "gpt2": "GPT2",
    "llama": "Llama",
    "mistral": "Mistral",
    "olmo2": "Olmo2",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}
# The values that Llama allows, and those that differ in other families.
_KEYS: dict[str, tuple[str, ...]] = {
    "norm": ("rms",),
    "positions": ("rope",),
    "activation": ("swiglu",),
    "biases": ("none", "attention"),
    "norm_place": ("pre",),
    "qk_norm": ("none",),
    "sliding_window": ("none",),
}
_FAMILIES: dict[str, dict[str, tuple[str, ...]]] = {
    "gpt2": {
        "norm": ("layer",),
        "positions": ("learned",),
        "activation": ("gelu",),
        "biases": ("all",),
    },
    "llama": {},
    "mistral": {"biases": ("none",), "sliding_window": ("sliding",)},
    "olmo2": {"norm_place": ("post",), "qk_norm": ("projection",)},
    "qwen2": {"biases": ("qkv",)},
    "qwen3": {"qk_norm": ("head",)},
}
