"""Parts that both networks are made of: parameters, norms, feed-forward, the layer loop."""

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mlpmem_jax.config.networks import ComputeDtype
from mlpmem_jax.parallel.sharding import LOGICAL_AXES, Names, gather_for_use, target_platform

VOCAB_MULTIPLE = 128
MAX_UNROLLED_LAYERS = 12
# What a fused attention kernel leaves for its backward pass; `remat=dots` keeps it, as it keeps
# what matrix products made.
ATTENDED = "attended"

Arrays = dict[str, jax.Array]
# What a parameter is, given where it is made: weight decay and counts go by it, never by names.
# A table that is looked up is an embedding, positions and n-grams too; a gate is a vector.
Role = Literal["matrix", "vector", "embedding", "head", "norm", "bias"]


class Spec(NamedTuple):
    """One parameter of a group.

    Attributes:
        axes: The logical axis of each dim.
        scale: Standard deviation of its normal initial values; 0 means zeros, infinity ones.
        role: What it is.
        exact: Whether it is read in float32; other parameters are cast to the compute dtype first.
    """

    shape: tuple[int, ...]
    axes: Names
    scale: float
    role: Role
    exact: bool = False


def padded_vocab_size(vocab_size: int) -> int:
    """Rounds V, or the rows of a table, up to a multiple of 128: devices can share them."""
    return -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def resolve_dtype(name: ComputeDtype, platform: str | None = None) -> Any:
    """Returns the dtype of matrix products: float32 on CPU, bfloat16 elsewhere, if "auto".

    Args:
        name: What is configured.
        platform: Of the devices; None: `target_platform`.
    """
    if name == "auto":
        name = "float32" if (platform or target_platform()) == "cpu" else "bfloat16"
    return jnp.dtype(name)


def unrolls(layer_loop: Literal["auto", "scan", "unroll"], num_layers: int) -> bool:
    """Returns whether the blocks are written out one after another."""
    if layer_loop == "auto":
        return target_platform() == "cpu" and num_layers <= MAX_UNROLLED_LAYERS
    return layer_loop == "unroll"


def swiglu_width(width: int) -> int:
    """Returns 8/3 of the width, rounded up to a multiple of 64."""
    return -(-(8 * width) // (3 * 64)) * 64


def ffn_width(given: int | Literal["auto"], width: int, activation: str) -> int:
    """Returns the feed-forward width F."""
    if given != "auto":
        return given
    return swiglu_width(width) if activation == "swiglu" else 4 * width


class Parameters(nnx.Module):
    """A group of float32 parameters, each with the logical names of its dimensions."""

    def __init__(self, specs: Mapping[str, Spec], rngs: nnx.Rngs | None):
        """Draws the parameters.

        Args:
            specs: What each is.
            rngs: Source of the `params` keys; None: shapes in place of arrays.
        """
        self.names = tuple(sorted(specs))
        for name in self.names:
            setattr(self, name, parameter(*specs[name][:4], rngs, exact=specs[name].exact))

    def arrays(self) -> Arrays:
        """Returns the arrays by name; tuples of one for each layer after `split_layers`."""
        return {name: getattr(self, name).get_value() for name in self.names}

    def split_layers(self) -> None:
        """Makes each stacked array on a CPU one array for each layer, to be read and not trained.

        XLA copies a layer out of a stacked array whenever a CPU multiplies by it, which takes
        longer than a product with few rows.
        """
        for name in self.names:
            variable = getattr(self, name)
            stacked = variable.get_value()
            if isinstance(stacked, jax.Array):  # Neither a shape nor split before.
                (device, *others) = stacked.devices()
                if device.platform == "cpu" and not others:
                    variable.set_value(_layers_of(stacked))

    def axes(self) -> dict[str, Names]:
        """Returns the logical axes of each array by name."""
        return {name: getattr(self, name).get_metadata()[LOGICAL_AXES] for name in self.names}


@jax.jit
def _layers_of(stacked: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(stacked[layer] for layer in range(len(stacked)))


def parameter(
    shape: tuple[int, ...],
    axes: Names,
    scale: float,
    role: Role,
    rngs: nnx.Rngs | None,
    *,
    exact: bool = False,
) -> nnx.Param:
    """Returns a float32 parameter.

    Args:
        axes: The logical axis of each dim.
        scale: Standard deviation of its normal initial values; 0 means zeros, infinity ones.
        role: What it is.
        rngs: Source of the `params` keys; None: its shape in place of an array.
        exact: Whether it is read in float32.
    """
    if rngs is None or scale == 0 or math.isinf(scale):
        value = filled(shape, 1.0 if math.isinf(scale) else 0.0, rngs)
    else:
        value = scale * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, logical_axes=axes, role=role, exact=exact)


def filled(shape: tuple[int, ...], value: float, rngs: nnx.Rngs | None) -> Any:
    """Returns a float32 array of one value, or its shape where `rngs` is None."""
    if rngs is None:
        return jax.ShapeDtypeStruct(shape, jnp.float32)
    return jnp.full(shape, value, jnp.float32)


def norm_shapes(name: str, width: int, num_layers: int | None, bias: bool) -> dict[str, Spec]:
    """Returns the parameters of a norm, stacked over layers where there are any."""
    shape: tuple[int, ...] = (width,) if num_layers is None else (num_layers, width)
    axes: Names = ("state",) if num_layers is None else ("layers", "state")
    shapes = {f"{name}_scale": Spec(shape, axes, math.inf, "norm", exact=True)}
    if bias:
        shapes[f"{name}_bias"] = Spec(shape, axes, 0.0, "bias", exact=True)
    return shapes


def ffn_shapes(
    width: int, hidden: int, num_layers: int, activation: str, bias: bool, init_scale: float
) -> dict[str, Spec]:
    """Returns the parameters of stacked feed-forward layers."""
    into = Spec((num_layers, width, hidden), ("layers", "embed", "ffn"), init_scale, "matrix")
    out_scale, back = init_scale / math.sqrt(2 * num_layers), ("layers", "ffn", "embed")
    shapes = {"up": into, "down": Spec((num_layers, hidden, width), back, out_scale, "matrix")}
    if activation == "swiglu":
        shapes["gate"] = into
    if bias:
        inner = Spec((num_layers, hidden), ("layers", "ffn"), 0.0, "bias")
        shapes["up_bias"] = inner
        shapes["down_bias"] = Spec((num_layers, width), ("layers", "state"), 0.0, "bias")
        if activation == "swiglu":
            shapes["gate_bias"] = inner
    return shapes


def normalize_heads(x_THA: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """RMSNorm of queries or keys in float32.

    Args:
        x_THA: Queries or keys.
        scale: [A]: each head is normalised, or [H, A]: all of them together.
        epsilon: Added to the variance.

    Returns:
        The same shape and dtype.
    """
    x32_THA = x_THA.astype(jnp.float32)
    dims = tuple(range(-scale.ndim, 0))
    variance = jnp.mean(jnp.square(x32_THA), axis=dims, keepdims=True)
    return (x32_THA * jax.lax.rsqrt(variance + epsilon) * scale).astype(x_THA.dtype)


def normalize(x_TD: jax.Array, arrays: Arrays, name: str, kind: str, epsilon: float) -> jax.Array:
    """LayerNorm ("layer") or RMSNorm ("rms") in float32; the result has x's dtype."""
    x32_TD = x_TD.astype(jnp.float32)
    if kind == "layer":
        x32_TD = x32_TD - jnp.mean(x32_TD, axis=-1, keepdims=True)
    variance_T1 = jnp.mean(jnp.square(x32_TD), axis=-1, keepdims=True)
    y_TD = x32_TD * jax.lax.rsqrt(variance_T1 + epsilon) * arrays[f"{name}_scale"]
    if f"{name}_bias" in arrays:
        y_TD = y_TD + arrays[f"{name}_bias"]
    return y_TD.astype(x_TD.dtype)


def project(x_TD: jax.Array, arrays: Arrays, axes: dict[str, Names], name: str) -> jax.Array:
    """Multiplies rows by a matrix and adds its bias if it has one.

    Rows are one dimension on purpose: XLA on CPU is up to three times slower at the
    gradient of a product whose rows are spread over two dimensions.

    Args:
        x_TD: Rows; the dims of the weight that are contracted are the leading ones.
        arrays: Parameters of one layer.
        axes: Their logical axes.
        name: Which one.

    Returns:
        [T, ...] in x's dtype; so are the partial sums that devices add up.
    """
    weight = arrays[name].astype(x_TD.dtype)
    weight = gather_for_use(weight, axes[name][-weight.ndim :])
    num_contracted = x_TD.ndim - 1
    contracted = tuple(range(num_contracted))
    y = jax.lax.dot_general(
        x_TD,
        weight,
        ((tuple(i + 1 for i in contracted), contracted), ((), ())),
        preferred_element_type=x_TD.dtype,
    )
    bias = arrays.get(f"{name}_bias")
    return y if bias is None else y + bias.astype(y.dtype)


def feed_forward(
    x_TD: jax.Array, arrays: Arrays, axes: dict[str, Names], activation: str
) -> jax.Array:
    """SwiGLU (Llama) or GELU in its tanh form (GPT-2)."""
    up_TF = project(x_TD, arrays, axes, "up")
    if activation == "swiglu":
        h_TF = jax.nn.silu(project(x_TD, arrays, axes, "gate")) * up_TF
    else:
        h_TF = jax.nn.gelu(up_TF, approximate=True)
    return project(h_TF, arrays, axes, "down")


def with_remat(block: Callable[..., Any], policy: Literal["none", "full", "dots"]) -> Any:
    """Makes a block's backward pass recompute its inside: nothing, all, all but products."""
    if policy == "none":
        return block
    saved = None
    if policy == "dots":
        policies = jax.checkpoint_policies
        saved = policies.save_from_both_policies(
            policies.dots_with_no_batch_dims_saveable,
            policies.save_only_these_names(ATTENDED),
        )
    return jax.checkpoint(block, policy=saved)


class LayerLoop:
    """Blocks one after another, whose parameters have a leading dim of layers."""

    def __init__(self, stacked: Mapping[str, Any], unroll: bool):
        """Takes the parameters.

        Args:
            stacked: Those of all layers; or a tuple of each of them, which are written out in
                any case.
            unroll: Write the blocks out (same parameters, same result).
        """
        self._stacked = stacked
        first = next(iter(stacked.values()))
        self._total = len(first)
        self._layers: list[Arrays] | None = None
        if isinstance(first, tuple):
            self._layers = [
                {name: parts[layer] for name, parts in stacked.items()}
                for layer in range(self._total)
            ]
        elif unroll:
            # `split`, since the gradient of slices is a sum of padded arrays.
            sizes = (1,) * self._total
            split = {name: jax.lax.split(array, sizes) for name, array in stacked.items()}
            self._layers = [
                {name: parts[layer][0] for name, parts in split.items()}
                for layer in range(self._total)
            ]

    def arrays(self, layer: int | jax.Array) -> Arrays:
        """Returns the parameters of one layer."""
        if self._layers is not None:
            assert isinstance(layer, int)
            return self._layers[layer]
        return {
            name: jax.lax.dynamic_index_in_dim(array, layer, keepdims=False)
            for name, array in self._stacked.items()
        }

    def run(
        self, block: Callable[[Any, Arrays, Any], Any], carry: Any, first: int, stop: int
    ) -> Any:
        """Applies blocks first..stop-1 to a carry.

        Args:
            block: (carry, arrays of one layer, number of the block) → carry. The number is a
                Python int when unrolled and a traced int32 when scanned.
            carry: What flows through the blocks.
            first: Number of the first block.
            stop: One more than that of the last.

        Returns:
            The carry after the last block.
        """
        if self._layers is not None or stop - first <= 1:
            for layer in range(first, stop):
                carry = block(carry, self.arrays(layer), layer)
            return carry
        numbers = jnp.arange(first, stop, dtype=jnp.int32)
        if stop - first == self._total:

            def step(carry: Any, inputs: Any) -> tuple[Any, None]:
                return block(carry, *inputs), None

            return jax.lax.scan(step, carry, (self._stacked, numbers))[0]

        def step_of_part(carry: Any, layer: jax.Array) -> tuple[Any, None]:
            return block(carry, self.arrays(layer), layer), None

        # Of a part, layers are looked up: to scan over it would copy it first.
        return jax.lax.scan(step_of_part, carry, numbers)[0]


def mask_padding(logits_V: jax.Array, vocab_size: int) -> jax.Array:
    """Sets the logits of padded vocabulary entries (last dim) to -inf."""
    if logits_V.shape[-1] == vocab_size:
        return logits_V
    real_V = jnp.arange(logits_V.shape[-1]) < vocab_size
    return jnp.where(real_V, logits_V, -jnp.inf)


def head_logits(hidden_BD: jax.Array, head_VD: jax.Array, vocab_size: int) -> jax.Array:
    """Returns all logits of a few tokens (for sampling; losses never build them).

    Args:
        hidden_BD: [..., D] states after the final norm.
        head_VD: [padded V, D].
        vocab_size: Entries that are real.

    Returns:
        [..., padded V] float32, padding at -inf.
    """
    logits = jnp.einsum(
        "...d,vd->...v",
        hidden_BD,
        head_VD.astype(hidden_BD.dtype),
        preferred_element_type=jnp.float32,
    )
    return mask_padding(logits, vocab_size)
