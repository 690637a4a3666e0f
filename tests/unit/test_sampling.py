"""Filters and draws against NumPy references; text that arrives whole."""

import io
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from mlpmem_jax.generation import sampling, stream
from mlpmem_jax.generation.sampling import Sampling


def _random_logprobs(num_prompts: int = 5, vocab: int = 40, padding: int = 3) -> np.ndarray:
    logits = 2 * np.random.default_rng(0).standard_normal((num_prompts, vocab))
    logits[:, vocab - padding :] = -np.inf
    return (logits - np.log(np.exp(logits).sum(-1, keepdims=True))).astype(np.float32)


def _reference(logprob_V: np.ndarray, rule: Sampling) -> np.ndarray:
    """Probabilities after temperature, top-k and top-p, one token at a time."""
    weights = np.exp(logprob_V.astype(np.float64) / rule.temperature)
    order = np.argsort(-weights, kind="stable")
    kept = order[: rule.top_k]
    probabilities = weights[kept] / weights[kept].sum()
    if rule.top_p is not None:
        mass, count = 0.0, 0
        while count < len(kept) and (count == 0 or mass < rule.top_p):
            mass += probabilities[count]
            count += 1
        kept = kept[:count]
    result = np.zeros_like(weights)
    result[kept] = weights[kept] / weights[kept].sum()
    return result


RULES = [
    Sampling(),
    Sampling(temperature=0.7),
    Sampling(top_k=4),
    Sampling(top_k=1),
    Sampling(top_k=1000),
    Sampling(top_p=0.8),
    Sampling(top_p=1e-9),
    Sampling(top_p=1.0),
    Sampling(temperature=1.5, top_k=9, top_p=0.6),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_filters_equal_the_reference(rule: Sampling):
    logprob_BV = _random_logprobs()
    scaled_BC, id_BC = sampling.sorted_candidates(jnp.asarray(logprob_BV), rule)
    found = np.zeros(logprob_BV.shape)
    np.put_along_axis(found, np.asarray(id_BC), np.asarray(jax.nn.softmax(scaled_BC)), axis=-1)
    expected = np.stack([_reference(row, rule) for row in logprob_BV])
    np.testing.assert_array_equal(found > 0, expected > 0)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def _draws(logprob_V: np.ndarray, rule: Sampling, count: int) -> np.ndarray:
    key_B = jax.random.split(jax.random.key(3), count)
    logprob_BV = jnp.broadcast_to(jnp.asarray(logprob_V), (count, len(logprob_V)))
    return np.asarray(jax.jit(sampling.sample, static_argnums=2)(logprob_BV, key_B, rule))


@pytest.mark.parametrize("rule", [RULES[0], RULES[-1]], ids=str)
def test_frequencies_follow_the_distribution(rule: Sampling):
    logprob_V = _random_logprobs()[0]
    expected = _reference(logprob_V, rule)
    drawn = np.bincount(_draws(logprob_V, rule, 20_000), minlength=len(expected))
    assert drawn[expected == 0].sum() == 0
    common = expected * 20_000 > 5
    counts = np.append(drawn[common], drawn[~common].sum())
    shares = np.append(expected[common], expected[~common].sum())
    keep = shares > 0
    result = scipy.stats.chisquare(counts[keep], shares[keep] / shares.sum() * counts.sum())
    assert result.pvalue > 1e-3


def test_greedy_is_the_first_argmax_and_padding_is_never_drawn():
    logprob_BV = _random_logprobs()
    logprob_BV[0, [9, 20]] = logprob_BV[0].max() + 1
    keys = jax.random.split(jax.random.key(0), len(logprob_BV))
    greedy = sampling.sample(jnp.asarray(logprob_BV), keys, Sampling(method="greedy"))
    np.testing.assert_array_equal(greedy, logprob_BV.argmax(-1))
    broken = sampling.sample(jnp.full((1, 40), jnp.nan), keys[:1], Sampling(method="greedy"))
    assert broken.tolist() == [0]
    hot = _draws(logprob_BV[0], Sampling(temperature=1e6), 5000)
    assert hot.max() == 40 - 3 - 1


def test_seeds_reproduce_and_differ():
    logprob_BV = jnp.asarray(_random_logprobs())
    prompts = ["a", "b", "c", "d", "e"]

    def draw(seed: int) -> list[int]:
        keys = sampling.token_keys(sampling.prompt_keys(seed, prompts), jnp.arange(5))
        return sampling.sample(logprob_BV, keys, Sampling()).tolist()

    assert draw(1) == draw(1)
    assert len({tuple(draw(seed)) for seed in range(8)}) > 1


def test_a_prompts_key_does_not_depend_on_its_batch():
    alone = sampling.prompt_keys(0, ["b"])
    among = sampling.prompt_keys(0, ["a", "b", "c", "b"])
    data = jax.random.key_data
    np.testing.assert_array_equal(data(among[1]), data(alone[0]))
    assert len({tuple(row) for row in np.asarray(data(among)).tolist()}) == 4


TEXT = "naïve – 日本語 🙂 e\u0301 done"


def _byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<|endoftext|>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer


def _byte_fallback() -> Tokenizer:
    vocab = {"<unk>": 0} | {f"<0x{b:02X}>": b + 1 for b in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer


@pytest.mark.parametrize("make", [_byte_level, _byte_fallback])
def test_characters_arrive_whole(make):
    tokenizer = make()
    ids = tokenizer.encode(TEXT).ids
    assert len(ids) == len(TEXT.encode())
    text = stream.TextStream(tokenizer)
    parts = [text.push(token) for token in ids]
    assert "".join(parts) + text.close() == TEXT
    assert parts == [part for char in TEXT for part in [""] * (len(char.encode()) - 1) + [char]]


def test_broken_bytes_become_replacement_characters():
    tokenizer = _byte_level()
    ids = tokenizer.encode("é").ids[:1]
    text = stream.TextStream(tokenizer, skip=[0])
    assert text.push(0) == ""
    assert text.push(ids[0]) == ""
    assert text.close() == "\ufffd"
    other = stream.TextStream(tokenizer)
    assert other.push(ids[0]) + other.push(tokenizer.encode("x").ids[0]) == "\ufffdx"


def test_texts_are_shown_one_after_the_other():
    events = [(0, "a"), (1, "x"), (1, "y"), (0, "b"), (2, "q")]
    for finish in itertools.permutations(range(3)):
        out = io.StringIO()
        screen = stream.Screen(out, ["0:", "1:", "2:"])
        for index, text in events:
            screen.show(index, text)
        for index in finish:
            screen.finish(index)
        assert out.getvalue() == "0:ab\n\n1:xy\n\n2:q\n"


@pytest.mark.parametrize("temperature", [1e-40, 1e-300, 1e-9])
def test_a_tiny_temperature_is_greedy(temperature: float):
    logprob_BV = _random_logprobs() - 90  # Far from 0: division alone would overflow.
    for rule in (Sampling(temperature=temperature), Sampling("random", temperature, 7, 0.9)):
        keys = jax.random.split(jax.random.key(0), len(logprob_BV))
        drawn = sampling.sample(jnp.asarray(logprob_BV), keys, rule)
        np.testing.assert_array_equal(drawn, logprob_BV.argmax(-1))


def test_equals_share_a_tiny_temperature_and_a_tiny_top_p_keeps_one_of_them():
    logprob_V = np.log(np.float32([0.1, 0.3, 0.3, 0.2, 0.1]))
    drawn = np.bincount(_draws(logprob_V, Sampling(temperature=1e-40), 2000), minlength=5)
    assert drawn[[0, 3, 4]].sum() == 0 and 850 < drawn[1] < 1150
    only = _draws(logprob_V, Sampling(temperature=1e-40, top_p=1e-40), 200)
    np.testing.assert_array_equal(only, 1)


@pytest.mark.parametrize("temperature", [1e30, 1e40, 1e300])
def test_a_huge_temperature_is_uniform_and_draws_no_padding(temperature: float):
    drawn = _draws(_random_logprobs()[0], Sampling(temperature=temperature), 8000)
    counts = np.bincount(drawn, minlength=40)
    assert counts[37:].sum() == 0 and counts[:37].min() > 120


def test_a_row_without_any_probability_yields_a_token_of_the_vocabulary():
    """Such a row is not part of any prompt; the others of its batch are drawn as ever."""
    logprob_BV = np.array(_random_logprobs())
    logprob_BV[1] = -np.inf
    keys = jax.random.split(jax.random.key(0), len(logprob_BV))
    for rule in (Sampling(temperature=1e-40), Sampling(temperature=0.7, top_p=0.5)):
        drawn = np.asarray(sampling.sample(jnp.asarray(logprob_BV), keys, rule))
        assert ((drawn >= 0) & (drawn < 40)).all()
