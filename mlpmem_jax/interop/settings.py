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
        vocab_size: V.
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
    return shared | {
        "architectures": ["LlamaForCausalLM" if family == "llama" else "Qwen2ForCausalLM"],
        "hidden_size": width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": config.resolved_kv_heads,
        "head_dim": head_width,
        "intermediate_size": hidden,
        "hidden_act": "silu",
        "max_position_embeddings": config.context_tokens,
        "rms_norm_eps": config.norm_epsilon,
        # Both spellings: that of transformers 5, and the one before.
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "rope_theta": config.rope_theta,
    }


def _family_of(config: DecoderConfig) -> str:
    """Returns the family that has such a decoder."""
    if config.ngram_orders:
        raise ConfigError(
            f"decoder.ngram_orders={list(config.ngram_orders)}: no Hugging Face family has n-grams"
        )
    keys = ("norm", "positions", "activation", "biases")
    found = tuple(getattr(config, key) for key in keys)
    families = {
        ("layer", "learned", "gelu", "all"): "gpt2",
        ("rms", "rope", "swiglu", "none"): "llama",
        ("rms", "rope", "swiglu", "qkv"): "qwen2",
    }
    if found not in families:
        given = ", ".join(f"decoder.{key}={value}" for key, value in zip(keys, found, strict=True))
        raise ConfigError(
            f"{given}: no supported Hugging Face family (GPT-2, Llama, Qwen2) has this decoder"
        )
    return families[found]
