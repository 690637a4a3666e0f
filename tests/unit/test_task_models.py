"""Scoring and writing for tasks equal the model's own scores and texts, alone and in batches."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mlpmem_jax.errors import UserError
from mlpmem_jax.generation.language_model import LanguageModel
from mlpmem_jax.generation.sampling import Sampling
from mlpmem_jax.studies.tasks.models import text_model
from mlpmem_jax.studies.tasks.scoring import KnnMixture, Row, RowScorer, Score, rows_of
from mlpmem_jax.studies.tasks.text_model import TextModel
from tests.unit.tiny_models import LONG_CONTEXT, SITE, TEXT, tiny_language_model

PAIRS = [
    ("def read", "(path):\n"), ("", "return open"), ("x", " = 1"), ("def read", "(path):\n"),
    ("日本語", " 🙂 naïve"), ("a b c d e f g h i j", " k"), ("return", ""),
]  # fmt: skip
NEIGHBORS, WEIGHT = 3, 0.3


@functools.cache
def _model(with_memory: bool = True, batch_size: int = 4) -> TextModel:
    return text_model(tiny_language_model(with_memory), batch_size, seed=0)


def _search(key_QD: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Neighbours that follow from the key: their labels, and shares that sum to λ."""
    label_QK = np.abs(key_QD[:, :NEIGHBORS] * 1000).astype(np.int32) % 200
    share_QK = np.abs(key_QD[:, :NEIGHBORS]) + 0.1
    return WEIGHT * share_QK / share_QK.sum(axis=1, keepdims=True), label_QK


@functools.cache
def _knn_model(batch_size: int = 4) -> TextModel:
    knn = KnnMixture(_search, SITE, WEIGHT)
    return text_model(tiny_language_model(False), batch_size, seed=0, knn=knn)


def _pairs(model: TextModel) -> list[tuple[list[int], list[int]]]:
    return [(model.encode(context), model.encode(rest)) for context, rest in PAIRS]


@pytest.mark.parametrize("with_memory", [True, False])
def test_scores_are_those_of_the_language_model(with_memory: bool):
    model, language_model = _model(with_memory), tiny_language_model(with_memory)
    found = model.score(_pairs(model))
    for (context, rest), score in zip(PAIRS, found, strict=True):
        whole = language_model.score(context + rest)
        num_scored = len(model.encode(rest))
        joined = len(model.encode(context)) + num_scored
        assert len(whole.token_T) == joined, "the texts must not merge where they meet"
        expected = whole.logprob_T[joined - num_scored :].sum(dtype=np.float64)
        np.testing.assert_allclose(score.logprob, expected, atol=2e-5)
    assert found[0] == found[3]
    assert found[-1] == Score(0.0, True)


@pytest.mark.parametrize("make", [_model, _knn_model])
def test_a_batch_gives_the_bits_of_single_rows(make: Any):
    model = make()
    pairs = _pairs(model)
    together = model.score(pairs)
    assert [model.score([pair])[0] for pair in pairs] == together
    assert model.score(pairs[::-1]) == together[::-1]


def test_greedy_texts_are_told_from_others():
    model = _model()
    [text] = model.write([("def read", {"until": [], "max_gen_toks": 6, "ignore_eos": True})])
    rest = model.encode(text)
    context = model.encode("def read")
    written, other = model.score([(context, rest[:3]), (context, [(rest[0] + 1) % 200])])
    assert written.is_greedy
    assert not other.is_greedy


def test_long_texts_are_cut_from_the_left():
    model, language_model = _model(), tiny_language_model()
    tokens = (model.encode(TEXT) * 4)[: LONG_CONTEXT + 9]
    rest = tokens[-5:]
    networks = language_model.interpolated
    window = jnp.asarray(tokens[-(LONG_CONTEXT + 1) :])[None]
    with jax.set_mesh(networks.mesh):
        logprob_1L = networks.score(networks.parameters, window[:, :-1], window[:, 1:])
    expected = float(np.asarray(logprob_1L)[0, -5:].sum(dtype=np.float64))
    [found] = model.score([(tokens[:-5], rest)])
    assert found.logprob == pytest.approx(expected, abs=2e-5)


def test_rows_of_a_continuation_longer_than_the_context():
    stream = list(range(100, 141))
    rows = rows_of(stream, num_scored=30, context=8)
    assert all(len(row.tokens) <= 9 for row in rows)
    assert [token for row in rows for token in row.tokens[-row.num_scored :]] == stream[-30:]
    assert rows_of(stream, 8, 8) == [Row(tuple(stream[-9:]), 8)]
    assert rows_of([1, 2, 3], 2, 8) == [Row((1, 2, 3), 2)]


@functools.cache
def _decoder_step() -> Any:
    """Returns (parameters, tokens [1, L], length [1]) → log p of the next token, and the key."""
    networks = tiny_language_model(False).interpolated

    def step(parameters: Any, token_1L: jax.Array, length_1: jax.Array) -> Any:
        cache = networks.empty_cache(1)
        prediction, states, _ = networks.predict(parameters, cache, token_1L, length_1, (SITE,))
        return prediction.mixture()[0], states[SITE]

    return jax.jit(step)


def _dense_mixture(tokens: list[int]) -> np.ndarray:
    """log p of the next token by the definition, with the whole distribution."""
    networks = tiny_language_model(False).interpolated
    token_1L = np.zeros((1, LONG_CONTEXT), np.int32)
    token_1L[0, : len(tokens)] = tokens
    with jax.set_mesh(networks.mesh):
        found = _decoder_step()(networks.parameters, token_1L, np.array([len(tokens)]))
    logprob_V, key_1D = map(np.asarray, found)
    share_1K, label_1K = _search(key_1D)
    prob_V = (1 - WEIGHT) * np.exp(logprob_V[: networks.vocab_size].astype(np.float64))
    for share, label in zip(share_1K[0], label_1K[0], strict=True):
        prob_V[label] += share
    return np.log(prob_V)


def test_the_knn_lm_scores_by_its_definition():
    model = _knn_model()
    separator = model.tokenizer.separator_id
    context, rest = model.encode("def read"), model.encode("(path")
    [found] = model.score([(context, rest)])
    tokens, expected, greedy = [separator, *context], 0.0, True
    for token in rest:
        logprob_V = _dense_mixture(tokens)
        expected += logprob_V[token]
        greedy &= int(logprob_V.argmax()) == token
        tokens.append(token)
    assert found.logprob == pytest.approx(expected, abs=1e-4)
    assert found.is_greedy == greedy


def test_the_knn_lm_writes_what_it_scores_as_greedy():
    """Alone and in a batch, also beyond the context, where rows start again."""
    how = {"until": [], "max_gen_toks": 12, "ignore_eos": True}
    prompts = [("def read", how), ("x", how), ("return open(path", how), ("", how), ("b", how)]
    together = _knn_model(4).write(prompts)
    assert [_knn_model(4).write([prompt])[0] for prompt in prompts] == together
    model = _knn_model()
    tokens = [model.tokenizer.separator_id, *model.encode("def read")]
    drawn = []
    for _ in range(12):
        drawn.append(int(_dense_mixture(tokens).argmax()))
        tokens.append(drawn[-1])
    kept = [token for token in drawn if token != model.tokenizer.separator_id]
    assert together[0].encode() == model.tokenizer.decode(kept).encode()
    long = how | {"max_gen_toks": 2 * LONG_CONTEXT}
    first, second = _knn_model().write([("def read", long), ("def", how)])
    assert len(model.encode(first)) > LONG_CONTEXT
    assert second == model.write([("def", how)])[0]


def test_a_stop_string_ends_a_text_of_the_knn_lm():
    how = {"until": [], "max_gen_toks": 12, "ignore_eos": True}
    [whole] = _knn_model().write([("def read", how)])
    stop = whole[2:4]
    [cut] = _knn_model().write([("def read", how | {"until": stop})])
    assert cut == whole[: whole.index(stop)]


@pytest.mark.parametrize("with_memory", [True, False])
def test_texts_are_those_of_the_language_model(with_memory: bool):
    language_model: LanguageModel = tiny_language_model(with_memory)
    prompts = ["def read(", "path", "x = ", "日本"]
    expected = language_model.generate(prompts, 9, sampling=Sampling("greedy"))
    model = _model(with_memory)
    assert model.write([(prompt, {"max_gen_toks": 9}) for prompt in prompts]) == expected
    stop = expected[0][3:5]
    [cut] = model.write([(prompts[0], {"max_gen_toks": 9, "until": [stop, "never"]})])
    assert cut == expected[0][: expected[0].index(stop)]


def test_random_texts_follow_from_seed_and_prompt():
    how = {"max_gen_toks": 8, "do_sample": True, "temperature": 1.5, "top_k": 50}
    model = _model()
    [alone] = model.write([("def", how)])
    assert model.write([("x", how), ("def", how)])[1] == alone
    other = text_model(tiny_language_model(), 4, seed=1)
    assert other.write([("def", how)])[0] != alone


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"num_beams": 4}, "num_beams=4 is not supported"),
        ({"no_such": "x"}, "no_such='x' is not supported"),
    ],
)
def test_unsupported_generation_is_refused(how: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        _model().write([("x", how)])
    assert _model().write([("x", {"num_beams": 1, "max_gen_toks": 1, "use_cache": True})])


def test_the_knn_lm_refuses_random_texts():
    with pytest.raises(UserError, match="knn writes greedily"):
        _knn_model().write([("x", {"do_sample": True})])


def test_scores_are_log_probabilities():
    """Of all one-token continuations they sum to 1, with memory and with the kNN-LM."""
    for model in (_model(), _knn_model()):
        every = range(model.tokenizer.vocab_size)
        found = model.score([(model.encode("def"), [token]) for token in every])
        assert math.fsum(math.exp(one.logprob) for one in found) == pytest.approx(1, abs=1e-4)
        assert sum(one.is_greedy for one in found) == 1


def test_rows_are_read_once():
    calls: list[int] = []

    class Counting(RowScorer):
        def _batch_scores(self, rows: Any) -> list[Score]:
            calls.append(len(rows))
            return super()._batch_scores(rows)

    scorer = Counting(tiny_language_model().interpolated, 4)
    row, other = Row((1, 2, 3), 1), Row((1, 2, 4), 1)
    found = scorer.score([row, other, row, row])
    assert calls == [2]
    assert found[0] == found[2] == found[3] != found[1]
