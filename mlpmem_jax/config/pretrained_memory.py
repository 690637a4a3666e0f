"""The keys that a memory of the official release decides, from the tensors of its directory.

Its `config.json` is that of the decoder but for the depth, so the form is recognised by names of
tensors. Read without JAX, before a configuration is checked.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlpmem_jax.config.weight_files import tensor_shapes
from mlpmem_jax.errors import ConfigError, UserError

MEMORY_CONFIG = "config.json"
TRANSFORM = "embedding_transform.weight"
# The state that an official memory reads, unless another one is set.
SITE_KEYS: dict[str, Any] = {"datastore.input.site": "ffn_input", "datastore.input.layer": 1.0}
_DECODER = re.compile(r"(^|\.)(attn|self_attn|wte|wpe|embed_tokens)\.")
_LLAMA_BIAS = re.compile(r"layers\.\d+\.mlp\.\w+\.bias")
_Shapes = Mapping[str, tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class _Form:
    """The names of one form.

    Attributes:
        block: `memory.block`.
        up: The matrix that each block has, with the number of the block.
        depth: What `config.json` calls the number of blocks.
        epsilon: The same for `memory.norm_epsilon`, and its default.
        activation: The same for the activation, and the names that it may have, the default first.
    """

    block: str
    up: re.Pattern[str]
    depth: str
    epsilon: tuple[str, float]
    activation: tuple[str, tuple[str, ...]]


_FORMS = (
    _Form(
        "gelu",
        re.compile(r"h\.(\d+)\.mlp\.c_fc\.weight"),
        "n_layer",
        ("layer_norm_epsilon", 1e-5),
        ("activation_function", ("gelu_new", "gelu_pytorch_tanh")),
    ),
    _Form(
        "swiglu",
        re.compile(r"layers\.(\d+)\.mlp\.gate_proj\.weight"),
        "num_hidden_layers",
        ("rms_norm_eps", 1e-6),
        ("hidden_act", ("silu",)),
    ),
)


def memory_keys(path: str) -> dict[str, Any]:
    """Returns the keys of the section `memory` that a directory decides, by dotted path.

    Args:
        path: `memory.pretrained`, a directory.

    Raises:
        ConfigError: It cannot be read, holds no memory of a form that is known, or has options
            that are not supported; all of them are named.
    """
    shapes = _shapes(path)
    form = _form_of(shapes, path)
    blocks = {int(found[1]): name for name in shapes if (found := form.up.fullmatch(name))}
    shape = shapes[blocks[min(blocks)]]
    if len(shape) != 2:
        raise ConfigError(
            f"memory.pretrained={path}: {blocks[min(blocks)]} has the shape {list(shape)}: it must "
            "have two dims"
        )
    # Matrices are stored as [in, out] in the form of GPT-2, as [out, in] in the others.
    width, hidden = shape if form.block == "gelu" else shape[::-1]
    depth = 1 + max(blocks)
    biases = "ffn" if any(map(_LLAMA_BIAS.fullmatch, shapes)) else "none"
    keys = {
        "width": width,
        "num_layers": depth,
        "ffn_width": hidden,
        "block": form.block,
        "biases": "all" if form.block == "gelu" else biases,
        "projection_bias": "learned" if TRANSFORM in shapes else "none",
        "input_norm": "none",
        "recent_tokens": 0,
        "ngram_orders": (),
        "head": "untied",
        "gate": "none",
        "norm_epsilon": _epsilon(form, depth, path),
    }
    return {f"memory.{key}": value for key, value in keys.items()}


def state_width(path: str) -> int:
    """Returns the width of the decoder's states that a memory reads."""
    transform = _shapes(path).get(TRANSFORM)
    return transform[-1] if transform else int(memory_keys(path)["memory.width"])


def _shapes(path: str) -> _Shapes:
    try:
        return tensor_shapes(Path(path).expanduser())
    except UserError as error:
        raise ConfigError(
            [f"memory.pretrained={path}: {line}" for line in error.messages]
        ) from None


def _form_of(shapes: _Shapes, path: str) -> _Form:
    if decoder := sorted(filter(_DECODER.search, shapes)):
        raise ConfigError(
            f"memory.pretrained={path}: holds a decoder ({decoder[0]} and {len(decoder) - 1} more "
            "such tensors), not a memory alone; decoder.pretrained names a decoder"
        )
    forms = [form for form in _FORMS if any(map(form.up.fullmatch, shapes))]
    if len(forms) == 1:
        return forms[0]
    raise ConfigError(
        f"memory.pretrained={path}: its tensors are those of no supported memory: GPT2MLPModel "
        "(h.0.mlp.c_fc.weight, …), or LlamaMLPModel and MistralMLPModel "
        "(layers.0.mlp.gate_proj.weight, …)"
    )


def _epsilon(form: _Form, depth: int, path: str) -> float:
    """Returns the constant of the norms; refuses what `config.json` says otherwise."""
    about = _settings(path)
    wrong: list[str] = []
    if about.get(form.depth) != depth:
        wrong.append(
            f"{form.depth}={about.get(form.depth)!r}: the tensors are those of {depth} blocks"
        )
    key, supported = form.activation
    if (activation := about.get(key, supported[0])) not in supported:
        wrong.append(f"{key}={activation!r}: supported are {', '.join(supported)}")
    key, default = form.epsilon
    epsilon = about.get(key, default)
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon <= 1:
        wrong.append(f"{key}={epsilon!r} must be a number above 0, at most 1")
    if wrong:
        raise ConfigError([f"memory.pretrained={path}: {MEMORY_CONFIG}: {each}" for each in wrong])
    return float(epsilon)


def _settings(path: str) -> dict[str, Any]:
    try:
        value = json.loads((Path(path).expanduser() / MEMORY_CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not JSON"
        raise ConfigError(
            f"memory.pretrained={path}: {MEMORY_CONFIG} cannot be read ({reason})"
        ) from None
    if not isinstance(value, dict):
        raise ConfigError(f"memory.pretrained={path}: {MEMORY_CONFIG} is not a JSON object")
    return value
