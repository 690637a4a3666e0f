"""The decoder: causality, families, layer loops, states at sites, the key/value cache."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from mlpmem_jax.config.data import StateSite
from mlpmem_jax.config.networks import DecoderConfig
from mlpmem_jax.config.rope import RopeScaling
from mlpmem_jax.models.decoder import Decoder, Site
from mlpmem_jax.models.ngrams import hashed
from mlpmem_jax.models.rotary import rotary_angles, rotate
from mlpmem_jax.training.losses import lm_loss

VOCAB, LENGTH = 50, 20
LLAMA = {"num_kv_heads": 2}
NGRAMS = {"ngram_orders": (2, 3), "ngram_rows": 128, "ngram_width": 5}
GPT2 = {
    "norm": "layer", "positions": "learned", "activation": "gelu", "biases": "all", "head": "tied",
}  # fmt: skip
# Norms after blocks, QK norm, output biases, a window of 7 tokens, scaled positions.
OLMO = {
    "num_kv_heads": 2, "norm_place": "post", "qk_norm": "projection", "biases": "attention",
    "sliding_window": 7, "rope_theta": 50.0,
    "rope_scaling": RopeScaling(kind="yarn", factor=4.0, original_tokens=8, attention_factor=1.1),
}  # fmt: skip
QWEN3 = {"num_kv_heads": 2, "qk_norm": "head", "biases": "qkv"}
FAMILIES = pytest.mark.parametrize("family", [LLAMA, GPT2], ids=["llama", "gpt2"])
ALL_FAMILIES = pytest.mark.parametrize(
    "family", [LLAMA, GPT2, OLMO, QWEN3], ids=["llama", "gpt2", "olmo", "qwen3"]
)


def make_decoder(**keys) -> Decoder:
    """A decoder with larger weights than the initial ones: nothing is lost in rounding."""
    keys = {"width": 32, "num_layers": 2, "num_heads": 4, "context_tokens": LENGTH} | keys
    config = DecoderConfig(**keys)
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: Decoder(config, VOCAB, rngs=nnx.Rngs(0))))
    rng = np.random.default_rng(0)

    def draw(leaf):
        noise = 0.1 * rng.standard_normal(leaf.shape)
        return jnp.asarray(noise if leaf.ndim > 2 else noise + 0.5, jnp.float32)

    return nnx.merge(graphdef, jax.tree.map(draw, abstract))


def make_tokens(batch=2, length=LENGTH, seed=1) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, VOCAB)


def run(decoder: Decoder, tokens_BL, segment_BL=None, sites=(), final=True):
    """decoder.hidden, compiled as a whole: far faster than operation by operation."""
    graphdef, state = nnx.split(decoder)

    @jax.jit
    def hidden(state, tokens_BL, segment_BL):
        return nnx.merge(graphdef, state).hidden(tokens_BL, segment_BL, sites, final)

    return hidden(state, tokens_BL, segment_BL)


def run_with_gradient(decoder: Decoder, tokens_BL, sites, differentiated):
    """((a loss, (final, states)), gradients of the parameters)."""
    graphdef, state = nnx.split(decoder)

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def both(state):
        model = nnx.merge(graphdef, state)
        final, states = model.hidden(tokens_BL, sites=sites, differentiated=differentiated)
        loss = jnp.mean(jnp.sin(final)) + sum(jnp.mean(jnp.cos(s)) for s in states.values())
        return loss, (final, states)

    return both(state)


@pytest.mark.parametrize("family", [LLAMA, GPT2, NGRAMS], ids=["llama", "gpt2", "ngrams"])
def test_causal_by_gradient(family):
    """The state at a position has gradients into earlier embeddings only."""
    decoder = make_decoder(**family)
    tokens_BL = jnp.arange(LENGTH)[None]  # all different: rows of the embedding are positions

    @jax.jit
    @jax.grad
    def gradient_of_state(table_VD, position):
        model = nnx.clone(decoder)
        model.embedding[...] = table_VD
        return jnp.sum(jnp.sin(model.hidden(tokens_BL)[0][0, position]))

    for position in (0, 7, LENGTH - 1):
        table_VD = gradient_of_state(decoder.embedding[...], position)
        touched = np.abs(np.asarray(table_VD))[:LENGTH].max(axis=1) > 0
        np.testing.assert_array_equal(touched, np.arange(LENGTH) <= position)


@pytest.mark.parametrize(
    ("family", "attention"),
    [
        (LLAMA, "blocked"),
        (GPT2, "blocked"),
        (LLAMA, "xla"),
        (LLAMA | NGRAMS, "blocked"),
        (OLMO, "blocked"),
        (OLMO, "xla"),
    ],
)
def test_segments_are_isolated(family, attention):
    """Changing one document changes no state of another; its own start is as if alone."""
    decoder = make_decoder(attention=attention, **family)
    segment_BL = jnp.where(jnp.arange(LENGTH) < 8, 3, 4)[None]
    tokens_BL = make_tokens(1)
    changed_BL = tokens_BL.at[0, :8].set((tokens_BL[0, :8] + 1) % VOCAB)
    final, _ = run(decoder, tokens_BL, segment_BL)
    other, _ = run(decoder, changed_BL, segment_BL)
    np.testing.assert_array_equal(final[0, 8:], other[0, 8:])
    assert float(jnp.abs(final[0, :8] - other[0, :8]).max()) > 1e-3
    across, _ = run(decoder, tokens_BL)
    np.testing.assert_allclose(final[0, :8], across[0, :8], atol=1e-5)
    if family in (
        LLAMA,
        OLMO,
    ):  # rotary positions are relative: no document notices its place
        alone, _ = run(decoder, tokens_BL[:, 8:])
        np.testing.assert_allclose(final[0, 8:], alone[0], atol=2e-5)


def test_ngrams_of_a_window_and_of_its_documents():
    """Each place adds the projected rows of the tokens up to it: its document's, its window's."""
    decoder = make_decoder(num_layers=1, ngram_orders=(1, 3), ngram_rows=128, ngram_width=5)
    plain = make_decoder(num_layers=1)
    tokens_BL = make_tokens(2, 8)
    segment_BL = jnp.array([[0, 0, 0, 1, 1, 1, 1, 1]] * 2)

    def embedded(model, segment_BL):
        before_BN = model._no_tokens(2)
        return np.asarray(model._embed(tokens_BL, jnp.arange(8), before_BN, segment_BL))

    table, projection = decoder.ngrams[...], decoder.ngram.arrays()["projection"]
    for segments in (None, segment_BL):
        expected = np.array(embedded(plain, None))
        for b in range(2):
            for place in range(8):
                first = 3 if segments is not None and place >= 3 else 0
                gram = [
                    int(tokens_BL[b, i]) if i >= first else -1 for i in range(place, place - 3, -1)
                ]
                rows = [hashed(jnp.array(gram[:1]), 128), 128 + hashed(jnp.array(gram), 128)]
                expected[b, place] += np.concatenate([table[row] for row in rows]) @ projection
        np.testing.assert_allclose(embedded(decoder, segments), expected, atol=1e-5)


@FAMILIES
def test_learns(family):
    """A decoder learns a fixed text by heart."""
    decoder = Decoder(
        DecoderConfig(width=32, num_layers=2, num_heads=4, context_tokens=LENGTH, **family),
        VOCAB,
        rngs=nnx.Rngs(0),
    )
    tokens_BL = make_tokens(4)
    graphdef, params = nnx.split(decoder)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, moments):
        def loss(params):
            model = nnx.merge(graphdef, params)
            total, sums = lm_loss(
                model.hidden(tokens_BL[:, :-1])[0],
                model.head_VD(),
                tokens_BL[:, 1:],
                jnp.ones((4, LENGTH - 1)),
                vocab_size=VOCAB,
                chunk_tokens=32,
            )
            return total / sums["weight_sum"]

        value, grads = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(grads, moments, params)
        return optax.apply_updates(params, updates), moments, value

    moments = optimizer.init(params)
    losses = []
    for _ in range(60):
        params, moments, value = step(params, moments)
        losses.append(float(value))
    assert abs(losses[0] - np.log(VOCAB)) < 0.5
    assert losses[-1] < 0.5


@FAMILIES
def test_scan_equals_unroll_and_remat_changes_nothing(family):
    sites = (Site("ffn_input", 3), Site("residual", 2))
    results = [
        run_with_gradient(
            make_decoder(num_layers=3, **keys, **family), make_tokens(), sites, differentiated
        )
        for keys, differentiated in (
            ({"layer_loop": "unroll"}, False),
            ({"layer_loop": "scan", "remat": "dots"}, True),
            ({"layer_loop": "scan", "remat": "full"}, False),
        )
    ]
    for other in results[1:]:
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(results[0]), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-5)


def plain_reference(decoder: Decoder, tokens_BL: jax.Array):
    """The whole network written out with einsums: final state, and all states at sites."""
    config, arrays = decoder.config, decoder.blocks.arrays()
    length = tokens_BL.shape[1]

    def norm(x, scale, bias):
        x = x - x.mean(-1, keepdims=True) if config.norm == "layer" else x
        y = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + config.norm_epsilon) * scale
        return y if bias is None else y + bias

    x = decoder.embedding[...][tokens_BL]
    if config.positions == "learned":
        x = x + decoder.position[...][:length]
    half = decoder.head_width // 2
    frequency = config.rope_theta ** (-jnp.arange(half) / half)
    frequency *= jnp.array(config.rope_scaling.factors(half, config.rope_theta))
    angle = (jnp.arange(length)[:, None] * frequency)[:, None]

    def rope(y):
        if config.positions == "learned":
            return y
        a, b = y[..., :half], y[..., half:]
        cos, sin = (f(angle) * config.rope_scaling.attention_factor for f in (jnp.cos, jnp.sin))
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    states = {}
    for i in range(config.num_layers):
        p = {name: array[i] for name, array in arrays.items()}
        before, after = (
            {
                name: functools.partial(
                    norm, scale=p[f"{name}_norm_scale"], bias=p.get(f"{name}_norm_bias")
                )
                if config.norm_place == place
                else lambda x: x
                for name in ("attention", "ffn")
            }
            for place in ("pre", "post")
        )
        y = before["attention"](x)
        q, k, v = (
            jnp.einsum("bld,dha->blha", y, p[n]) + p.get(f"{n}_bias", 0.0)
            for n in ("query", "key", "value")
        )
        if config.qk_norm == "head":
            q, k = norm(q, p["query_norm_scale"], None), norm(k, p["key_norm_scale"], None)
        if config.qk_norm == "projection":
            q, k = (
                norm(x.reshape(*x.shape[:2], -1), scale.ravel(), None).reshape(x.shape)
                for x, scale in ((q, p["query_norm_scale"]), (k, p["key_norm_scale"]))
            )
        repeats = config.num_heads // decoder.num_kv_heads
        q, k, v = rope(q), jnp.repeat(rope(k), repeats, axis=2), jnp.repeat(v, repeats, axis=2)
        score = jnp.einsum("blha,bmha->bhlm", q, k) / jnp.sqrt(decoder.head_width)
        seen = jnp.tril(jnp.ones((length, length), bool))
        seen &= ~jnp.tril(seen, -(config.sliding_window or length))
        score = jnp.where(seen, score, -jnp.inf)
        mixed = jnp.einsum("bhlm,bmha->blha", jax.nn.softmax(score, -1), v)
        mixed = jnp.einsum("blha,had->bld", mixed, p["out"]) + p.get("out_bias", 0.0)
        x = x + after["attention"](mixed)
        y = before["ffn"](x)
        states[Site("ffn_input", i + 1)] = y
        up = y @ p["up"] + p.get("up_bias", 0.0)
        if config.activation == "swiglu":
            up = jax.nn.silu(y @ p["gate"]) * up
        else:
            inner = jnp.sqrt(2 / jnp.pi) * (up + 0.044715 * up**3)
            up = 0.5 * up * (1 + jnp.tanh(inner))
        x = x + after["ffn"](up @ p["down"] + p.get("down_bias", 0.0))
        states[Site("residual", i + 1)] = x
    final = decoder.final.arrays()
    return norm(x, final["final_scale"], final.get("final_bias")), states


@ALL_FAMILIES
@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_equals_plain_reference(family, loop):
    decoder, tokens_BL = make_decoder(layer_loop=loop, **family), make_tokens()
    graphdef, state = nnx.split(decoder)
    final, states = jax.jit(
        lambda state, tokens_BL: plain_reference(nnx.merge(graphdef, state), tokens_BL)
    )(state, tokens_BL)
    got, got_states = run(decoder, tokens_BL, sites=tuple(states))
    np.testing.assert_allclose(got, final, atol=3e-5)
    assert set(got_states) == set(states)
    for site, state in states.items():
        np.testing.assert_allclose(got_states[site], state, atol=3e-5, err_msg=str(site))


@pytest.mark.parametrize("loop", ["scan", "unroll"])
def test_blocks_above_the_highest_site_are_not_computed(loop):
    decoder, tokens_BL = make_decoder(layer_loop=loop, num_layers=4), make_tokens()
    sites = (Site("ffn_input", 3),)
    final, states = run(decoder, tokens_BL, sites=sites, final=False)
    assert final is None
    np.testing.assert_array_equal(
        states[sites[0]], run(decoder, tokens_BL, sites=sites)[1][sites[0]]
    )
    graphdef, state = nnx.split(decoder)

    def compiled(final):
        def run(state):
            return nnx.merge(graphdef, state).hidden(tokens_BL, sites=sites, final=final)

        return jax.jit(run).lower(state).compile()

    if loop == "unroll":
        flops = [compiled(final).cost_analysis()["flops"] for final in (False, True)]
        assert flops[0] < 0.72 * flops[1]
    else:  # XLA counts the body of a loop once; what it needs beside is less than two blocks.
        blocks = sum(x.nbytes for x in jax.tree.leaves(nnx.state(decoder.blocks)))
        assert compiled(False).memory_analysis().temp_size_in_bytes < blocks / 2


def test_site_of_a_share_of_the_depth():
    assert Site.of(StateSite(layer=0.7), 6) == Site("ffn_input", 5)
    assert Site.of(StateSite(layer=0.7), 10).block == 7
    assert Site.of(StateSite(site="residual", layer=2), 6) == Site("residual", 2)


@pytest.mark.parametrize(("family", "loop"), [(LLAMA, "unroll"), (GPT2, "scan"), (OLMO, "scan")])
def test_cache_equals_full_forward(family, loop):
    """Ragged prompts, then token by token, give what reading the whole text gives."""
    decoder, tokens_BL = make_decoder(layer_loop=loop, **family), make_tokens(3)
    sites = (Site("ffn_input", 2), Site("residual", 2))
    final, states = run(decoder, tokens_BL, sites=sites)
    length_B = jnp.array([9, 4, 1])
    prompt_BL = jnp.where(jnp.arange(9) < length_B[:, None], tokens_BL[:, :9], 0)
    graphdef, state = nnx.split(decoder)
    extend = jax.jit(lambda state, *args: nnx.merge(graphdef, state).extend(*args, sites=sites))
    cache = decoder.init_cache(3, LENGTH)
    got, got_states, cache = extend(state, prompt_BL, cache, length_B)
    for row, length in enumerate(length_B):
        np.testing.assert_allclose(got[row, :length], final[row, :length], atol=3e-5)
    for _ in range(LENGTH - 9):
        at_B = cache.length_B
        row_B = jnp.arange(3)
        got, got_states, cache = extend(state, tokens_BL[row_B, at_B][:, None], cache, None)
        np.testing.assert_allclose(got[:, 0], final[row_B, at_B], atol=3e-5)
        for site in sites:
            np.testing.assert_allclose(got_states[site][:, 0], states[site][row_B, at_B], atol=3e-5)
    np.testing.assert_array_equal(cache.length_B, length_B + LENGTH - 9)


def test_rotation_keeps_only_the_distance():
    """q·k after rotation depends on the difference of positions alone."""
    q, k = jax.random.normal(jax.random.key(0), (2, 8))
    position = jnp.arange(6)
    angle = rotary_angles(position, 8, 10000.0)
    rotated = [rotate(jnp.broadcast_to(x, (6, 1, 8)), angle)[:, 0] for x in (q, k)]
    score = np.asarray(rotated[0] @ rotated[1].T)
    np.testing.assert_allclose(np.diag(score, 2), score[0, 2], atol=1e-5)
    np.testing.assert_allclose(score[3, 3], q @ k, atol=1e-5)


def test_bfloat16_keeps_float32_parameters():
    decoder = make_decoder(compute_dtype="bfloat16")
    final, _ = run(decoder, make_tokens())
    exact, _ = run(make_decoder(), make_tokens())
    assert final.dtype == jnp.bfloat16
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(nnx.state(decoder, nnx.Param)))
    assert float(jnp.abs(final.astype(jnp.float32) - exact).mean()) < 0.03


def test_padded_vocabulary_is_never_drawn():
    decoder = make_decoder()
    logits = decoder.logits(run(decoder, make_tokens())[0])
    assert logits.shape[-1] == decoder.padded_vocab == 128
    assert bool(jnp.all(jnp.isneginf(logits[..., VOCAB:])))
    np.testing.assert_allclose(jax.nn.softmax(logits)[..., :VOCAB].sum(-1), 1.0, rtol=1e-5)
