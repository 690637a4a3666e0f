"""Sections about networks and the devices they run on: decoder, memory, mesh."""

from typing import Literal

from mlpmem_jax.config.base import Section, runtime, setting
from mlpmem_jax.config.types import (
    Auto,
    Blocks,
    Count,
    Epsilon,
    Name,
    NgramOrder,
    RecentTokens,
    Scale,
    TableRows,
    Tokens,
    Width,
)

ComputeDtype = Literal["auto", "float32", "bfloat16"]


class DecoderConfig(Section):
    """A decoder-only Transformer of the GPT-2 or the Llama family, by these keys."""

    name: Name = setting("base", "name of the decoder")
    width: Width = setting(128, "width of the residual stream, D")
    num_layers: Blocks = setting(6, "blocks")
    num_heads: Width = setting(4, "attention heads, H")
    num_kv_heads: Width | Auto = setting("auto", "key/value heads, G; auto: num_heads")
    head_width: Width | Auto = setting("auto", "width of a head, A; auto: width / num_heads")
    ffn_width: Width | Auto = setting(
        "auto", "feed-forward width, F; auto: 4 D for gelu, 8/3 D rounded up to 64 for swiglu"
    )
    context_tokens: Tokens = setting(256, "longest window that the decoder reads")
    ngram_orders: tuple[NgramOrder, ...] = setting(
        (),
        "lengths n of the n-grams that the decoder looks up beside each token, in a hashed table "
        "for each n; a control for memory.ngram_orders",
    )
    ngram_rows: TableRows = setting(32768, "rows of each hashed table; as in memory")
    ngram_width: Width = setting(32, "width of each hashed table")
    norm: Literal["rms", "layer"] = setting("rms", "rms: Llama; layer: GPT-2")
    positions: Literal["rope", "learned"] = setting("rope", "rope: Llama; learned: GPT-2")
    activation: Literal["swiglu", "gelu"] = setting("swiglu", "swiglu: Llama; gelu: GPT-2")
    biases: Literal["none", "all"] = setting("none", "none: Llama; all: GPT-2")
    head: Literal["tied", "untied"] = setting("untied", "untied: Llama; tied to embeddings: GPT-2")
    rope_theta: float = setting(10000.0, "base wavelength of rotary positions", ge=1, le=1e12)
    norm_epsilon: Epsilon = setting(1e-5, "added to the variance in norms")
    init_scale: Scale = setting(0.02, "standard deviation of initial weights")
    compute_dtype: ComputeDtype = setting("auto", "auto: float32 on CPU, bfloat16 elsewhere")
    remat: Literal["none", "full", "dots"] = runtime(
        "none", "what the backward pass recomputes: nothing, blocks, all but matrix products"
    )
    layer_loop: Literal["auto", "scan", "unroll"] = runtime(
        "auto", "auto: unrolled on CPU up to 12 blocks, scanned elsewhere"
    )
    attention: Literal["auto", "xla", "cudnn", "blocked", "flash"] = runtime(
        "auto",
        "flash: a fused kernel, of TPUs only (windows of a multiple of 128, else blocked); cudnn: "
        "of GPUs only; auto: blocked on CPU, flash on TPU, cudnn or xla on GPU",
    )

    @property
    def resolved_kv_heads(self) -> int:
        """Key/value heads, G."""
        return self.num_heads if self.num_kv_heads == "auto" else self.num_kv_heads

    @property
    def resolved_head_width(self) -> int:
        """Width of a head, A."""
        return self.width // self.num_heads if self.head_width == "auto" else self.head_width


class MemoryConfig(Section):
    """The MLP Memory (paper, section 3.1): no token mixing."""

    name: Name = setting("base", "name of the memory")
    width: Width = setting(128, "width of the residual stream, E")
    num_layers: Blocks = setting(4, "feed-forward blocks")
    ffn_width: Width | Auto = setting("auto", "feed-forward width, F; as in decoder")
    block: Literal["swiglu", "gelu"] = setting(
        "swiglu", "swiglu with RMSNorm (Llama), gelu with LayerNorm and biases (GPT-2)"
    )
    input_norm: Literal["none", "rms", "standardize"] = setting(
        "standardize", "how the decoder's state is scaled before the first block"
    )
    recent_tokens: RecentTokens = setting(
        0,
        "how many of the last tokens of the document, the current one among them, the memory reads "
        "(their embeddings) beside the decoder's state; 0: the state alone (the paper)",
    )
    recent_table: Literal["decoder", "own"] = setting(
        "decoder", "embeddings of recent tokens: the decoder's as they are, or a table of its own"
    )
    recent_width: Width | Auto = setting(
        "auto", "width of the memory's own table (memory.recent_table=own); auto: memory.width"
    )
    ngram_orders: tuple[NgramOrder, ...] = setting(
        (),
        "lengths n of the n-grams that the memory looks up besides: the last n tokens of the "
        "document, in a hashed table for each n",
    )
    ngram_rows: TableRows = setting(
        32768,
        "rows of each hashed table, in whole multiples of 128; n-grams that collide share a row",
    )
    ngram_width: Width = setting(32, "width of each hashed table")
    head: Literal["untied", "tied"] = setting("untied", "own output head, or the decoder's")
    gate: Literal["none", "learned"] = setting(
        "none", "learned: λ is a sigmoid of a linear map of the input, for each token"
    )
    gate_floor: float = setting(0.0, "the gate stays this far from 0 and from 1", ge=0, le=0.49)
    norm_epsilon: Epsilon = setting(1e-5, "added to the variance in norms")
    init_scale: Scale = setting(0.02, "standard deviation of initial weights")
    compute_dtype: ComputeDtype = setting("auto", "auto: float32 on CPU, bfloat16 elsewhere")
    remat: Literal["none", "full", "dots"] = runtime("none", "as in decoder")
    layer_loop: Literal["auto", "scan", "unroll"] = runtime("auto", "as in decoder")

    @property
    def num_read_tokens(self) -> int:
        """Last tokens of the document that the memory reads in any form, M."""
        return max((self.recent_tokens, *self.ngram_orders))

    @property
    def reads_decoder_table(self) -> bool:
        """Whether the memory reads embeddings of the decoder."""
        return self.recent_tokens > 0 and self.recent_table == "decoder"

    @property
    def has_tables(self) -> bool:
        """Whether tables of its own stand before the first matrix."""
        return bool(self.ngram_orders or (self.recent_tokens and self.recent_table == "own"))

    @property
    def reads_decoder(self) -> bool:
        """Whether the memory shares a table with the decoder, or its head."""
        return self.reads_decoder_table or self.head == "tied"

    def table_width(self, decoder_width: int) -> int:
        """Returns the width of the table of recent tokens, whosever it is."""
        if self.recent_table == "decoder":
            return decoder_width
        return self.width if self.recent_width == "auto" else self.recent_width

    def input_width(self, decoder_width: int) -> int:
        """Returns the width of what the memory reads: a state, and embeddings of tokens.

        Args:
            decoder_width: Width of the decoder's states and embeddings, D.
        """
        recent = self.recent_tokens * self.table_width(decoder_width)
        return decoder_width + recent + len(self.ngram_orders) * self.ngram_width


MeshSize = Count | Auto


class MeshConfig(Section):
    """How devices are arranged; one size may be inferred."""

    data: MeshSize = runtime("auto", "copies of the model; auto: all devices that are left")
    fsdp: MeshSize = runtime(1, "parts into which parameters are cut, gathered for use")
    tensor: MeshSize = runtime(1, "parts into which widths and the vocabulary are cut")
    dcn_data: Count = runtime(1, "slices joined by the data-centre network, part of data")
