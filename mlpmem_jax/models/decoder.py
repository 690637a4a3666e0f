"""A decoder-only Transformer of the GPT-2 and Llama families and their relatives, by its keys."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mlpmem_jax.config.data import StateSite
from mlpmem_jax.config.networks import DecoderConfig
from mlpmem_jax.models import layers, ngrams
from mlpmem_jax.models.attention import cached_attention, causal_attention
from mlpmem_jax.models.layers import (
    Arrays,
    Role,
    Spec,
    norm_shapes,
    normalize,
    normalize_heads,
    parameter,
    project,
)
from mlpmem_jax.models.rotary import rotary_angles, rotate
from mlpmem_jax.parallel.sharding import constrain, gather_for_use

RESIDUAL_NAMES = ("batch", "length", "state")


class Site(NamedTuple):
    """One hidden state: what block `block` (from 1) feeds its feed-forward, or its output."""

    kind: str
    block: int

    @classmethod
    def of(cls, site: StateSite, num_layers: int) -> "Site":
        """Returns the site that a configuration means."""
        return cls(site.site, site.block(num_layers))


class Cache(NamedTuple):
    """Keys and values of the tokens read so far.

    Attributes:
        key: [layers, B, G, M, A] in the compute dtype; heads before tokens, as attention's products
            read them.
        value: The same.
        length_B: int32, tokens read; entries from there on are garbage and never seen.
        recent_BN: int32, the tokens read last that n-grams of the next take, the newest first.
    """

    key: jax.Array
    value: jax.Array
    length_B: jax.Array
    recent_BN: jax.Array

    def emptied(self, row_B: jax.Array) -> "Cache":
        """Returns the cache with some rows empty: what they held is never seen again."""
        return self._replace(
            length_B=jnp.where(row_B, 0, self.length_B),
            recent_BN=jnp.where(row_B[:, None], ngrams.NO_TOKEN, self.recent_BN),
        )


class Decoder(nnx.Module):
    """The decoder. Parameters are float32, unless frozen; products run in `compute_dtype`."""

    def __init__(self, config: DecoderConfig, vocab_size: int, *, rngs: nnx.Rngs | None):
        """Draws initial parameters.

        Args:
            vocab_size: V, entries of the tokenizer; the model pads it to 128.
            rngs: Source of the `params` keys; None: shapes in place of arrays.
        """
        self.config = config
        self.vocab_size = vocab_size
        self.padded_vocab = layers.padded_vocab_size(vocab_size)
        self.num_kv_heads = config.resolved_kv_heads
        self.head_width = config.resolved_head_width
        self.dtype = layers.resolve_dtype(config.compute_dtype)
        scale, table = config.init_scale, (self.padded_vocab, config.width)
        learned = config.positions == "learned"
        # What is added to embeddings is added in float32.
        self.embedding = parameter(
            table, ("vocab", "embed"), scale, "embedding", rngs,
            exact=learned or bool(config.ngram_orders),
        )  # fmt: skip
        if learned:
            shape, axes = (config.context_tokens, config.width), ("positions", "embed")
            self.position = parameter(shape, axes, scale, "embedding", rngs, exact=True)
        self.blocks = layers.Parameters(self._block_shapes(), rngs)
        bias = config.biases == "all"
        self.final = layers.Parameters(norm_shapes("final", config.width, None, bias), rngs)
        if config.head == "untied":
            self.head = parameter(table, ("vocab", "embed"), scale, "head", rngs)
        if config.ngram_orders:
            self.ngrams = ngrams.make_tables(config, rngs, exact=False)
            shape = (len(config.ngram_orders) * config.ngram_width, config.width)
            deviation = 1 / math.sqrt(shape[0])
            # Keeps the scale of what is looked up: that of embeddings.
            projection = Spec(shape, (None, "embed"), deviation, "matrix")
            self.ngram = layers.Parameters({"projection": projection}, rngs)

    def _block_shapes(self) -> dict[str, Spec]:
        config = self.config
        num, width, heads, groups = (
            config.num_layers, config.width, config.num_heads, self.num_kv_heads
        )  # fmt: skip
        bias, scale = config.biases == "all", config.init_scale
        hidden = layers.ffn_width(config.ffn_width, width, config.activation)
        names = ("layers", "embed", "heads", "head_width")
        kv_names = ("layers", "embed", "kv_heads", "head_width")
        kv = Spec((num, width, groups, self.head_width), kv_names, scale, "matrix")
        shapes = {
            "query": Spec((num, width, heads, self.head_width), names, scale, "matrix"),
            "key": kv,
            "value": kv,
            "out": Spec(
                (num, heads, self.head_width, width),
                ("layers", "heads", "head_width", "embed"),
                scale / math.sqrt(2 * num),
                "matrix",
            ),
        }
        if config.biases != "none":
            for name in ("query", "key", "value"):
                shapes[f"{name}_bias"] = _without_dims(shapes[name], 2, 0.0, "bias")
        if config.biases in ("attention", "all"):
            shapes["out_bias"] = Spec((num, width), ("layers", "state"), 0.0, "bias")
        if config.qk_norm != "none":
            # Of one head, or of all of them.
            first = 3 if config.qk_norm == "head" else 2
            for name in ("query", "key"):
                kept = _without_dims(shapes[name], first, math.inf, "norm")
                shapes[f"{name}_norm_scale"] = kept._replace(exact=True)
        return {
            **shapes,
            **norm_shapes("attention_norm", width, num, bias),
            **norm_shapes("ffn_norm", width, num, bias),
            **layers.ffn_shapes(width, hidden, num, config.activation, bias, scale),
        }

    def head_VD(self) -> jax.Array:
        """Returns the output head, [padded V, D]."""
        return self.embedding[...] if self.config.head == "tied" else self.head[...]

    def logits(self, final_BLD: jax.Array) -> jax.Array:
        """Returns [..., padded V] float32 logits of a few tokens, padding at -inf."""
        return layers.head_logits(final_BLD, self.head_VD(), self.vocab_size)

    def hidden(
        self,
        tokens_BL: jax.Array,
        segment_BL: jax.Array | None = None,
        sites: Sequence[Site] = (),
        final: bool = True,
        differentiated: bool = False,
    ) -> tuple[jax.Array | None, dict[Site, jax.Array]]:
        """Reads windows of tokens.

        Args:
            tokens_BL: int32 token ids.
            segment_BL: int32 document numbers; given, attention stays within a document.
                Positions count from the window's start either way.
            sites: States to return.
            final: Whether the last state is wanted; without it, blocks above the highest
                site are not computed.
            differentiated: Whether gradients run through sites and blocks above them: scanned
                blocks are then one loop, since each loop's gradient is as large as all blocks.

        Returns:
            The state after the final norm ([B, L, D], compute dtype; None without `final`),
            and the states at the sites, same shape and dtype.
        """
        config = self.config
        position_L = jnp.arange(tokens_BL.shape[1], dtype=jnp.int32)
        angle = self._angles(position_L)

        def attend(layer: Any, cache: None, query: Any, key: Any, value: Any) -> Any:
            query, key = self._rotate(query, angle), self._rotate(key, angle)
            mixed_BLHA = causal_attention(
                query, key, value, segment_BL, config.attention, config.attention_window
            )
            return mixed_BLHA, cache

        before_BN = self._no_tokens(tokens_BL.shape[0])
        x_BLD = self._embed(tokens_BL, position_L, before_BN, segment_BL)
        last = config.num_layers if final else max((s.block for s in sites), default=0)
        x_BLD, states, _ = self._run_blocks(x_BLD, None, attend, sites, last, differentiated)
        return (self._finish(x_BLD) if final else None), states

    def init_cache(self, batch: int, max_tokens: int) -> Cache:
        """Returns an empty cache for `batch` sequences of up to `max_tokens` tokens."""
        shape = (self.config.num_layers, batch, self.num_kv_heads, max_tokens, self.head_width)
        zeros = jnp.zeros(shape, self.dtype)
        return Cache(zeros, zeros, jnp.zeros((batch,), jnp.int32), self._no_tokens(batch))

    def extend(
        self,
        tokens_BL: jax.Array,
        cache: Cache,
        length_B: jax.Array | None = None,
        sites: Sequence[Site] = (),
    ) -> tuple[jax.Array, dict[Site, jax.Array], Cache]:
        """Reads further tokens: whole prompts into an empty cache, or one token a sequence.

        Args:
            tokens_BL: int32 ids, left-aligned; what lies beyond a sequence's length is
                ignored by everything that follows (its own states are garbage).
            cache: What was read before. Tokens beyond its capacity are dropped silently:
                callers size it for prompt plus new tokens.
            length_B: int32 tokens to read of each sequence; None: all L.
            sites: States to return.

        Returns:
            The states after the final norm, [B, L, D]; the states at the sites; the cache.
        """
        offset_L = jnp.arange(tokens_BL.shape[1], dtype=jnp.int32)
        position_BL = cache.length_B[:, None] + offset_L
        angle = self._angles(position_BL)
        row_B1 = jnp.arange(tokens_BL.shape[0])[:, None]

        def attend(layer: Any, pair: Any, query: Any, key: Any, value: Any) -> Any:
            query, key = self._rotate(query, angle), self._rotate(key, angle)
            pair = tuple(
                old.at[layer, row_B1, :, position_BL].set(new, mode="drop")
                for old, new in zip(pair, (key, value), strict=True)
            )
            key_BGMA, value_BGMA = (cached[layer] for cached in pair)
            window = self.config.attention_window
            return cached_attention(query, key_BGMA, value_BGMA, position_BL, window), pair

        x_BLD = self._embed(tokens_BL, position_BL, cache.recent_BN)
        pair = (cache.key, cache.value)
        x_BLD, states, (key, value) = self._run_blocks(
            x_BLD, pair, attend, sites, self.config.num_layers
        )
        read_B = jnp.full_like(cache.length_B, tokens_BL.shape[1]) if length_B is None else length_B
        recent_BN = ngrams.appended(cache.recent_BN, tokens_BL, read_B)
        return self._finish(x_BLD), states, Cache(key, value, cache.length_B + read_B, recent_BN)

    def _no_tokens(self, batch: int) -> jax.Array:
        num_recent = max(self.config.ngram_orders, default=1) - 1
        return jnp.full((batch, num_recent), ngrams.NO_TOKEN, jnp.int32)

    def _embed(
        self,
        tokens_BL: jax.Array,
        position: jax.Array,
        before_BN: jax.Array,
        segment_BL: jax.Array | None = None,
    ) -> jax.Array:
        table_VD = gather_for_use(self.embedding[...], ("vocab", "embed"))
        x_BLD = jnp.take(table_VD, tokens_BL, axis=0, mode="clip")
        if self.config.ngram_orders:
            recent_BLM = ngrams.last_tokens(tokens_BL, before_BN, segment_BL)
            row_BLO = ngrams.table_rows(recent_BLM, self.config)
            found_BLX = ngrams.look_up(self.ngrams[...], row_BLO)
            found_TX = found_BLX.reshape(-1, found_BLX.shape[-1]).astype(self.dtype)
            y_TD = project(found_TX, self.ngram.arrays(), self.ngram.axes(), "projection")
            x_BLD = x_BLD + y_TD.reshape(x_BLD.shape)
        if self.config.positions == "learned":
            x_BLD = x_BLD + jnp.take(self.position[...], position, axis=0, mode="clip")
        return constrain(x_BLD.astype(self.dtype), *RESIDUAL_NAMES)

    def _angles(self, position: jax.Array) -> jax.Array | None:
        if self.config.positions == "learned":
            return None
        config = self.config
        return rotary_angles(position, self.head_width, config.rope_theta, config.rope_scaling)

    def _rotate(self, x_BLHA: jax.Array, angle: jax.Array | None) -> jax.Array:
        if angle is None:
            return x_BLHA
        scaling = self.config.rope_scaling
        factor = 1.0 if scaling.kind == "none" else scaling.attention_factor
        return rotate(x_BLHA, angle, factor)

    def _finish(self, x_BLD: jax.Array) -> jax.Array:
        arrays = self.final.arrays()
        return normalize(x_BLD, arrays, "final", self.config.norm, self.config.norm_epsilon)

    def _run_blocks(
        self,
        x_BLD: jax.Array,
        cache: Any,
        attend: Any,
        sites: Sequence[Site],
        last: int,
        differentiated: bool = False,
    ) -> tuple[jax.Array, dict[Site, jax.Array], Any]:
        """Applies blocks 1..last; `attend(layer, cache, q, k, v)` returns (output, cache)."""
        config, axes = self.config, self.blocks.axes()
        unroll = layers.unrolls(config.layer_loop, config.num_layers)
        shape, width = x_BLD.shape, x_BLD.shape[-1]
        for site in sites:
            assert 1 <= site.block <= last, f"{site} is not among blocks 1..{last}"

        def norm(x_BLD: jax.Array, arrays: Arrays, name: str, place: str) -> jax.Array:
            if config.norm_place != place:
                return x_BLD
            return normalize(x_BLD, arrays, name, config.norm, config.norm_epsilon)

        def block(x_BLD: jax.Array, cache: Any, arrays: Arrays, layer: Any) -> Any:
            y_BLD = norm(x_BLD, arrays, "attention_norm", "pre")
            y_TD = y_BLD.reshape(-1, width)
            query, key, value = (
                project(y_TD, arrays, axes, name) for name in ("query", "key", "value")
            )
            if config.qk_norm != "none":
                query, key = (
                    normalize_heads(y, arrays[f"{name}_norm_scale"], config.norm_epsilon)
                    for name, y in (("query", query), ("key", key))
                )
            query, key, value = (y.reshape(*shape[:2], *y.shape[1:]) for y in (query, key, value))
            query = constrain(query, "batch", "length", "heads", "head_width")
            mixed_BLHA, cache = attend(layer, cache, query, key, value)
            mixed_THA = mixed_BLHA.reshape(-1, *mixed_BLHA.shape[2:])
            y_BLD = project(mixed_THA, arrays, axes, "out").reshape(shape)
            x_BLD = x_BLD + norm(y_BLD, arrays, "attention_norm", "post")
            x_BLD = constrain(x_BLD, *RESIDUAL_NAMES)
            ffn_input_BLD = norm(x_BLD, arrays, "ffn_norm", "pre")
            y_TD = ffn_input_BLD.reshape(-1, width)
            y_TD = layers.feed_forward(y_TD, arrays, axes, config.activation)
            y_BLD = norm(y_TD.reshape(shape), arrays, "ffn_norm", "post")
            x_BLD = constrain(x_BLD + y_BLD, *RESIDUAL_NAMES)
            return x_BLD, cache, ffn_input_BLD

        block = layers.with_remat(block, config.remat)
        loop = layers.LayerLoop(self.blocks.arrays(), unroll)

        def step(carry: Any, arrays: Arrays, layer: Any) -> Any:
            x_BLD, cache, states = carry
            x_BLD, cache, ffn_input_BLD = block(x_BLD, cache, arrays, layer)
            found = {"ffn_input": ffn_input_BLD, "residual": x_BLD}
            states = {
                site: jnp.where(layer == site.block - 1, found[site.kind], state)
                for site, state in states.items()
            }
            return x_BLD, cache, states

        if differentiated and not unroll:
            states = {site: jnp.zeros(shape, x_BLD.dtype) for site in sites}
            x_BLD, cache, states = loop.run(step, (x_BLD, cache, states), 0, last)
            return x_BLD, states, cache
        states = {}
        for first, stop in _parts(sites, last):
            ffn_input = Site("ffn_input", stop)
            if ffn_input in sites:
                x_BLD, cache, states[ffn_input] = block(x_BLD, cache, loop.arrays(first), first)
            else:
                x_BLD, cache, _ = loop.run(step, (x_BLD, cache, {}), first, stop)
            if (residual := Site("residual", stop)) in sites:
                states[residual] = x_BLD
        return x_BLD, states, cache


def _parts(sites: Sequence[Site], last: int) -> Iterator[tuple[int, int]]:
    """Cuts blocks 0..last-1 behind those at sites; what feeds a feed-forward takes its block alone.

    Yields:
        Number of the first block of each part, and of the next part.
    """
    cuts = {0, last, *(site.block for site in sites)}
    cuts |= {site.block - 1 for site in sites if site.kind == "ffn_input"}
    return itertools.pairwise(sorted(cuts))


def _without_dims(spec: Spec, first: int, scale: float, role: Role) -> Spec:
    """Returns a parameter with the layers of another and its dims from `first` on."""
    return Spec((spec.shape[0], *spec.shape[first:]), ("layers", *spec.axes[first:]), scale, role)
