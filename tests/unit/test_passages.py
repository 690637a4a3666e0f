"""RAG: which passages are found, and how many are set before a prompt."""

from types import SimpleNamespace

import numpy as np
import pytest

from mlpmem_jax.errors import UserError
from mlpmem_jax.studies.tasks.models import text_model
from mlpmem_jax.studies.tasks.passages import Passages
from tests.unit.tiny_models import tiny_language_model

pytest.importorskip("bm25s", reason="bm25s is not installed (requirements-tasks.txt)")
DOCUMENTS = ["the blue whale swims", "a red fox, a red fox", "whales eat krill", "!!!"]


class _Split:
    """A split of some documents, as `TokenSplit` has it."""

    def __init__(self, documents: list[str]):
        tokenizer = tiny_language_model().tokenizer
        parts = [[tokenizer.separator_id, *ids.tolist()] for ids in tokenizer.encode(documents)]
        self._token_T = np.concatenate(parts).astype(np.int32)
        self.document_offset = np.cumsum([0, *map(len, parts)])
        self.num_documents = len(documents)
        self.artifact = SimpleNamespace(path="tokens")

    def read(self, start: int, stop: int) -> np.ndarray:
        return self._token_T[start:stop]


def _passages(num_tokens: int = 100, num_found: int = 2, documents: list[str] = DOCUMENTS):
    tokenizer = tiny_language_model().tokenizer
    split = _Split(documents)
    return Passages.of(split, tokenizer, num_tokens, num_found), tokenizer  # type: ignore[arg-type]


def test_documents_are_cut_and_those_without_words_left_out():
    whole, tokenizer = _passages()
    assert list(whole.texts) == DOCUMENTS[:3]
    cut, _ = _passages(num_tokens=5)
    assert "".join(cut.texts).replace(" ", "") == "".join(DOCUMENTS[:3]).replace(" ", "")
    assert all(len(tokenizer.encode([text])[0]) <= 5 for text in cut.texts)
    with pytest.raises(UserError, match="no words"):
        _passages(documents=["!!", "--"])


def test_the_best_passages_are_found():
    passages, _ = _passages()
    assert passages.find("Where is the RED fox?")[0] == DOCUMENTS[1]
    assert passages.find("blue whale") == [DOCUMENTS[0]]
    assert passages.find("nothing known") == []
    assert passages.find("?!") == []


def test_passages_stand_before_the_prompt_as_far_as_they_fit():
    passages, tokenizer = _passages()
    context = "Q: What do whales eat?\nA: krill\n\nQ: the red fox swims\nA:"
    before = passages.before(context, tokenizer, room=200)
    # The query is the last question; the best passage is next to the prompt.
    assert before == f"{DOCUMENTS[0]}\n\n{DOCUMENTS[1]}\n\n"
    size = len(tokenizer.encode([f"{DOCUMENTS[1]}\n\n"])[0])
    assert passages.before(context, tokenizer, room=size) == f"{DOCUMENTS[1]}\n\n"
    assert passages.before(context, tokenizer, room=size - 1) == ""


def test_continuations_of_a_prompt_see_the_same_passages():
    passages, _ = _passages()
    model = text_model(tiny_language_model(False), 4, seed=0, passages=passages)
    pairs = [("red fox", " a"), ("red fox", " a much longer continuation"), ("", "x")]
    (first, _), (second, _), (empty, _) = model.extended_pairs(pairs)
    assert first == second
    assert first.endswith("red fox")
    assert empty == ""
    room = model.context_tokens - 1
    assert len(model.encode(second)) + len(model.encode(pairs[1][1])) <= room
