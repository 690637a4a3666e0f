"""The tokenizer: deterministic, exact, and separators only where the writer puts them."""

import json
import random
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from mlpmem_jax.corpus import documents
from mlpmem_jax.corpus import tokenizer as tokenizer_module
from mlpmem_jax.corpus.documents import pieces_of
from mlpmem_jax.corpus.tokenizer import (
    TextTokenizer,
    _without_long_words,
    read_tokenizer,
    train_tokenizer,
)
from mlpmem_jax.errors import UserError

TEXTS = ["def read_file(path):\n    return open(path).read()\n", "naïve café 🙂\t\r\n", "a" * 50]
SEPARATOR = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return train_tokenizer(TEXTS * 3, 400, SEPARATOR)


def test_training_is_deterministic(tokenizer: TextTokenizer) -> None:
    assert train_tokenizer(iter(TEXTS * 3), 400, SEPARATOR).to_json() == tokenizer.to_json()
    assert tokenizer.separator_id == 0
    assert 257 < tokenizer.vocab_size <= 400
    assert tokenizer.padded_vocab == -(-tokenizer.vocab_size // 128) * 128


def test_long_runs_are_cut_for_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    ordinary = [*TEXTS, "x" * 255 + " " + "y" * 255, " " * 200 + "a,b;" * 400 + "\n" * 255] * 3
    cut = train_tokenizer(ordinary, 400, SEPARATOR).to_json()
    monkeypatch.setattr(tokenizer_module, "_without_long_words", iter)
    assert train_tokenizer(ordinary, 400, SEPARATOR).to_json() == cut
    monkeypatch.undo()
    texts = [f"a b{'c' * 700}, d  'll{'é' * 300}\n{' ' * 600}e", "=" * 512, "f"]
    parts = list(_without_long_words(texts))
    assert "".join(parts) == "".join(texts) and len(parts) == 3 + 2 + 1 + 2 + 1
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    lengths = [stop - start for one in parts for _, (start, stop) in words.pre_tokenize_str(one)]
    assert max(lengths) == 256


@pytest.mark.parametrize("kind", ["letters", "ruler", "spaces"])
def test_a_run_of_letters_costs_as_much_as_its_length(kind: str) -> None:
    """Not the square of it: 200,000 letters took half a minute, and four times as many minutes."""
    draw = random.Random(0)
    run = {"letters": "".join(draw.choices("ACGT", k=200_000)), "ruler": "=" * 200_000,
           "spaces": " " * 200_000}[kind]  # fmt: skip
    started = time.process_time()
    trained = train_tokenizer([run], 4096, SEPARATOR)
    training = time.process_time() - started
    started = time.process_time()
    (ids,) = trained.encode([run])
    assert trained.decode(ids) == run
    assert training < 8 and time.process_time() - started < 4


@pytest.mark.parametrize(
    "text",
    [*TEXTS, " \n \n", "ÿ\x01\u200b\U0001f9d1\u200d\U0001f680", "x" + SEPARATOR + "y", "e\u0301"],
)
def test_decoding_is_exact(tokenizer: TextTokenizer, text: str) -> None:
    (ids,) = tokenizer.encode([text])
    assert tokenizer.decode(ids) == text
    assert ids.dtype == np.uint32
    assert tokenizer.separator_id not in ids


def test_pieces_encode_like_the_whole(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "class A:\n    def b(self):\n\n        return 'x y'\n\n\nc = 1\n" * 20
    whole = tokenizer.encode([text])[0].tolist()
    monkeypatch.setattr(documents, "PIECE_CHARS", 100)
    pieces = [piece for _, piece in pieces_of([text], None)]
    assert len(pieces) > 5
    assert np.concatenate(tokenizer.encode(pieces)).tolist() == whole


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("def ", "def"),
        ("def  ", "def "),  # of "def  x" the first blank is a token of its own
        ("    ", "   "),
        ("def", "def"),
        ("", ""),
        (" def", " def"),
        ("def\n", "def\n"),
        ("def \n", "def \n"),
        ("x\t", "x\t"),
    ],
)
def test_a_prompt_leaves_out_the_space_of_the_next_token(
    tokenizer: TextTokenizer, prompt: str, expected: str
) -> None:
    """What is left is encoded as it is in whole text."""
    assert tokenizer.without_trailing_space(prompt) == expected
    ids = tokenizer.encode([expected])[0].tolist()
    if prompt != expected:
        in_text = tokenizer.encode([prompt + "return"])[0].tolist()
        assert in_text[: len(ids)] == ids


def test_a_space_that_no_token_begins_with_stays() -> None:
    rust = Tokenizer(models.WordLevel({SEPARATOR: 0, "def": 1, " ": 2, "?": 3}, unk_token="?"))
    rust.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    rust.add_special_tokens([SEPARATOR])
    tokenizer = TextTokenizer(rust.to_str().encode(), SEPARATOR)
    assert tokenizer.without_trailing_space("def ") == "def "


def given(tmp_path: Path, special: bool = True) -> Path:
    """A tokenizer with all that a downloaded one may bring along."""
    rust = Tokenizer(models.BPE(dropout=0.5))
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        special_tokens=["<s>"] if not special else ["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
        vocab_size=300,
    )
    rust.train_from_iterator(TEXTS, trainer)
    if not special:
        rust.add_tokens(["</s>"])
    rust.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    rust.enable_truncation(4)
    rust.enable_padding(length=64)
    path = tmp_path / "given.json"
    rust.save(str(path))
    return path


@pytest.mark.parametrize("special", [True, False])
def test_a_given_tokenizer_adds_cuts_and_drops_nothing(tmp_path: Path, special: bool) -> None:
    path = given(tmp_path, special)
    tokenizer = read_tokenizer(str(path), "</s>")
    text = "a</s>b<s> read file path and more"
    first, second = tokenizer.encode([text, text])
    assert tokenizer.separator_id not in first
    assert len(first) > 4
    assert tokenizer.rust.id_to_token(int(first[0])) != "<s>"
    assert first.tolist() == second.tolist()
    assert tokenizer.to_json() == path.read_bytes()
    assert tokenizer.vocab_size == max(tokenizer.rust.get_vocab().values()) + 1


def test_a_missing_separator_names_the_key_and_choices(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer.path=.*no token '<\|endoftext\|>'") as caught:
        read_tokenizer(str(given(tmp_path)), SEPARATOR)
    assert "tokenizer.separator" in str(caught.value)
    assert "<s>, </s>" in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"{}", b"[1]", json.dumps({"a": 1}).encode()]
)
def test_a_file_that_is_no_tokenizer(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match="is no tokenizer.json") as caught:
        read_tokenizer(str(path), SEPARATOR)
    assert len(caught.value.messages) == 1
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"tokenizer.path=.*gone.json: cannot be read"):
        read_tokenizer(str(tmp_path / "gone.json"), SEPARATOR)
