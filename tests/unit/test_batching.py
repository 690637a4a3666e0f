"""Texts that share slots: stop strings, limits, queues; what is written arrives whole."""

import functools
from collections.abc import Sequence

import pytest

from mlpmem_jax.generation.batching import Batcher, Completion, Piece, QueueFull
from mlpmem_jax.generation.engine import Engine
from mlpmem_jax.generation.sampling import Sampling
from mlpmem_jax.generation.slots import GREEDY, Rule, text_keys
from mlpmem_jax.generation.stream import TokenBytes
from mlpmem_jax.generation.text_output import TextOutput
from tests.unit.tiny_models import TEXT, tiny_language_model

SLOTS = 2
PROMPTS = ["def read(", "", "path", "return open(path)", "naïve", "日本"]


@functools.cache
def _engine() -> Engine:
    return Engine(tiny_language_model().interpolated, SLOTS)


class _Listener:
    """A completion, and what it was told."""

    def __init__(
        self, prompt: str, rule: Rule = GREEDY, tokens: int = 8, stops: Sequence[str] = ()
    ):
        tokenizer = tiny_language_model().tokenizer
        self.pieces: list[Piece] = []
        ids = [tokenizer.separator_id, *tokenizer.encode([prompt])[0].tolist()]
        output = TextOutput(tokenizer, stops)
        ends = frozenset([tokenizer.separator_id])
        self.completion = Completion(
            ids, rule, tokens, output, self.pieces.append, ends, scored=True, prompt_scored=True
        )

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def tokens(self) -> list[int]:
        return [piece.drawn.token for piece in self.pieces if piece.drawn]


def _all_written(batcher: Batcher, most: int = 1000) -> None:
    for _ in range(most):
        if not batcher.advance():
            return
    raise AssertionError("texts do not end")


def _alone(prompt: str, **about: object) -> _Listener:
    listener, batcher = _Listener(prompt, **about), Batcher(_engine())
    batcher.submit([listener.completion])
    _all_written(batcher)
    return listener


def _random(prompt: str) -> Rule:
    return Rule(Sampling(temperature=1.5), text_keys(3, [prompt])[0])


def test_more_texts_than_slots_are_written_as_if_alone():
    batcher = Batcher(_engine())
    listeners = [
        _Listener(prompt, _random(prompt) if place % 2 else GREEDY, tokens=3 + 5 * place)
        for place, prompt in enumerate(PROMPTS)
    ]
    for listener in listeners[:4]:
        batcher.submit([listener.completion])
    for _ in range(6):
        batcher.advance()
    assert batcher.num_active == SLOTS
    batcher.submit([listener.completion for listener in listeners[4:]])
    _all_written(batcher)
    assert (batcher.num_active, batcher.num_waiting) == (0, 0)
    for place, (prompt, listener) in enumerate(zip(PROMPTS, listeners, strict=True)):
        rule = _random(prompt) if place % 2 else GREEDY
        assert listener.pieces == _alone(prompt, rule=rule, tokens=3 + 5 * place).pieces, prompt
        assert listener.pieces[-1].finish in ("length", "stop")
        assert all(piece.finish is None for piece in listener.pieces[:-1])


def test_the_language_model_writes_the_same():
    model = tiny_language_model()
    expected = model.generate(PROMPTS, 20, sampling=Sampling("greedy"))
    assert [_alone(prompt, tokens=20).text for prompt in PROMPTS] == expected


def test_a_stop_string_ends_a_text_before_it():
    whole = _alone("def read(", tokens=24).text
    assert len(whole) > 8
    for size in (1, 2, 3):
        for start in range(2, len(whole) - size):
            stop = whole[start : start + size]
            found = _alone("def read(", tokens=24, stops=["never written", stop])
            assert found.text == whole[: whole.index(stop)]
            assert found.pieces[-1].finish == "stop"


def test_what_may_begin_a_stop_string_is_held_back_and_given_in_the_end():
    whole = _alone("def read(", tokens=12)
    stop = whole.text[-3:] + "\0"  # its beginning is written, the rest is not
    found = _alone("def read(", tokens=12, stops=[stop])
    assert found.text == whole.text
    assert found.pieces[-1].finish == "length"
    assert len(found.pieces[-1].text) >= 3


def test_characters_are_never_split():
    """The bytes of characters of two to four bytes, one token each."""
    tokenizer = tiny_language_model().tokenizer
    single = {TokenBytes(tokenizer.rust).of(token): token for token in range(tokenizer.vocab_size)}
    text = "é–🙂a"
    output, pieces = TextOutput(tokenizer, ["🙃"]), []
    for byte in text.encode():
        pieces.append(output.push(single[bytes([byte])]))
    assert "".join(pieces) + output.close() == text
    assert "\ufffd" not in "".join(pieces)
    assert [piece for piece in pieces if piece] == list(text)
    cut = TextOutput(tokenizer)
    cut.push(single["é".encode()[:1]])
    assert cut.close() == "\ufffd"


def test_tokens_as_text():
    tokenizer = tiny_language_model().tokenizer
    token_bytes = TokenBytes(tokenizer.rust)
    ids = tokenizer.encode([TEXT])[0].tolist()
    assert b"".join(map(token_bytes.of, ids)).decode() == TEXT
    assert token_bytes.text(tokenizer.separator_id) == "<|endoftext|>"
    assert token_bytes.of(10**6) == b""
    [first, *_] = tokenizer.encode(["é"])[0].tolist()
    assert token_bytes.text(first) == r"bytes:\xc3"


def test_a_prompt_is_scored_without_drawing():
    listener = _alone("def read(", tokens=0)
    [piece] = listener.pieces
    assert (piece.text, piece.drawn, piece.finish) == ("", None, "length")
    assert len(piece.prompt) == len(listener.completion.token_ids) - 1


def test_a_stop_token_gives_no_text():
    whole = _alone("path", tokens=8)
    token = whole.tokens[3]
    stopped = _Listener("path", tokens=8)
    stopped.completion.stop_token_ids |= {token}
    batcher = Batcher(_engine())
    batcher.submit([stopped.completion])
    _all_written(batcher)
    assert stopped.tokens == whole.tokens[: whole.tokens.index(token) + 1]
    assert whole.text.startswith(stopped.text)
    assert stopped.pieces[-1].finish == "stop"


def test_cancelled_texts_give_up_slots_and_places():
    batcher = Batcher(_engine(), max_queue=1)
    listeners = [_Listener(prompt, tokens=200) for prompt in PROMPTS[:3]]
    for listener in listeners:
        batcher.submit([listener.completion])
        batcher.advance()
    with pytest.raises(QueueFull):
        batcher.submit([_Listener("x").completion])
    batcher.cancel([listeners[0].completion, listeners[2].completion])
    assert batcher.num_waiting == 0
    told = len(listeners[0].pieces)
    last = _Listener("x", tokens=2)
    batcher.submit([last.completion])
    batcher.advance()
    batcher.advance()
    assert last.pieces[-1].finish == "length"
    assert len(listeners[0].pieces) == told
    assert listeners[2].pieces == []
    batcher.cancel([listeners[1].completion])
    _all_written(batcher)
    assert _engine().free_slots() == [0, 1]


def test_the_queue_takes_all_of_a_request_or_nothing():
    batcher = Batcher(_engine(), max_queue=1)
    with pytest.raises(QueueFull):
        batcher.submit([_Listener("x").completion for _ in range(SLOTS + 2)])
    assert batcher.num_waiting == 0
    batcher.submit([_Listener("x", tokens=1).completion for _ in range(SLOTS + 1)])
    _all_written(batcher)


def test_a_failure_is_told_to_everybody():
    batcher = Batcher(Engine(tiny_language_model().interpolated, SLOTS))
    listeners = [_Listener(prompt, tokens=50) for prompt in PROMPTS[:4]]
    batcher.submit([listener.completion for listener in listeners])
    batcher.advance()
    batcher.advance()
    batcher.fail()
    assert [listener.pieces[-1].finish for listener in listeners] == ["error"] * 4
    assert (batcher.num_active, batcher.num_waiting) == (0, 0)
