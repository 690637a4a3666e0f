"""Which tensors of `transformers` a decoder's parameters are, and how they are turned.

`transformers` stores matrices as [out, in], those of GPT-2 as [in, out]. Suffixes as in
docs/design.md, section 3.
"""

import abc
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from mlpmem_jax.config.networks import DecoderConfig
from mlpmem_jax.models.layers import ffn_width

HEAD = "lm_head.weight"
Turn = Callable[[np.ndarray], np.ndarray]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor, and the parameter (or one layer of it) that it holds.

    Attributes:
        name: Its name, without the prefix of the model before the head.
        turn: Makes the parameter of it.
        back: Makes it of the parameter; where several parameters share a tensor, their parts
            stand side by side in its last dim.
    """

    name: str
    shape: Shape
    turn: Turn = np.asarray
    back: Turn = np.asarray


@dataclasses.dataclass(frozen=True)
class Entry:
    """A parameter, or one layer of it.

    Attributes:
        parameter: Its path in the decoder.
        layer: Which layer, where layers are stacked.
        tensor: Where it stands.
    """

    parameter: str
    layer: int | None
    tensor: Tensor


class Family(abc.ABC):
    """What the families share.

    Attributes:
        prefix: Of all names but the head's.
    """

    prefix: str
    table: str
    _norm: str
    _block: str

    def __init__(
        self, config: DecoderConfig, vocab_size: int, shapes: Mapping[str, Shape] | None = None
    ):
        """Describes a decoder.

        Args:
            config: Its shape.
            shapes: Of the tensors of a file: tables may have more rows than are taken.
        """
        self._config, self._vocab_size, self._shapes = config, vocab_size, shapes or {}
        self._heads = config.num_heads
        self._groups, self._head_width = config.resolved_kv_heads, config.resolved_head_width
        self._hidden = ffn_width(config.ffn_width, config.width, config.activation)

    def entries(self) -> Iterator[Entry]:
        """Yields every parameter."""
        for name, tensor in self._single().items():
            yield Entry(name, None, tensor)
        for layer in range(self._config.num_layers):
            for name, tensor in self._stacked().items():
                where = f"{self._block}.{layer}.{tensor.name}"
                yield Entry(f"blocks/{name}", layer, dataclasses.replace(tensor, name=where))

    def rows(self, name: str, default: int) -> int:
        """Returns the rows of a table in the file."""
        return (self._shapes.get(name) or (default,))[0]

    def _first(self, name: str, count: int) -> Tensor:
        # Spare rows belong to no token or position; fewer than are wanted are refused by shape.
        shape = (max(self.rows(name, count), count), self._config.width)
        return Tensor(name, shape, lambda table: table[:count], lambda table: table[:count])

    def _single(self) -> dict[str, Tensor]:
        found = {
            "embedding": self._first(self.table, self._vocab_size),
            "final/final_scale": Tensor(f"{self._norm}.weight", (self._config.width,)),
        }
        if self._config.head == "untied":
            found["head"] = self._first(HEAD, self._vocab_size)
        return found

    @abc.abstractmethod
    def _stacked(self) -> dict[str, Tensor]:
        """Returns the tensors of a layer, by our names under `blocks`."""


class Llama(Family):
    """Llama, Mistral, OLMo2, Qwen2, Qwen3 and what has their names."""

    prefix, table, _norm, _block = "model.", "embed_tokens.weight", "norm", "layers"

    def _stacked(self) -> dict[str, Tensor]:
        width, heads, a = self._config.width, self._heads, self._head_width
        sizes = {"query": heads, "key": self._groups, "value": self._groups}
        norms = {
            "pre": ("input_layernorm", "post_attention_layernorm"),
            "post": ("post_attention_layernorm", "post_feedforward_layernorm"),
        }[self._config.norm_place]
        found = {
            "attention_norm_scale": Tensor(f"{norms[0]}.weight", (width,)),
            "ffn_norm_scale": Tensor(f"{norms[1]}.weight", (width,)),
            "out": Tensor(
                "self_attn.o_proj.weight",
                (width, heads * a),
                lambda matrix: matrix.T.reshape(heads, a, width),
                lambda out: out.reshape(heads * a, width).T,
            ),
        }
        for name, shape in {
            "gate": (self._hidden, width),
            "up": (self._hidden, width),
            "down": (width, self._hidden),
        }.items():
            found[name] = Tensor(f"mlp.{name}_proj.weight", shape, np.transpose, np.transpose)
        for name, num in sizes.items():
            projection = f"self_attn.{name[0]}_proj"
            found[name] = Tensor(
                f"{projection}.weight",
                (num * a, width),
                _transposed_to(width, num, a),
                lambda matrix: matrix.reshape(width, -1).T,
            )
            if self._config.biases != "none":
                found[f"{name}_bias"] = Tensor(
                    f"{projection}.bias", (num * a,), _reshaped(num, a), np.ravel
                )
            if self._config.qk_norm != "none" and name != "value":
                kept: Shape = (a,) if self._config.qk_norm == "head" else (num, a)
                found[f"{name}_norm_scale"] = Tensor(
                    f"self_attn.{name[0]}_norm.weight",
                    (math.prod(kept),),
                    _reshaped(*kept),
                    np.ravel,
                )
        if self._config.biases == "attention":
            found["out_bias"] = Tensor("self_attn.o_proj.bias", (width,))
        return found


class Gpt2(Family):
    """GPT-2."""

    prefix, table, _norm, _block = "transformer.", "wte.weight", "ln_f", "h"

    def _single(self) -> dict[str, Tensor]:
        return super()._single() | {
            "position": self._first("wpe.weight", self._config.context_tokens),
            "final/final_bias": Tensor("ln_f.bias", (self._config.width,)),
        }

    def _stacked(self) -> dict[str, Tensor]:
        width, heads, a = self._config.width, self._heads, self._head_width
        found = {
            "attention_norm_scale": Tensor("ln_1.weight", (width,)),
            "attention_norm_bias": Tensor("ln_1.bias", (width,)),
            "ffn_norm_scale": Tensor("ln_2.weight", (width,)),
            "ffn_norm_bias": Tensor("ln_2.bias", (width,)),
            "out": Tensor(
                "attn.c_proj.weight",
                (width, width),
                _reshaped(heads, a, width),
                _reshaped(width, width),
            ),
            "out_bias": Tensor("attn.c_proj.bias", (width,)),
            "up": Tensor("mlp.c_fc.weight", (width, self._hidden)),
            "up_bias": Tensor("mlp.c_fc.bias", (self._hidden,)),
            "down": Tensor("mlp.c_proj.weight", (self._hidden, width)),
            "down_bias": Tensor("mlp.c_proj.bias", (width,)),
        }
        # The three matrices lie side by side in one tensor.
        for place, name in enumerate(("query", "key", "value")):
            columns = slice(place * width, (place + 1) * width)
            found[name] = Tensor(
                "attn.c_attn.weight",
                (width, 3 * width),
                _columns(columns, (width, heads, a)),
                _reshaped(width, width),
            )
            found[f"{name}_bias"] = Tensor(
                "attn.c_attn.bias", (3 * width,), _columns(columns, (heads, a)), np.ravel
            )
        return found


def family_of(config: DecoderConfig) -> type[Family]:
    """Returns the names that a decoder of this shape has."""
    return Gpt2 if config.positions == "learned" else Llama


def _transposed_to(*shape: int) -> Turn:
    return lambda matrix: matrix.T.reshape(shape)


def _reshaped(*shape: int) -> Turn:
    return lambda tensor: tensor.reshape(shape)


def _columns(columns: slice, shape: Shape) -> Turn:
    return lambda tensor: tensor[..., columns].reshape(shape)
