"""The MLP Memory: from a decoder's hidden state to the retriever's distribution (section 3.1).

Beside the state it may read embeddings of the last tokens of the document, which the state has
partly forgotten where the memory reads it (docs/design.md).

Suffixes: D width of the decoder, M recent tokens, X what the network reads (D, or more with M),
E width of the memory.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mlpmem_jax.config.networks import MemoryConfig
from mlpmem_jax.models import layers
from mlpmem_jax.models.layers import Arrays, norm_shapes, normalize, parameter, project
from mlpmem_jax.parallel.sharding import Names, constrain, gather_for_use

_TABLE_AXES: Names = ("vocab", "embed")


class InputStatistics(nnx.Variable):
    """Measured once on the data, saved with the network, never touched by the optimiser."""


class Memory(nnx.Module):
    """Pre-norm residual feed-forward blocks over single hidden states: no token mixing."""

    def __init__(
        self,
        config: MemoryConfig,
        decoder_width: int,
        vocab_size: int,
        *,
        gate_start: float = 0.5,
        rngs: nnx.Rngs,
    ):
        """Draws initial parameters.

        Args:
            config: The section `memory`.
            decoder_width: Width of the decoder states that it reads, D.
            vocab_size: V, as of the decoder.
            gate_start: λ for every input at first, if there is a gate.
            rngs: Source of the `params` keys.
        """
        self.config = config
        self.input_width = input_width = config.input_width(decoder_width)
        self.vocab_size = vocab_size
        self.padded_vocab = layers.padded_vocab_size(vocab_size)
        self.dtype = layers.resolve_dtype(config.compute_dtype)
        self.norm = "rms" if config.block == "swiglu" else "layer"
        bias, scale, width = config.block == "gelu", config.init_scale, config.width
        if config.input_norm == "standardize":
            zeros_X = jnp.zeros((input_width,), jnp.float32)
            self.input_mean = InputStatistics(zeros_X, logical_axes=("state",))
            self.input_inverse_std = InputStatistics(zeros_X + 1, logical_axes=("state",))
        elif config.input_norm == "rms":
            shapes = norm_shapes("input_norm", input_width, None, bias=False)
            self.input = layers.Parameters(shapes, rngs)
        if input_width != width:
            # Keeps the scale of the (normalised) input, unlike the small init of the blocks.
            shape, deviation = (input_width, width), 1 / math.sqrt(input_width)
            shapes = {"projection": (shape, ("embed", None), deviation)}
            self.projection = layers.Parameters(shapes, rngs)
        if config.recent_tokens and config.recent_table == "own":
            table = (self.padded_vocab, (input_width - decoder_width) // config.recent_tokens)
            self.recent = parameter(table, _TABLE_AXES, scale, rngs, "table")
        hidden = layers.ffn_width(config.ffn_width, width, config.block)
        self.blocks = layers.Parameters(
            {
                **norm_shapes("ffn_norm", width, config.num_layers, bias),
                **layers.ffn_shapes(width, hidden, config.num_layers, config.block, bias, scale),
            },
            rngs,
        )
        self.final = layers.Parameters(norm_shapes("final", width, None, bias), rngs)
        if config.head == "untied":
            self.head = parameter((self.padded_vocab, width), ("vocab", "embed"), scale, rngs)
        if config.gate == "learned":
            # Zero weights: at first every input gets the same λ.
            self.gate = parameter((input_width,), ("state",), 0.0, rngs)
            start = gate_logit(gate_start, config.gate_floor)
            self.gate_bias = parameter((1,), ("state",), 0.0, rngs)
            self.gate_bias[...] += start

    def head_VE(self, decoder_head_VD: jax.Array | None = None) -> jax.Array:
        """Returns the output head, [padded V, E] float32; the decoder's if the two are tied."""
        if self.config.head == "untied":
            return self.head[...]
        assert decoder_head_VD is not None, "memory.head=tied needs the decoder's head"
        return decoder_head_VD

    def logits(self, hidden_BLE: jax.Array, decoder_head_VD: jax.Array | None = None) -> jax.Array:
        """Returns [..., padded V] float32 logits of a few tokens, padding at -inf."""
        return layers.head_logits(hidden_BLE, self.head_VE(decoder_head_VD), self.vocab_size)

    def inputs(
        self,
        state_BLD: jax.Array,
        recent_BLM: jax.Array | None = None,
        decoder_table_VD: jax.Array | None = None,
    ) -> jax.Array:
        """Returns what the network reads, for `hidden` and `interpolation`.

        Args:
            state_BLD: [..., D] decoder states, any float dtype.
            recent_BLM: int32 [..., M] recent tokens, the current one first
                (`corpus.recent`); not read without `memory.recent_tokens`.
            decoder_table_VD: The decoder's embeddings, [padded V, D]; read only with
                `memory.recent_table=decoder`.

        Returns:
            [..., X]: the states as they are, or float32 with embeddings behind them.

        Raises:
            ValueError: Tokens or embeddings that it reads are missing, or of another shape.
        """
        if not self.config.recent_tokens:
            return state_BLD
        own = self.config.recent_table == "own"
        table_VW = self.recent[...] if own else decoder_table_VD
        if recent_BLM is None or table_VW is None:
            missing = "tokens" if recent_BLM is None else "embeddings of the decoder"
            raise ValueError(
                f"memory.recent_tokens={self.config.recent_tokens}: this memory reads recent "
                f"tokens beside the state, and no {missing} are given"
            )
        if recent_BLM.shape[-1] != self.config.recent_tokens:
            raise ValueError(
                f"memory.recent_tokens={self.config.recent_tokens}, and {recent_BLM.shape[-1]} "
                "tokens are given"
            )
        if table_VW.shape[0] != self.padded_vocab:
            raise ValueError(
                f"embeddings of {table_VW.shape[0]} tokens, and the memory's vocabulary has "
                f"{self.padded_vocab} (padded)"
            )
        table_VW = gather_for_use(table_VW, _TABLE_AXES)
        read_BLMW = jnp.take(table_VW, recent_BLM, axis=0, mode="clip").astype(jnp.float32)
        read_BLX = read_BLMW.reshape(*recent_BLM.shape[:-1], -1)
        return jnp.concatenate([state_BLD.astype(jnp.float32), read_BLX], axis=-1)

    def set_input_statistics(self, mean_X: jax.Array, inverse_std_X: jax.Array) -> None:
        """Stores what :func:`input_statistics` measured (input_norm=standardize only)."""
        assert self.config.input_norm == "standardize"
        self.input_mean[...] = jnp.asarray(mean_X, jnp.float32)
        self.input_inverse_std[...] = jnp.asarray(inverse_std_X, jnp.float32)

    def hidden(self, input_BLX: jax.Array) -> jax.Array:
        """Maps what the network reads to states for the output head.

        Args:
            input_BLX: [..., X] what `inputs` returned.

        Returns:
            [..., E] states after the final norm, compute dtype.
        """
        config, axes = self.config, self.blocks.axes()
        x_TE = self._read_input(input_BLX.reshape(-1, self.input_width))

        def block(x_TE: jax.Array, arrays: Arrays, _: Any) -> jax.Array:
            y_TE = normalize(x_TE, arrays, "ffn_norm", self.norm, config.norm_epsilon)
            y_TE = layers.feed_forward(y_TE, arrays, axes, config.block)
            return constrain(x_TE + y_TE, "tokens", "state")

        block = layers.with_remat(block, config.remat)
        unroll = layers.unrolls(config.layer_loop, config.num_layers)
        stacked = self.blocks.arrays()
        x_TE = layers.loop_layers(block, x_TE, stacked, config.num_layers, unroll)
        x_TE = normalize(x_TE, self.final.arrays(), "final", self.norm, config.norm_epsilon)
        return x_TE.reshape(*input_BLX.shape[:-1], config.width)

    def interpolation(self, input_BLX: jax.Array) -> jax.Array:
        """Returns λ of each input, float32 [...], in [floor, 1 - floor] (memory.gate=learned)."""
        assert self.config.gate == "learned"
        logit_BL = self._normalized(input_BLX) @ self.gate[...] + self.gate_bias[0]
        floor = self.config.gate_floor
        return floor + (1 - 2 * floor) * jax.nn.sigmoid(logit_BL)

    def _normalized(self, input_TX: jax.Array) -> jax.Array:
        """Returns the input as the network reads it, float32."""
        config = self.config
        x_TX = input_TX.astype(jnp.float32)
        if config.input_norm == "standardize":
            x_TX = (x_TX - self.input_mean[...]) * self.input_inverse_std[...]
        elif config.input_norm == "rms":
            arrays = self.input.arrays()
            x_TX = normalize(x_TX, arrays, "input_norm", "rms", config.norm_epsilon)
        return x_TX

    def _read_input(self, input_TX: jax.Array) -> jax.Array:
        config = self.config
        x_TX = self._normalized(input_TX).astype(self.dtype)
        if self.input_width != config.width:
            arrays, axes = self.projection.arrays(), self.projection.axes()
            x_TX = project(x_TX, arrays, axes, "projection")
        return constrain(x_TX, "tokens", "state")


def gate_logit(value: float, floor: float) -> float:
    """Returns the logit at which the gate gives λ = value."""
    share = (value - floor) / (1 - 2 * floor)
    share = min(max(share, 1e-6), 1 - 1e-6)
    return math.log(share) - math.log1p(-share)


def input_statistics(
    input_ND: jax.Array, weight_N: jax.Array | None = None, epsilon: float = 1e-6
) -> tuple[jax.Array, jax.Array]:
    """Measures each feature of the memory's input.

    Args:
        input_ND: [..., D] states, any float dtype.
        weight_N: [...] weight of each state, 0 for padding; None: all count.
        epsilon: Added to the variance.

    Returns:
        Mean and 1/standard deviation, [D] float32 each.
    """
    input_ND = input_ND.reshape(-1, input_ND.shape[-1]).astype(jnp.float32)
    weight = jnp.ones(input_ND.shape[0]) if weight_N is None else weight_N.reshape(-1)
    weight_N1 = (weight / jnp.maximum(jnp.sum(weight), 1e-9)).astype(jnp.float32)[:, None]
    mean_D = jnp.sum(weight_N1 * input_ND, axis=0)
    variance_D = jnp.sum(weight_N1 * jnp.square(input_ND - mean_D), axis=0)
    return mean_D, jax.lax.rsqrt(variance_D + epsilon)
