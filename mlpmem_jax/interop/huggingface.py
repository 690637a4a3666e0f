"""Decoders of Hugging Face directories (GPT-2, Llama, Mistral, Qwen2) as networks of this package.

Each parameter names the tensors that it comes from, one for each layer where layers are stacked.
Tensors are read one at a time and go straight to their place on the mesh: the host holds one of
them. `transformers` stores matrices as [out, in], those of GPT-2 as [in, out].

Suffixes as in docs/design.md, section 3.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mlpmem_jax.config.networks import DecoderConfig
from mlpmem_jax.errors import UserError
from mlpmem_jax.interop.tensors import TensorFiles, check_names
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.models.layers import ffn_width
from mlpmem_jax.parallel.sharding import create_sharded
from mlpmem_jax.training.state import flatten, split_module, unflatten

# The model that stands before the head, in some files a part of each name.
_PREFIXES = ("model.", "transformer.")
# Masks and frequencies: no parameters.
_IGNORED = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
_HEAD = "lm_head.weight"

Turn = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a parameter, or one layer of it, comes from.

    Attributes:
        tensor: Name of the tensor, without the model's prefix.
        shape: Its shape.
        turn: Makes the parameter of it.
    """

    tensor: str
    shape: tuple[int, ...]
    turn: Turn = np.asarray


def load_decoder(
    path: str, config: DecoderConfig, vocab_size: int, mesh: jax.sharding.Mesh
) -> Decoder:
    """Reads a pretrained decoder.

    Args:
        path: The directory.
        config: Its shape, as `config.pretrained` reads it. Of learned positions, the first
            `context_tokens` are taken.
        vocab_size: V of its tokenizer. Embeddings beyond it belong to no token and are left out.
        mesh: Where the parameters go.

    Returns:
        The decoder, in float32.

    Raises:
        UserError: A file is missing or damaged; or tensors are missing, unexpected or of another
            shape, all of them named.
    """
    files = TensorFiles(path)
    tensors = {_bare(name): name for name in files.shapes if not name.endswith(_IGNORED)}
    if config.head == "tied":
        tensors.pop(_HEAD, None)
    shapes = {bare: files.shapes[name] for bare, name in tensors.items()}
    is_gpt2 = config.positions == "learned"
    decoder = _Gpt2(config, shapes) if is_gpt2 else _Llama(config, shapes)
    decoder.check_vocabulary(vocab_size, path)
    single, stacked = decoder.single(), decoder.stacked()
    layers = range(config.num_layers)
    sources = [*single.values(), *(make(layer) for make in stacked.values() for layer in layers)]
    check_names(shapes, {one.tensor: one.shape for one in sources}, path)

    def read(source: Source) -> np.ndarray:
        return source.turn(files.read(tensors[source.tensor])).astype(np.float32)

    graphdef, params, fixed = _empty(config, vocab_size, mesh)
    flat = flatten(params)
    with jax.set_mesh(mesh):
        for name, source in single.items():
            whole = read(source)
            # Rows beyond the vocabulary stay zero.
            flat[f"{name}/value"] = _put(flat[f"{name}/value"], whole, *(0,) * whole.ndim)
        for name, make in stacked.items():
            key = f"blocks/{name}/value"
            for layer in layers:
                part = read(make(layer))[None]
                flat[key] = _put(flat[key], part, layer, *(0,) * (part.ndim - 1))
    return nnx.merge(graphdef, unflatten(params, flat), fixed)


def _put(array: jax.Array, part: np.ndarray, *start: int) -> jax.Array:
    """Writes a part of a parameter where it lies on the mesh."""
    return _writer(array.sharding)(array, part, start)


@functools.cache
def _writer(sharding: jax.sharding.Sharding) -> Any:
    return jax.jit(jax.lax.dynamic_update_slice, donate_argnums=0, out_shardings=sharding)


def _empty(config: DecoderConfig, vocab_size: int, mesh: jax.sharding.Mesh) -> tuple[Any, Any, Any]:
    """Returns the structure of a decoder, and its parameters, all zero."""

    def build() -> Decoder:
        return Decoder(config, vocab_size, rngs=nnx.Rngs(0))

    graphdef, _, fixed = split_module(nnx.eval_shape(build))

    def create() -> nnx.State:
        return jax.tree.map(jnp.zeros_like, split_module(build())[1])

    return graphdef, create_sharded(create, mesh), fixed


def _bare(name: str) -> str:
    for prefix in _PREFIXES:
        name = name.removeprefix(prefix)
    return name


class _Family:
    """What the families share: sizes, and the names of what is not stacked."""

    table: str
    norm: str

    def __init__(self, config: DecoderConfig, shapes: dict[str, tuple[int, ...]]):
        self.config, self._shapes = config, shapes
        self.width, self.heads = config.width, config.num_heads
        self.groups = self.heads if config.num_kv_heads == "auto" else config.num_kv_heads
        self.head_width = (
            self.width // self.heads if config.head_width == "auto" else config.head_width
        )
        self.hidden = ffn_width(config.ffn_width, config.width, config.activation)
        self._vocab_size = 0

    def check_vocabulary(self, vocab_size: int, path: str) -> None:
        """Refuses fewer embeddings than tokens."""
        self._vocab_size = vocab_size
        rows = self._rows(self.table, vocab_size)
        if rows < vocab_size:
            raise UserError(
                f"decoder.pretrained={path}: {rows} embeddings for a tokenizer of {vocab_size} "
                "tokens; use the tokenizer.json of this directory"
            )

    def _rows(self, name: str, default: int) -> int:
        """Returns the rows that a file holds, where only the first of them are taken."""
        return self._shapes.get(name, (default,))[0]

    def _first(self, name: str, count: int) -> Source:
        shape = (self._rows(name, count), self.width)
        return Source(name, shape, lambda tensor: tensor[:count])

    def single(self) -> dict[str, Source]:
        """Returns what is not stacked over layers, by our names."""
        found = {
            "embedding": self._first(self.table, self._vocab_size),
            "final/final_scale": Source(f"{self.norm}.weight", (self.width,)),
        }
        if self.config.head == "untied":
            found["head"] = self._first(_HEAD, self._vocab_size)
        return found

    def stacked(self) -> dict[str, Callable[[int], Source]]:
        """Returns what is, by our names under `blocks`."""
        raise NotImplementedError


class _Llama(_Family):
    table, norm = "embed_tokens.weight", "norm"

    def stacked(self) -> dict[str, Callable[[int], Source]]:
        width, heads, groups, a = self.width, self.heads, self.groups, self.head_width

        def of(name: str, shape: tuple[int, ...], turn: Turn = np.asarray) -> Any:
            return lambda layer: Source(f"layers.{layer}.{name}", shape, turn)

        def into(num: int) -> Turn:
            return lambda weight: weight.T.reshape(width, num, a)

        found = {
            "attention_norm_scale": of("input_layernorm.weight", (width,)),
            "ffn_norm_scale": of("post_attention_layernorm.weight", (width,)),
            "query": of("self_attn.q_proj.weight", (heads * a, width), into(heads)),
            "key": of("self_attn.k_proj.weight", (groups * a, width), into(groups)),
            "value": of("self_attn.v_proj.weight", (groups * a, width), into(groups)),
            "out": of(
                "self_attn.o_proj.weight",
                (width, heads * a),
                lambda weight: weight.T.reshape(heads, a, width),
            ),
            "gate": of("mlp.gate_proj.weight", (self.hidden, width), np.transpose),
            "up": of("mlp.up_proj.weight", (self.hidden, width), np.transpose),
            "down": of("mlp.down_proj.weight", (width, self.hidden), np.transpose),
        }
        if self.config.biases == "qkv":
            for name, num in (("query", heads), ("key", groups), ("value", groups)):
                bias = f"self_attn.{name[0]}_proj.bias"
                found[f"{name}_bias"] = of(bias, (num * a,), _reshape(num, a))
        return found


class _Gpt2(_Family):
    table, norm = "wte.weight", "ln_f"

    def single(self) -> dict[str, Source]:
        return super().single() | {
            "position": self._first("wpe.weight", self.config.context_tokens),
            "final/final_bias": Source("ln_f.bias", (self.width,)),
        }

    def stacked(self) -> dict[str, Callable[[int], Source]]:
        width, heads, a, hidden = self.width, self.heads, self.head_width, self.hidden

        def of(name: str, shape: tuple[int, ...], turn: Turn = np.asarray) -> Any:
            return lambda layer: Source(f"h.{layer}.{name}", shape, turn)

        found = {
            "attention_norm_scale": of("ln_1.weight", (width,)),
            "attention_norm_bias": of("ln_1.bias", (width,)),
            "ffn_norm_scale": of("ln_2.weight", (width,)),
            "ffn_norm_bias": of("ln_2.bias", (width,)),
            "out": of(
                "attn.c_proj.weight", (width, width), lambda weight: weight.reshape(heads, a, width)
            ),
            "out_bias": of("attn.c_proj.bias", (width,)),
            "up": of("mlp.c_fc.weight", (width, hidden)),
            "up_bias": of("mlp.c_fc.bias", (hidden,)),
            "down": of("mlp.c_proj.weight", (hidden, width)),
            "down_bias": of("mlp.c_proj.bias", (width,)),
        }
        for place, name in enumerate(("query", "key", "value")):
            columns = slice(place * width, (place + 1) * width)
            weight, bias = _columns(columns, (width, heads, a)), _columns(columns, (heads, a))
            found[name] = of("attn.c_attn.weight", (width, 3 * width), weight)
            found[f"{name}_bias"] = of("attn.c_attn.bias", (3 * width,), bias)
        return found


def _reshape(*shape: int) -> Turn:
    return lambda tensor: tensor.reshape(shape)


def _columns(columns: slice, shape: tuple[int, ...]) -> Turn:
    """Takes one of three matrices that lie side by side."""
    return lambda tensor: tensor[..., columns].reshape(shape)
