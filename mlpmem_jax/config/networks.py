"""Sections about networks and the devices they run on: decoder, memory, mesh."""

from typing import Any, Literal

from mlpmem_jax.config.base import Section, runtime, setting
from mlpmem_jax.config.rope import RopeScaling
from mlpmem_jax.config.types import (
    Auto,
    Blocks,
    Count,
    Epsilon,
    ListOf,
    NgramOrder,
    PathText,
    RecentTokens,
    Scale,
    TableRows,
    Tokens,
    Width,
)

ComputeDtype = Literal["auto", "float32", "bfloat16"]


class DecoderConfig(Section):
    """A decoder-only Transformer of the GPT-2, Llama, Mistral, OLMo2, Qwen2 or Qwen3 family."""

    pretrained: PathText | None = runtime(
        None,
        "Hugging Face directory (config.json, *.safetensors, tokenizer.json), GGUF file or Hub id "
        "(org/name or org/name@revision) of a supported family (docs/pretrained.md); `pretrain` "
        "imports its decoder, and it sets the keys of the shape and of the tokenizer; null: the "
        "decoder is trained on the corpus",
    )
    width: Width = setting(128, "width of the residual stream, D")
    num_layers: Blocks = setting(6, "number of blocks")
    num_heads: Width = setting(4, "attention heads, H")
    num_kv_heads: Width | Auto = setting("auto", "key/value heads, G; auto: decoder.num_heads")
    head_width: Width | Auto = setting("auto", "width of a head, A; auto: D / H")
    ffn_width: Width | Auto = setting(
        "auto",
        "feed-forward width, F; auto: 4 D (gelu) or 8/3 D, rounded up to a multiple of 64 (swiglu)",
    )
    context_tokens: Tokens = setting(256, "longest window, in tokens")
    ngram_orders: ListOf[NgramOrder] = setting(
        (),
        "orders n of hashed n-gram tables: embeddings of the last n tokens, beside the token's; "
        "a control for memory.ngram_orders",
    )
    ngram_rows: TableRows = setting(32768, "rows of each n-gram table; see memory.ngram_rows")
    ngram_width: Width = setting(32, "width of each n-gram table")
    norm: Literal["rms", "layer"] = setting("rms", "rms: RMSNorm (Llama); layer: LayerNorm (GPT-2)")
    norm_place: Literal["pre", "post"] = setting(
        "pre", "norms before (pre) or after (post: OLMo2) attention and feed-forward"
    )
    qk_norm: Literal["none", "head", "projection"] = setting(
        "none",
        "RMSNorm of queries and keys; head: of each head (Qwen3); projection: of all (OLMo2)",
    )
    positions: Literal["rope", "learned"] = setting("rope", "rope: Llama; learned: GPT-2")
    activation: Literal["swiglu", "gelu"] = setting("swiglu", "swiglu: Llama; gelu: GPT-2")
    biases: Literal["none", "qkv", "attention", "all"] = setting(
        "none",
        "biases; none: Llama; qkv: of query, key and value (Qwen2); attention: also of its output; "
        "all: GPT-2",
    )
    head: Literal["tied", "untied"] = setting("untied", "untied: Llama; tied to embeddings: GPT-2")
    rope_theta: float = setting(10000.0, "base of rotary positions", ge=1, le=1e12)
    rope_scaling: RopeScaling = setting(RopeScaling(), "scaling of rotary positions")
    sliding_window: Tokens | None = setting(
        None, "tokens that a position attends to, itself included (Mistral); null: all before it"
    )
    norm_epsilon: Epsilon = setting(1e-5, "constant added to the variance in norms")
    init_scale: Scale = setting(0.02, "standard deviation of initial weights")
    compute_dtype: ComputeDtype = setting("auto", "auto: float32 on CPU, bfloat16 elsewhere")
    remat: Literal["none", "full", "dots"] = runtime(
        "none", "recomputation in the backward pass; full: blocks; dots: all but matrix products"
    )
    layer_loop: Literal["auto", "scan", "unroll"] = runtime(
        "auto", "auto: unrolled on CPU up to 12 blocks, otherwise scanned"
    )
    attention: Literal["auto", "xla", "cudnn", "blocked", "flash"] = runtime(
        "auto",
        "flash: fused kernel, TPU only (falls back to blocked unless the window is a multiple of "
        "128); cudnn: GPU only; auto: blocked on CPU, flash on TPU, cudnn or xla on GPU",
    )

    def recipe(self) -> dict[str, Any]:
        """Returns the keys that decide what is computed; of options only those with an effect.

        Ids of decoders without an option are those from before it was added.
        """
        recipe = super().recipe()
        unused = {
            "norm_place": self.norm_place == "pre",
            "qk_norm": self.qk_norm == "none",
            "rope_scaling": self.rope_scaling.kind == "none",
            "sliding_window": self.attention_window is None,
        }
        return {key: value for key, value in recipe.items() if not unused.get(key, False)}

    @property
    def attention_window(self) -> int | None:
        """Tokens that a position attends to, where the context is longer; else None."""
        window = self.sliding_window
        return None if window is None or window >= self.context_tokens else window

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

    pretrained: PathText | None = runtime(
        None,
        "directory (config.json, *.safetensors) of a memory of the official release; `train` "
        "imports it, and it sets the keys of the memory's shape and datastore.input; null: the "
        "memory is trained",
    )
    width: Width = setting(128, "width of the residual stream, E")
    num_layers: Blocks = setting(4, "number of feed-forward blocks")
    ffn_width: Width | Auto = setting("auto", "feed-forward width, F; auto: as decoder.ffn_width")
    block: Literal["swiglu", "gelu"] = setting(
        "swiglu", "swiglu: with RMSNorm (Llama); gelu: with LayerNorm and biases (GPT-2)"
    )
    biases: Literal["auto", "none", "ffn", "all"] = setting(
        "auto",
        "biases of the blocks; ffn: of feed-forward layers; all: of norms too; auto: none (swiglu) "
        "or all (gelu)",
    )
    projection_bias: Literal["none", "learned"] = setting(
        "none", "bias of the projection from the inputs to memory.width, if there is one"
    )
    input_norm: Literal["none", "rms", "standardize"] = setting(
        "standardize", "scaling of the decoder's state before the first block"
    )
    recent_tokens: RecentTokens = setting(
        0,
        "recent tokens of the document, current one included, whose embeddings are inputs beside "
        "the decoder's state; 0: the state alone (paper)",
    )
    recent_table: Literal["decoder", "own"] = setting(
        "decoder",
        "embeddings of recent tokens; decoder: the decoder's; own: a table of the memory",
    )
    recent_width: Width | Auto = setting(
        "auto", "width of the memory's table (memory.recent_table=own); auto: memory.width"
    )
    ngram_orders: ListOf[NgramOrder] = setting(
        (),
        "orders n of hashed n-gram tables: embeddings of the last n tokens, as further inputs",
    )
    ngram_rows: TableRows = setting(
        32768, "rows of each n-gram table, a multiple of 128; n-grams that collide share a row"
    )
    ngram_width: Width = setting(32, "width of each n-gram table")
    head: Literal["untied", "tied"] = setting("untied", "output head; tied: the decoder's")
    gate: Literal["none", "learned", "fitted"] = setting(
        "none",
        "λ per token, from the input; learned: trained with the joint loss; fitted: fitted to "
        "validation once the memory is trained",
    )
    gate_floor: float = setting(0.0, "smallest distance of the gate from 0 and 1", ge=0, le=0.49)
    temperature: float = setting(1.0, "divides the memory's logits", ge=1e-3, le=1e3)
    norm_epsilon: Epsilon = setting(1e-5, "constant added to the variance in norms")
    init_scale: Scale = setting(0.02, "standard deviation of initial weights")
    compute_dtype: ComputeDtype = setting("auto", "auto: float32 on CPU, bfloat16 elsewhere")
    remat: Literal["none", "full", "dots"] = runtime("none", "as decoder.remat")
    layer_loop: Literal["auto", "scan", "unroll"] = runtime("auto", "as decoder.layer_loop")

    @property
    def resolved_biases(self) -> Literal["none", "ffn", "all"]:
        """Biases of the blocks."""
        if self.biases == "auto":
            return "all" if self.block == "gelu" else "none"
        return self.biases

    @property
    def has_gate(self) -> bool:
        """Whether λ is a function of the input."""
        return self.gate != "none"

    @property
    def num_read_tokens(self) -> int:
        """Last tokens of the document among the memory's inputs, M."""
        return max((self.recent_tokens, *self.ngram_orders))

    @property
    def reads_decoder_table(self) -> bool:
        """Whether embeddings of the decoder are inputs of the memory."""
        return self.recent_tokens > 0 and self.recent_table == "decoder"

    @property
    def has_tables(self) -> bool:
        """Whether the memory has embedding tables."""
        return bool(self.ngram_orders or (self.recent_tokens and self.recent_table == "own"))

    @property
    def reads_decoder(self) -> bool:
        """Whether the memory uses the embeddings or the head of the decoder."""
        return self.reads_decoder_table or self.head == "tied"

    def table_width(self, decoder_width: int) -> int:
        """Returns the width of the embeddings of recent tokens."""
        if self.recent_table == "decoder":
            return decoder_width
        return self.width if self.recent_width == "auto" else self.recent_width

    def input_width(self, decoder_width: int) -> int:
        """Returns the width of the memory's inputs: a state, and embeddings of tokens.

        Args:
            decoder_width: Width of the decoder's states and embeddings, D.
        """
        recent = self.recent_tokens * self.table_width(decoder_width)
        return decoder_width + recent + len(self.ngram_orders) * self.ngram_width


MeshSize = Count | Auto


class MeshConfig(Section):
    """Arrangement of devices; one size may be inferred."""

    data: MeshSize = runtime("auto", "copies of the model; auto: all other devices")
    fsdp: MeshSize = runtime(1, "parts of each parameter, gathered for use (FSDP)")
    tensor: MeshSize = runtime(1, "parts of widths and vocabulary (tensor parallelism)")
    dcn_data: Count = runtime(1, "slices joined by the data-centre network, a factor of mesh.data")
