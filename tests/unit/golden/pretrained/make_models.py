"""Tiny random models of each family, with the logits that transformers computes (float32).

python make_models.py DIR [NAME …]     (needs torch and transformers; tests read what it wrote)
"""

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

LLAMA = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
SCALINGS = {
    "linear": {},
    "llama3": {
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {"beta_fast": 4.0, "original_max_position_embeddings": 16},
}
MODELS = {
    "gpt2": GPT2LMHeadModel(
        GPT2Config(
            vocab_size=40,
            n_embd=16,
            n_layer=2,
            n_head=2,
            n_positions=32,
            bos_token_id=0,
            eos_token_id=0,
        )
    ),
    "llama": LlamaForCausalLM(LlamaConfig(**LLAMA, rope_theta=500.0, rms_norm_eps=1e-6)),
    "llama-tied": LlamaForCausalLM(
        LlamaConfig(**LLAMA | {"head_dim": 6}, tie_word_embeddings=True)
    ),
    "mistral": MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=None)),
    "mistral-window": MistralForCausalLM(MistralConfig(**LLAMA, sliding_window=7)),
    "qwen2": Qwen2ForCausalLM(Qwen2Config(**LLAMA, tie_word_embeddings=True)),
    "qwen3": Qwen3ForCausalLM(Qwen3Config(**LLAMA | {"head_dim": 6})),
    "olmo2": Olmo2ForCausalLM(Olmo2Config(**LLAMA, pad_token_id=None)),
    "llama-biases": LlamaForCausalLM(LlamaConfig(**LLAMA, attention_bias=True)),
} | {
    # The first context is short, so that 24 tokens go beyond it.
    f"rope-{kind}": LlamaForCausalLM(
        LlamaConfig(
            **LLAMA | {"head_dim": 8},
            rope_parameters={"rope_type": kind, "rope_theta": 50.0, "factor": 4.0} | options,
        )
    )
    for kind, options in SCALINGS.items()
}
if len(sys.argv) > 2:
    MODELS = {name: MODELS[name] for name in sys.argv[2:]}
tokens = torch.tensor(np.random.default_rng(0).integers(0, 40, (2, 24)))
for name, model in MODELS.items():
    torch.manual_seed(0)
    for parameter in model.parameters():
        # Larger than initial weights, biases too: nothing is lost in rounding or is zero.
        torch.nn.init.normal_(parameter, 0.0 if parameter.ndim > 1 else 0.5, 0.3)
    model.eval()
    with torch.no_grad():
        logits = model(tokens).logits
    folder = Path(sys.argv[1]) / name
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    np.savez(folder / "logits.npz", tokens=tokens.numpy(), logits=logits.numpy())
