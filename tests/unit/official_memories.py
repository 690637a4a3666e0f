"""Random memories of the official forms, and their forward pass restated in NumPy (float64)."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

LAYERS, HIDDEN = 2, 64
FORMS = ("gpt2", "llama", "llama-biases", "mistral")


def official_tensors(
    form: str, vocab: int, width: int, input_width: int, seed: int = 0
) -> dict[str, np.ndarray]:
    """Returns tensors of `GPT2MLPModel`, `LlamaMLPModel` or `MistralMLPModel` by name."""
    shapes: dict[str, tuple[int, ...]] = {"lm_head.weight": (vocab, width)}
    if input_width != width:
        shapes["embedding_transform.weight"] = (width, input_width)
        shapes["embedding_transform.bias"] = (width,)
    for layer in range(LAYERS):
        if form == "gpt2":
            name = f"h.{layer}"
            shapes |= {f"{name}.ln_1.weight": (width,), f"{name}.ln_1.bias": (width,)}
            shapes |= {f"{name}.mlp.c_fc.weight": (width, 4 * width)}
            shapes |= {f"{name}.mlp.c_fc.bias": (4 * width,)}
            shapes |= {f"{name}.mlp.c_proj.weight": (4 * width, width)}
            shapes |= {f"{name}.mlp.c_proj.bias": (width,)}
            continue
        name = f"layers.{layer}"
        shapes[f"{name}.input_layernorm.weight"] = (width,)
        for part, shape in {
            "gate": (HIDDEN, width), "up": (HIDDEN, width), "down": (width, HIDDEN)
        }.items():  # fmt: skip
            shapes[f"{name}.mlp.{part}_proj.weight"] = shape
            if form == "llama-biases":
                shapes[f"{name}.mlp.{part}_proj.bias"] = shape[:1]
    final = "ln_f" if form == "gpt2" else "norm"
    shapes[f"{final}.weight"] = (width,)
    if form == "gpt2":
        shapes["ln_f.bias"] = (width,)
    rng = np.random.default_rng(seed)
    return {
        name: (0.4 * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in shapes.items()
    }


def official_config(form: str, vocab: int, width: int) -> dict[str, object]:
    """Returns `config.json`: the decoder's own, with the depth of the memory."""
    if form == "gpt2":
        return {
            "model_type": "gpt2", "n_embd": width, "n_layer": LAYERS, "n_head": 4,
            "n_positions": 64, "vocab_size": vocab, "layer_norm_epsilon": 1e-5,
            "activation_function": "gelu_new",
        }  # fmt: skip
    return {
        "model_type": form.split("-")[0], "hidden_size": width, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": HIDDEN,
        "max_position_embeddings": 64, "vocab_size": vocab, "rms_norm_eps": 1e-6,
        "hidden_act": "silu", "mlp_bias": form == "llama-biases",
    }  # fmt: skip


def write_official(folder: Path, form: str, vocab: int, width: int, input_width: int) -> None:
    """Writes a directory as the official training script leaves it."""
    folder.mkdir(exist_ok=True)
    save_file(official_tensors(form, vocab, width, input_width), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(official_config(form, vocab, width)))


def official_logits(form: str, tensors: dict[str, np.ndarray], state: np.ndarray) -> np.ndarray:
    """Returns the logits of states [..., D], as the official classes compute them."""
    held = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}
    x = state.astype(np.float64)
    if "embedding_transform.weight" in held:
        x = x @ held["embedding_transform.weight"].T + held["embedding_transform.bias"]
    for layer in range(LAYERS):
        if form == "gpt2":
            name = f"h.{layer}"
            y = _layer_norm(x, held[f"{name}.ln_1.weight"], held[f"{name}.ln_1.bias"])
            y = y @ held[f"{name}.mlp.c_fc.weight"] + held[f"{name}.mlp.c_fc.bias"]
            y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
            x = x + y @ held[f"{name}.mlp.c_proj.weight"] + held[f"{name}.mlp.c_proj.bias"]
            continue
        name = f"layers.{layer}"
        y = _rms_norm(x, held[f"{name}.input_layernorm.weight"])

        def projected(z: np.ndarray, part: str, name: str = name) -> np.ndarray:
            return z @ held[f"{name}.mlp.{part}_proj.weight"].T + held.get(
                f"{name}.mlp.{part}_proj.bias", 0.0
            )

        gate = projected(y, "gate")
        x = x + projected(gate / (1 + np.exp(-gate)) * projected(y, "up"), "down")
    if form == "gpt2":
        x = _layer_norm(x, held["ln_f.weight"], held["ln_f.bias"])
    else:
        x = _rms_norm(x, held["norm.weight"])
    return x @ held["lm_head.weight"].T


def _layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight + bias


def _rms_norm(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight
