"""Slots: the same bits in any company, the tokens of `Generator`, the scores of whole windows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlpmem_jax.generation.decode import Generator
from mlpmem_jax.generation.engine import Engine, buckets
from mlpmem_jax.generation.sampling import Sampling
from mlpmem_jax.generation.slots import GREEDY, Drawn, Rule, text_keys
from tests.unit.tiny_models import CONTEXT, PROMPTS, SEPARATOR, VOCAB, WEIGHT, tiny_model

SLOTS, TOP, TOKENS = 3, 4, 30


def _random(name: str = "b", **rule: object) -> Rule:
    sampling = rule.pop("sampling", Sampling(temperature=1.0, top_p=0.95))
    return Rule(sampling, text_keys(0, [name])[0], **rule)


@functools.cache
def _engine(family: str = "llama", with_memory: bool = True) -> Engine:
    return Engine(tiny_model(family, with_memory), SLOTS, TOP)


def _ids(name: str) -> list[int]:
    return [SEPARATOR, *PROMPTS[name]]


def _continued(
    engine: Engine, name: str, rule: Rule, slot: int = 0, tokens: int = TOKENS
) -> list[Drawn]:
    """Continues a prompt alone; separators do not end it."""
    found = [engine.insert(slot, _ids(name), rule)[0]]
    found += [engine.step(scored=True)[slot] for _ in range(tokens - 1)]
    engine.evict(slot)
    return found


def _tokens(drawn: list[Drawn]) -> list[int]:
    return [one.token for one in drawn]


def _until_separator(tokens: list[int]) -> list[int]:
    return tokens[: tokens.index(SEPARATOR)] if SEPARATOR in tokens else tokens


RULES = {
    "greedy": GREEDY,
    "top-p": _random(),
    "penalty, λ": _random(repetition_penalty=1.7, weight=0.9),
    "top-k, min-p": _random(sampling=Sampling(temperature=2.0, top_k=5, min_p=0.05)),
}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("family", ["llama", "own", "decoder-ngrams"])
def test_a_text_has_the_same_bits_in_any_slot_and_any_company(family: str, rule: Rule):
    """Neighbours that come and go, greedy and random, some of whose rows are full in between."""
    engine = _engine(family)
    alone = _continued(engine, "b", rule)
    for slot in range(SLOTS):
        first, second = (other for other in range(SLOTS) if other != slot)
        engine.insert(first, _ids("d"), _random("d"))
        engine.step()
        found = [engine.insert(slot, _ids("b"), rule)[0]]
        while len(found) < TOKENS:
            if len(found) == 4:
                engine.insert(second, _ids("c"), GREEDY, scored=True)
            if len(found) == 9:
                engine.evict(first)
            if len(found) == 12:
                engine.insert(first, _ids("e"), _random("e", repetition_penalty=3.0))
            found.append(engine.step(scored=True)[slot])
        assert found == alone, slot
        for used in range(SLOTS):
            engine.evict(used)
        assert engine.free_slots() == list(range(SLOTS))


@pytest.mark.parametrize("sampling", [Sampling("greedy"), Sampling(top_p=0.95), Sampling(top_k=7)])
def test_draws_what_the_generator_draws(sampling: Sampling):
    """Prompts that are empty, short, nearly as long as the context, longer; texts beyond it."""
    model = tiny_model()
    generator = Generator(model, sampling)
    for name, prompt in PROMPTS.items():
        expected = [t for _, t in generator.stream([name], [prompt], 40, 0) if t is not None]
        rule = Rule(sampling, text_keys(0, [name])[0])
        found = _tokens(_continued(_engine(), name, rule, tokens=40))
        assert _until_separator(found) == expected, name


@pytest.mark.parametrize("family", ["llama", "gpt2", "recent", "own", "ngrams", "decoder-ngrams"])
@pytest.mark.parametrize("with_memory", [True, False])
def test_log_probabilities_are_those_of_whole_windows(family: str, with_memory: bool):
    """Of the prompt and of what is drawn, against the network without a cache."""
    engine = _engine(family, with_memory)
    model = engine.model
    first, prompt = engine.insert(1, _ids("e"), GREEDY, scored=True)
    drawn = [first, *(engine.step(scored=True)[1] for _ in range(6))]
    engine.evict(1)
    tokens = np.array([[*_ids("e"), *_tokens(drawn)]], np.int32)
    expected_1L = jax.jit(model.score)(
        model.parameters, jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])
    )
    assert [one.token for one in prompt] == tokens[0, 1 : len(_ids("e"))].tolist()
    found = [one.logprob for one in (*prompt, *drawn)]
    np.testing.assert_allclose(found, np.asarray(expected_1L)[0], atol=2e-4)


def test_alternatives_fall_and_hold_the_tokens_own_bits():
    engine = _engine()
    first, prompt = engine.insert(0, _ids("c"), GREEDY, scored=True)
    drawn = [first, *(engine.step(scored=True)[0] for _ in range(10))]
    engine.evict(0)
    assert len(prompt) == len(_ids("c")) - 1
    for one in (*prompt, *drawn):
        logprobs = [logprob for _, logprob in one.top]
        assert len(logprobs) == TOP
        assert logprobs == sorted(logprobs, reverse=True)
        assert max(token for token, _ in one.top) < VOCAB
        listed = dict(one.top).get(one.token)
        assert listed is None or listed == one.logprob
        assert one.logprob <= logprobs[0]
    for one in drawn:  # greedy
        assert one.top[0] == (one.token, one.logprob)


def test_weight_of_a_request():
    """λ = 0 is the decoder alone, whatever the model's own; λ of the model is the default."""
    alone = _continued(_engine("llama", False), "b", GREEDY)
    without = _continued(_engine(), "b", dataclasses.replace(GREEDY, weight=0.0))
    assert _tokens(without) == _tokens(alone)
    np.testing.assert_allclose(
        [one.logprob for one in without], [one.logprob for one in alone], atol=1e-5
    )
    own = _continued(_engine(), "b", GREEDY)
    assert own == _continued(_engine(), "b", dataclasses.replace(GREEDY, weight=WEIGHT))
    assert _tokens(own) != _tokens(alone)
    gated = _continued(_engine("own"), "b", GREEDY)
    assert gated != _continued(_engine("own"), "b", dataclasses.replace(GREEDY, weight=0.5))


def test_a_repetition_penalty_avoids_tokens_of_prompt_and_text():
    """So strong a penalty that a token comes twice only when all have come."""
    rule = dataclasses.replace(GREEDY, repetition_penalty=100.0)
    found = _tokens(_continued(_engine(), "b", rule))
    assert len(set(found)) == TOKENS
    assert not set(found) & set(_ids("b"))
    assert len(set(_tokens(_continued(_engine(), "b", GREEDY)))) < TOKENS


def test_every_bucket_is_compiled_beforehand():
    engine = Engine(tiny_model(), 2, TOP)
    engine.compile()
    assert engine.free_slots() == [0, 1]
    compiled = engine._read._cache_size(), engine._advance._cache_size()
    assert compiled == (len(buckets(CONTEXT)), 1)
    _continued(engine, "d", _random(), slot=1)
    _continued(engine, "", GREEDY)
    assert (engine._read._cache_size(), engine._advance._cache_size()) == compiled


@pytest.mark.parametrize(("context", "sizes"), [(8, [8]), (16, [16]), (40, [16, 32, 40])])
def test_buckets(context: int, sizes: list[int]):
    assert buckets(context) == sizes
