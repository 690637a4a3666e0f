"""Generation with a cache equals running the whole network again for every token."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlpmem_jax.config.networks import MemoryConfig
from mlpmem_jax.generation import interpolated
from mlpmem_jax.generation.decode import Generator
from mlpmem_jax.generation.interpolated import InterpolatedModel
from mlpmem_jax.generation.sampling import Sampling
from mlpmem_jax.models.interpolation import interpolate
from mlpmem_jax.models.layers import Parameters
from mlpmem_jax.parallel.mesh import single_device_mesh
from tests.unit.tiny_models import (
    CONTEXT,
    MEMORIES,
    PROMPTS,
    SEPARATOR,
    SITE,
    VOCAB,
    WEIGHT,
    networks,
    tiny_model,
)


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
    decoder, memory = networks(family)

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
    model = tiny_model(family, with_memory)
    found = _generate(model, list(PROMPTS), GREEDY, tokens=40)
    for name, prompt in PROMPTS.items():
        assert found[name] == _recomputed(family, with_memory, prompt, 40), name


@pytest.mark.parametrize("family", ["llama", "gpt2", "own", "ngrams", "decoder-ngrams"])
@pytest.mark.parametrize("with_memory", [True, False])
def test_scores_of_windows_are_those_of_tokens_read_one_by_one(family: str, with_memory: bool):
    model = tiny_model(family, with_memory)
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
    with_memory = _generate(tiny_model(), list(PROMPTS), GREEDY, tokens=40)
    assert with_memory != _generate(tiny_model("llama", False), list(PROMPTS), GREEDY, tokens=40)


def test_prompts_do_not_depend_on_their_batch():
    together = _generate(tiny_model(), list(PROMPTS), RANDOM, tokens=30)
    reordered = _generate(tiny_model(), list(PROMPTS)[::-1], RANDOM, tokens=30)
    assert together == reordered
    for name in ("b", "d"):  # Other shapes, so equal to rounding: enough for the same draws.
        assert _generate(tiny_model(), [name], RANDOM, tokens=30)[name] == together[name]


def test_seeds():
    first = _generate(tiny_model(), ["b"], RANDOM, seed=1)
    assert first == _generate(tiny_model(), ["b"], RANDOM, seed=1)
    assert first != _generate(tiny_model(), ["b"], RANDOM, seed=2)


def test_flat_draws_meet_neither_padding_nor_the_separator():
    """Temperature so high that everything is equally probable: texts end at the separator."""
    found = _generate(tiny_model(), list(PROMPTS), FLAT, tokens=400)
    drawn = {token for tokens in found.values() for token in tokens}
    assert len(drawn) > VOCAB / 2
    assert max(drawn) < VOCAB
    assert SEPARATOR not in drawn
    assert any(len(tokens) < 400 for tokens in found.values())


def test_distributions_sum_to_one():
    model = tiny_model()
    length_B = jnp.array([3, 0])
    logprob_BV, cache = jax.jit(model.extend)(
        model.parameters, model.empty_cache(2), jnp.ones((2, 3), jnp.int32), length_B
    )
    assert np.exp(logprob_BV[0]).sum() == pytest.approx(1, abs=1e-5)
    assert cache.decoder.length_B.tolist() == [3, 0]


def test_a_step_is_the_same_in_any_cache_and_however_layers_are_stored(monkeypatch):
    """Each is a program of its own, whose sums may round otherwise."""
    tokens = np.random.default_rng(0).integers(1, VOCAB, (2, 250)).astype(np.int32)
    length, one = np.array([250, 9], np.int32), np.ones(2, np.int32)
    found = []
    for split in (False, True):
        decoder, memory = networks.__wrapped__("llama", context=600)
        with monkeypatch.context() as patch:
            if not split:
                patch.setattr(Parameters, "split_layers", lambda blocks: None)
            model = InterpolatedModel(
                decoder, memory, site=SITE, weight=WEIGHT, separator=SEPARATOR,
                mesh=single_device_mesh(),
            )  # fmt: skip
        assert isinstance(decoder.blocks.arrays()["query"], tuple) == split
        extend = jax.jit(model.extend)
        sizes = [model.cache_tokens(251), model.cache_tokens(400), 600]
        _, cache = extend(model.parameters, model.empty_cache(2, sizes[0]), tokens, length)
        for size in sizes if split else sizes[-1:]:
            logprob_BV, _ = extend(model.parameters, cache.grown(size), tokens[:, :1], one)
            found.append(np.asarray(logprob_BV))
    assert len(found) == 4
    for other in found[1:]:
        np.testing.assert_allclose(other, found[0], rtol=1e-6)


def test_a_cache_that_grows_changes_no_text(monkeypatch):
    decoder, memory = networks("llama", context=64)
    model = InterpolatedModel(
        decoder, memory, site=SITE, weight=WEIGHT, separator=SEPARATOR, mesh=single_device_mesh()
    )
    names = ["", "b", "c"]
    expected = _generate(model, names, FLAT, tokens=45)
    sizes, grown = [], interpolated.ModelCache.grown
    monkeypatch.setattr(interpolated, "_LEAST_CACHE_TOKENS", 16)
    monkeypatch.setattr(
        interpolated.ModelCache,
        "grown",
        lambda cache, size: sizes.append(size) or grown(cache, size),
    )
    assert _generate(model, names, FLAT, tokens=45) == expected
    assert sizes == [32, 64]


@pytest.mark.parametrize(
    ("context", "tokens", "expected"),
    [(40, 3, 40), (600, 256, 256), (600, 257, 512), (600, 600, 600)],
)
def test_size_of_a_cache(context: int, tokens: int, expected: int):
    decoder, _ = networks("llama", context=context)
    model = InterpolatedModel(
        decoder, None, site=SITE, weight=None, separator=SEPARATOR, mesh=single_device_mesh()
    )
    assert model.cache_tokens(tokens) == expected
