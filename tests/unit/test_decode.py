"""Generation with a cache equals running the whole network again for every token."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mlpmem_jax.config.networks import DecoderConfig, MemoryConfig
from mlpmem_jax.generation.decode import Generator
from mlpmem_jax.generation.interpolated import InterpolatedModel
from mlpmem_jax.generation.sampling import Sampling
from mlpmem_jax.models.decoder import Decoder, Site
from mlpmem_jax.models.interpolation import interpolate
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.parallel.mesh import single_device_mesh

VOCAB, CONTEXT, SEPARATOR = 61, 16, 0
SITE = Site("ffn_input", 1)
WEIGHT = 0.4
# In "e" a document ends just before the text to continue.
PROMPTS = {
    "": [], "b": [5, 9, 3], "c": list(range(1, 14)), "d": [7] * 40, "e": [8, 9, SEPARATOR, 4],
}  # fmt: skip
NGRAMS = {"ngram_orders": (2, 5), "ngram_rows": 128, "ngram_width": 7}
MEMORIES = {
    "recent": {"recent_tokens": 3},
    "own": {"recent_tokens": 8, "recent_table": "own", "recent_width": 5, "gate": "learned"},
    "ngrams": NGRAMS,
}


@functools.cache
def _networks(family: str) -> tuple[Decoder, Memory]:
    gpt2 = {"norm": "layer", "positions": "learned", "activation": "gelu", "biases": "all"}
    config = DecoderConfig(
        width=32, num_layers=2, num_heads=4, num_kv_heads=2, context_tokens=CONTEXT,
        layer_loop="scan", **(gpt2 | {"head": "tied"} if family == "gpt2" else {}),
        **(NGRAMS if family == "decoder-ngrams" else {}),
    )  # fmt: skip
    memory = MemoryConfig(width=16, num_layers=1, **MEMORIES.get(family, {}))

    return (
        _drawn(lambda: Decoder(config, VOCAB, rngs=nnx.Rngs(0)), seed=0),
        _drawn(lambda: Memory(memory, 32, VOCAB, rngs=nnx.Rngs(0)), seed=1),
    )


def _drawn(build: Callable[[], Any], seed: int) -> Any:
    """Makes a network with parameters from NumPy: nothing to compile.

    They are large, since small ones make every distribution nearly flat.
    """
    graphdef, abstract = nnx.split(nnx.eval_shape(build))
    rng = np.random.default_rng(seed)
    state = jax.tree.map(
        lambda leaf: jnp.asarray(0.4 * rng.standard_normal(leaf.shape), leaf.dtype), abstract
    )
    return nnx.merge(graphdef, state)


@functools.cache
def _model(family: str = "llama", with_memory: bool = True) -> InterpolatedModel:
    decoder, memory = _networks(family)
    return InterpolatedModel(
        decoder, memory if with_memory else None, site=SITE,
        weight=None if memory.config.gate == "learned" else WEIGHT, separator=SEPARATOR,
        mesh=single_device_mesh(),
    )  # fmt: skip


@functools.cache
def _generator(model: InterpolatedModel, sampling: Sampling) -> Generator:
    return Generator(model, sampling)


GREEDY = Sampling(method="greedy")
RANDOM = Sampling(temperature=1.0, top_p=0.95)
FLAT = Sampling(temperature=1e4)


def _generate(
    model: InterpolatedModel, names: list[str], sampling: Sampling, tokens: int = 12, seed: int = 0
) -> dict[str, list[int]]:
    generator = _generator(model, sampling)
    found: list[list[int]] = [[] for _ in names]
    finished = []
    for place, token in generator.stream(names, [PROMPTS[n] for n in names], tokens, seed):
        assert place not in finished
        if token is None:
            finished.append(place)
        else:
            found[place].append(token)
    assert sorted(finished) == list(range(len(names)))
    assert generator.timing.tokens == sum(map(len, found))
    return dict(zip(names, found, strict=True))


@functools.cache
def _next_token(family: str, with_memory: bool) -> Callable[..., jax.Array]:
    decoder, memory = _networks(family)

    @jax.jit
    def next_token(token_BL: jax.Array, last: jax.Array, recent_M: jax.Array) -> jax.Array:
        final_BLD, states = decoder.hidden(token_BL, sites=[SITE])
        assert final_BLD is not None
        logprob_V = jax.nn.log_softmax(decoder.logits(final_BLD[0, last]))
        if with_memory:
            input_X = memory.inputs(states[SITE][0, last], recent_M, decoder.embedding[...])
            memory_V = jax.nn.log_softmax(memory.logits(memory.hidden(input_X)))
            learned = memory.config.gate == "learned"
            weight = memory.interpolation(input_X) if learned else WEIGHT
            logprob_V = interpolate(memory_V, logprob_V, weight)
        return jnp.argmax(logprob_V)

    return next_token


def _recent(family: str, tokens: list[int]) -> np.ndarray:
    """The last tokens of the document that is being written, the newest first."""
    num_recent = MemoryConfig(**MEMORIES.get(family, {})).num_read_tokens
    begins = len(tokens) - 1 - tokens[::-1].index(SEPARATOR)
    newest_first = tokens[begins:][::-1] + [SEPARATOR] * num_recent
    return np.asarray(newest_first[:num_recent], np.int32)


def _recomputed(family: str, with_memory: bool, prompt: list[int], num_tokens: int) -> list[int]:
    """Greedy decoding without a cache: the whole window again for every token."""
    next_token = _next_token(family, with_memory)
    tokens = [SEPARATOR, *prompt]
    window = tokens[-CONTEXT:]
    drawn: list[int] = []
    while len(drawn) < num_tokens:
        padded = np.zeros((1, CONTEXT), np.int32)
        padded[0, : len(window)] = window
        token = int(next_token(padded, len(window) - 1, _recent(family, tokens)))
        if token == SEPARATOR:
            break
        drawn.append(token)
        tokens.append(token)
        window = tokens[-CONTEXT // 2 :] if len(window) == CONTEXT else [*window, token]
    return drawn


@pytest.mark.parametrize(
    ("family", "with_memory"),
    [
        ("llama", True),
        ("llama", False),
        ("gpt2", True),
        ("recent", True),
        ("own", True),
        ("ngrams", True),
        ("decoder-ngrams", True),
    ],
)
def test_equals_recomputing_everything(family: str, with_memory: bool):
    """Ragged prompts in one batch: empty, short, nearly as long as the context, longer."""
    model = _model(family, with_memory)
    found = _generate(model, list(PROMPTS), GREEDY, tokens=40)
    for name, prompt in PROMPTS.items():
        assert found[name] == _recomputed(family, with_memory, prompt, 40), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "own", "ngrams", "decoder-ngrams"])
@pytest.mark.parametrize("with_memory", [True, False])
def test_scores_of_windows_are_those_of_tokens_read_one_by_one(family: str, with_memory: bool):
    model = _model(family, with_memory)
    tokens = np.array([[SEPARATOR, 5, 9, 3, 5, 9, 3, 3], [SEPARATOR, 8, SEPARATOR, 4, 8, 2, 4, 1]])
    score, extend = jax.jit(model.score), jax.jit(model.extend)
    found_BL = score(model.parameters, jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:]))
    cache, one_B = model.empty_cache(2), jnp.array([1, 1])
    for place in range(tokens.shape[1] - 1):
        token_B1 = jnp.asarray(tokens[:, place, None], jnp.int32)
        logprob_BV, cache = extend(model.parameters, cache, token_B1, one_B)
        expected_B = np.asarray(logprob_BV)[[0, 1], tokens[:, place + 1]]
        np.testing.assert_allclose(np.asarray(found_BL)[:, place], expected_B, atol=2e-4)


def test_the_memory_matters():
    with_memory = _generate(_model(), list(PROMPTS), GREEDY, tokens=40)
    assert with_memory != _generate(_model("llama", False), list(PROMPTS), GREEDY, tokens=40)


def test_prompts_do_not_depend_on_their_batch():
    together = _generate(_model(), list(PROMPTS), RANDOM, tokens=30)
    reordered = _generate(_model(), list(PROMPTS)[::-1], RANDOM, tokens=30)
    assert together == reordered
    for name in ("b", "d"):  # Other shapes, so equal to rounding: enough for the same draws.
        assert _generate(_model(), [name], RANDOM, tokens=30)[name] == together[name]


def test_seeds():
    first = _generate(_model(), ["b"], RANDOM, seed=1)
    assert first == _generate(_model(), ["b"], RANDOM, seed=1)
    assert first != _generate(_model(), ["b"], RANDOM, seed=2)


def test_flat_draws_meet_neither_padding_nor_the_separator():
    """Temperature so high that everything is equally probable: texts end at the separator."""
    found = _generate(_model(), list(PROMPTS), FLAT, tokens=400)
    drawn = {token for tokens in found.values() for token in tokens}
    assert len(drawn) > VOCAB / 2
    assert max(drawn) < VOCAB
    assert SEPARATOR not in drawn
    assert any(len(tokens) < 400 for tokens in found.values())


def test_distributions_sum_to_one():
    model = _model()
    length_B = jnp.array([3, 0])
    logprob_BV, cache = jax.jit(model.extend)(
        model.parameters, model.empty_cache(2), jnp.ones((2, 3), jnp.int32), length_B
    )
    assert np.exp(logprob_BV[0]).sum() == pytest.approx(1, abs=1e-5)
    assert cache.decoder.length_B.tolist() == [3, 0]
