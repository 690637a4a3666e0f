"""The MLP Memory: from a decoder's hidden state to the retriever's distribution (section 3.1).

Beside the state it may read the last tokens of the document, which the state has partly forgotten
where the memory reads it (docs/design.md): their embeddings, and n-grams of them in hashed tables.

Suffixes: D width of the decoder, M recent tokens, X what the network reads (D, or more with M),
E width of the memory.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mlpmem_jax.config.networks import MemoryConfig
from mlpmem_jax.models import layers, ngrams
from mlpmem_jax.models.layers import Arrays, norm_shapes, normalize, parameter, project
from mlpmem_jax.parallel.sharding import constrain


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
        rngs: nnx.Rngs | None,
    ):
        """Draws initial parameters.

        Args:
            decoder_width: Width of the decoder states that it reads, D.
            vocab_size: V, as of the decoder.
            gate_start: λ for every input at first, if there is a gate.
            rngs: Source of the `params` keys; None: shapes in place of arrays.
        """
        self.config = config
        self.input_width = input_width = config.input_width(decoder_width)
        self.vocab_size = vocab_size
        self.padded_vocab = layers.padded_vocab_size(vocab_size)
        self.dtype = layers.resolve_dtype(config.compute_dtype)
        self.norm = "rms" if config.block == "swiglu" else "layer"
        scale, width, biases = config.init_scale, config.width, config.resolved_biases
        if config.input_norm == "standardize":
            zeros_X, ones_X = (layers.filled((input_width,), value, rngs) for value in (0.0, 1.0))
            self.input_mean = InputStatistics(zeros_X, logical_axes=("state",))
            self.input_inverse_std = InputStatistics(ones_X, logical_axes=("state",))
        elif config.input_norm == "rms":
            shapes = norm_shapes("input_norm", input_width, None, bias=False)
            self.input = layers.Parameters(shapes, rngs)
        if input_width != width:
            # Keeps the scale of the (normalised) input, unlike the small init of the blocks.
            shape, deviation = (input_width, width), 1 / math.sqrt(input_width)
            shapes = {"projection": layers.Spec(shape, ("embed", None), deviation, "matrix")}
            if config.projection_bias == "learned":
                shapes["projection_bias"] = layers.Spec((width,), ("state",), 0.0, "bias")
            self.projection = layers.Parameters(shapes, rngs)
        if config.recent_tokens and config.recent_table == "own":
            table = (self.padded_vocab, config.table_width(decoder_width))
            self.recent = parameter(table, ngrams.TABLE_AXES, scale, "embedding", rngs, exact=True)
        if config.ngram_orders:
            self.ngrams = ngrams.make_tables(config, rngs, exact=True)
        hidden = layers.ffn_width(config.ffn_width, width, config.block)
        self.blocks = layers.Parameters(
            {
                **norm_shapes("ffn_norm", width, config.num_layers, biases == "all"),
                **layers.ffn_shapes(
                    width, hidden, config.num_layers, config.block, biases != "none", scale
                ),
            },
            rngs,
        )
        self.final = layers.Parameters(norm_shapes("final", width, None, biases == "all"), rngs)
        if config.head == "untied":
            table = (self.padded_vocab, width)
            self.head = parameter(table, ("vocab", "embed"), scale, "head", rngs)
        if config.has_gate:
            # Zero weights: at first every input gets the same λ.
            self.gate = parameter((input_width,), ("state",), 0.0, "vector", rngs, exact=True)
            start = gate_logit(gate_start, config.gate_floor)
            bias_1 = layers.filled((1,), start, rngs)
            self.gate_bias = nnx.Param(bias_1, logical_axes=("state",), role="bias", exact=True)

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
                (`corpus.recent`), M = `memory.num_read_tokens`; not read where M is 0.
            decoder_table_VD: The decoder's embeddings, [padded V, D]; read only with
                `memory.recent_table=decoder`.

        Returns:
            [..., X]: the states as they are, or float32 with embeddings behind them.

        Raises:
            ValueError: Tokens or embeddings that it reads are missing, or of another shape.
        """
        if not self.config.num_read_tokens:
            return state_BLD
        lookups = self._lookups(recent_BLM, decoder_table_VD)
        read = [ngrams.look_up(table_VW, index_BLM) for table_VW, index_BLM in lookups]
        return jnp.concatenate([state_BLD.astype(jnp.float32), *read], axis=-1)

    def _lookups(
        self, recent_BLM: jax.Array | None, decoder_table_VD: jax.Array | None
    ) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Yields tables, and the rows of each that are read."""
        config = self.config
        wanted = config.num_read_tokens
        keys = f"memory.recent_tokens={config.recent_tokens}"
        if config.ngram_orders:
            keys += f", memory.ngram_orders={list(config.ngram_orders)}"
        if recent_BLM is None:
            raise ValueError(f"{keys}: this memory reads tokens beside the state; none are given")
        if recent_BLM.shape[-1] != wanted:
            raise ValueError(f"{keys}: {wanted} tokens are read; {recent_BLM.shape[-1]} are given")
        if config.recent_tokens:
            table_VW = decoder_table_VD if config.reads_decoder_table else self.recent[...]
            if table_VW is None:
                raise ValueError(f"{keys}: embeddings of the decoder are read; none are given")
            if table_VW.shape[0] != self.padded_vocab:
                raise ValueError(
                    f"{keys}: the memory's vocabulary has {self.padded_vocab} tokens (padded), the "
                    f"embeddings that are given {table_VW.shape[0]}"
                )
            yield table_VW, recent_BLM[..., : config.recent_tokens]
        if config.ngram_orders:
            yield self.ngrams[...], ngrams.table_rows(recent_BLM, config)

    def set_input_statistics(self, mean_X: jax.Array, inverse_std_X: jax.Array) -> None:
        """Stores what was measured on the data (memory.input_norm=standardize only)."""
        assert self.config.input_norm == "standardize"
        self.input_mean[...] = jnp.asarray(mean_X, jnp.float32)
        self.input_inverse_std[...] = jnp.asarray(inverse_std_X, jnp.float32)

    def hidden(self, input_BLX: jax.Array) -> jax.Array:
        """Maps what the network reads to states for the output head.

        Args:
            input_BLX: [..., X] what `inputs` returned.

        Returns:
            [..., E] states after the final norm, divided by the temperature; compute dtype.
        """
        config, axes = self.config, self.blocks.axes()
        if input_BLX.shape[-1] != self.input_width:
            raise ValueError(
                f"this memory (memory.recent_tokens={config.recent_tokens}) reads inputs of width "
                f"{self.input_width}, not {input_BLX.shape[-1]}: `inputs` makes them of states"
            )
        x_TE = self._read_input(input_BLX.reshape(-1, self.input_width))

        def block(x_TE: jax.Array, arrays: Arrays, _: Any) -> jax.Array:
            y_TE = normalize(x_TE, arrays, "ffn_norm", self.norm, config.norm_epsilon)
            y_TE = layers.feed_forward(y_TE, arrays, axes, config.block)
            return constrain(x_TE + y_TE, "tokens", "state")

        block = layers.with_remat(block, config.remat)
        unroll = layers.unrolls(config.layer_loop, config.num_layers)
        loop = layers.LayerLoop(self.blocks.arrays(), unroll)
        x_TE = loop.run(block, x_TE, 0, config.num_layers)
        x_TE = normalize(x_TE, self.final.arrays(), "final", self.norm, config.norm_epsilon)
        if config.temperature != 1:
            x_TE = (x_TE / config.temperature).astype(x_TE.dtype)
        return x_TE.reshape(*input_BLX.shape[:-1], config.width)

    def interpolation(self, input_BLX: jax.Array) -> jax.Array:
        """Returns λ of each input, float32 [...], in [floor, 1 - floor] (memory.gate)."""
        assert self.config.has_gate
        logit_BL = self.normalized(input_BLX) @ self.gate[...] + self.gate_bias[0]
        floor = self.config.gate_floor
        return floor + (1 - 2 * floor) * jax.nn.sigmoid(logit_BL)

    def normalized(self, input_TX: jax.Array) -> jax.Array:
        """Returns the input as network and gate read it, float32 [..., X]."""
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
        x_TX = self.normalized(input_TX).astype(self.dtype)
        if self.input_width != config.width:
            arrays, axes = self.projection.arrays(), self.projection.axes()
            x_TX = project(x_TX, arrays, axes, "projection")
        return constrain(x_TX, "tokens", "state")


def gate_logit(value: float, floor: float) -> float:
    """Returns the logit at which the gate gives λ = value."""
    share = (value - floor) / (1 - 2 * floor)
    share = min(max(share, 1e-6), 1 - 1e-6)
    return math.log(share) - math.log1p(-share)
