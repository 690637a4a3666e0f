"""Near-duplicates: what stays, whatever the order of files, and what a test document keeps out."""

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpmem_jax.config.data import CorpusConfig
from mlpmem_jax.corpus.near_duplicates import NUM_PERMUTATIONS, Sketches, _band_rows
from mlpmem_jax.corpus.sample import sample_texts
from mlpmem_jax.corpus.stream import Corpus, Piece, Position, nothing_seen
from mlpmem_jax.errors import UserError

WORDS = [f"word{number}" for number in range(400)]


def text_of(seed: int, length: int = 300) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=length))


def varied(text: str, changes: int, seed: int = 0) -> str:
    """Changes single words: each is in five shingles."""
    words = text.split()
    for number, place in enumerate(random.Random(seed).sample(range(len(words)), changes)):
        words[place] = f"other{seed}x{number}"
    return " ".join(words)


def similarity(one: str, other: str) -> float:
    found = []
    for words in (one.split(), other.split()):
        found.append({tuple(words[n : n + 5]) for n in range(len(words) - 4)})
    return len(found[0] & found[1]) / len(found[0] | found[1])


def corpus_of(folder: Path, **config: Any) -> Corpus:
    values = {"source": "text", "paths": [f"{folder}/*.txt"], "near_duplicates": 0.7, **config}
    corpus = Corpus(CorpusConfig(**values))
    corpus.find_near_duplicates(abs)
    return corpus


def by_split(corpus: Corpus) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {"train": set(), "valid": set(), "test": set()}
    for piece in corpus.pieces():
        found[piece.split].add(piece.text)
    return found


@pytest.fixture
def texts() -> list[str]:
    """120 texts, and three variants of each second one."""
    found = []
    for number in range(120):
        text = text_of(number)
        found.append(text)
        if number % 2:
            found += [varied(text, changes, seed) for changes, seed in ((1, 1), (3, 2), (90, 3))]
    return found


def write(folder: Path, texts: list[str], order: random.Random) -> Path:
    folder.mkdir()
    names = list(range(len(texts)))
    order.shuffle(names)
    for name, text in zip(names, texts, strict=True):
        (folder / f"{name:04}.txt").write_text(text)
    return folder


def test_no_two_documents_that_stay_are_alike(tmp_path: Path, texts: list[str]) -> None:
    fractions = {"valid_fraction": 0.25, "test_fraction": 0.25}
    corpus = corpus_of(write(tmp_path / "a", texts, random.Random(0)), **fractions)
    found = by_split(corpus)
    kept = set().union(*found.values())
    drawn = by_split(corpus_of(tmp_path / "a", near_duplicates=None, **fractions))
    for number in range(1, 120, 2):
        alike = [text_of(number)]
        alike += [varied(alike[0], changes, seed) for changes, seed in ((1, 1), (3, 2))]
        assert all(similarity(alike[0], one) > 0.85 for one in alike)
        assert sum(one in kept for one in alike) == 1
        # The document of the split that comes first: of a test text nothing is trained on.
        first = next(s for s in ("test", "valid", "train") if drawn[s] & set(alike))
        assert found[first] & set(alike)
    # What shares a few passages stays, and so does what has no like.
    assert all(varied(text_of(n), 90, 3) in kept for n in range(1, 120, 2))
    assert all(text_of(n) in kept for n in range(0, 120, 2))
    left_out = corpus.position.left_out
    names = [f"{split}_near_duplicate_documents" for split in found]
    assert sum(left_out[name] for name in names) == 120
    assert left_out["near_copied_documents"] > 30
    num_bytes = sum(len(text) for text in texts) - sum(len(text) for text in kept)
    assert sum(left_out[f"{split}_near_duplicate_bytes"] for split in found) == num_bytes
    assert left_out["train_near_duplicate_documents"] > left_out["test_near_duplicate_documents"]


def test_the_order_of_files_has_no_part_in_it(tmp_path: Path, texts: list[str]) -> None:
    first = corpus_of(write(tmp_path / "a", texts, random.Random(1)))
    other = corpus_of(write(tmp_path / "b", texts, random.Random(2)))
    assert by_split(first) == by_split(other)
    assert set(first.near_duplicates or ()) == set(other.near_duplicates or ())
    assert first.position.left_out == other.position.left_out


def test_a_variant_of_a_test_file_is_not_trained_on(tmp_path: Path) -> None:
    for split, seeds in {"train": range(20), "valid": range(20, 25), "test": range(25, 30)}.items():
        write(tmp_path / split, [text_of(seed) for seed in seeds], random.Random(0))
    for number, seed in enumerate((25, 26, 20)):
        (tmp_path / "train" / f"0-{number}.txt").write_text(varied(text_of(seed), 2))
    (tmp_path / "valid" / "zz.txt").write_text(varied(text_of(27), 2))
    (tmp_path / "test" / "zz.txt").write_text(varied(text_of(28), 2))
    paths = {
        split: {"paths": [f"{tmp_path}/{split}/*.txt"]} for split in ("train", "valid", "test")
    }
    corpus = corpus_of(tmp_path, paths=[], **paths)
    found = by_split(corpus)
    assert found["train"] == {text_of(seed) for seed in range(20)}
    assert found["valid"] == {text_of(seed) for seed in range(20, 25)}
    assert len(found["test"]) == 5 and {text_of(n) for n in (25, 26, 27, 29)} < found["test"]
    left_out = corpus.position.left_out
    assert left_out["train_near_duplicate_documents"] == 3
    assert left_out["valid_near_duplicate_documents"] == 1
    assert left_out["test_near_duplicate_documents"] == 1
    assert left_out["near_copied_documents"] == 4
    # Nor does the tokenizer learn from them.
    assert "other0x0" not in "".join(sample_texts(corpus, 10_000_000))


@pytest.mark.parametrize("max_bytes", [None, 90_000])
def test_every_position_continues_the_same_stream(
    tmp_path: Path, texts: list[str], max_bytes: int | None
) -> None:
    """Copies of what was left out before a kill are met after it."""
    folder = write(tmp_path / "a", texts[:60], random.Random(3))
    for number, text in enumerate(texts[:60]):
        (folder / f"z{number:02}.txt").write_text(text)
    corpus = corpus_of(folder, max_bytes=max_bytes)
    pieces = list(corpus.pieces())
    end = corpus.position
    if max_bytes is None:
        assert end.left_out["duplicate_documents"] == 60
        assert end.near_duplicates == 24
    else:
        # The limit falls on the same document as it does without the option.
        num_near = sum(
            end.left_out.get(f"{s}_near_duplicate_bytes", 0) for s in ("train", "valid", "test")
        )
        plain = corpus_of(folder, max_bytes=max_bytes, near_duplicates=None)
        taken = sum(piece.num_bytes for piece in plain.pieces())
        assert taken == sum(piece.num_bytes for piece in pieces) + num_near
        assert num_near > 0 and taken <= max_bytes
    for number in range(0, len(pieces), 5):
        seen = nothing_seen()
        for before in pieces[: number + 1]:
            seen[before.split].add(before.digest)
        resumed = Position(**pieces[number].position.to_json())
        assert list(corpus.pieces(resumed, seen)) == pieces[number + 1 :]
        assert corpus.position == end


def estimate(one: str, other: str) -> float:
    """Returns the similarity of two texts as signatures have it."""
    sketches = Sketches(0.5)
    for number, text in enumerate((one, other)):
        sketches.begin("train", number)
        for start in range(0, len(text), 100):  # In pieces cut between words.
            sketches.add(text[start : start + 100])
    sketches.end()
    signatures = [signature for *_, signature in sketches._documents]
    return float(np.mean(signatures[0] == signatures[1]))


def test_signatures_estimate_the_similarity_of_word_5_grams() -> None:
    errors = []
    for seed in range(40):
        text = " ".join(word[:9].ljust(9, "x") for word in text_of(seed, 500).split())
        other = varied(text, 5 * seed, seed)
        other = " ".join(word[:9].ljust(9, "y") for word in other.split())
        errors.append(estimate(text, other) - similarity(text, other))
    # Standard error of 128 permutations: at most 0.044.
    assert abs(np.mean(errors)) < 0.02 and np.std(errors) < 0.044
    assert estimate("One two, three four five six!", "one two three\nfour FIVE six") == 1.0
    assert estimate("two words", "two  words") == 1.0
    assert estimate("two words", "two others") < 0.1
    # Each character counts where words have no spaces between them.
    text = "".join(chr(0x4E00 + random.Random(0).randrange(2000)) for _ in range(300))
    assert estimate(text, text[:298]) > 0.9


def test_signatures_never_change() -> None:
    """Tokens made with another version of the package must stay the same tokens."""
    sketches = Sketches(0.8)
    sketches.begin("train", 0)
    sketches.add("The quick brown fox jumps over the lazy dog. " * 2)
    sketches.end()
    ((_, _, signature),) = sketches._documents
    assert signature.shape == (NUM_PERMUTATIONS,) and signature.dtype == np.uint32
    assert signature[:4].tolist() == [687763845, 1018909528, 1273762, 606986621]


def test_documents_without_words_are_no_near_duplicates() -> None:
    sketches = Sketches(0.5)
    for digest, text in enumerate(("--- !", "??", "...")):
        sketches.begin("train", digest)
        sketches.add(text)
    assert sketches.near_duplicates() == {}


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0])
def test_few_pairs_at_the_threshold_are_missed(threshold: float) -> None:
    rows = _band_rows(threshold)
    bands = NUM_PERMUTATIONS // rows
    assert bands >= 2 and (1 - threshold**rows) ** bands <= 0.01


def test_the_package_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasketch", None)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(
        UserError, match=r"near_duplicates=0\.7 needs the package datasketch.*dedup"
    ):
        corpus_of(tmp_path)
    pieces: list[Piece] = list(corpus_of(tmp_path, near_duplicates=None).pieces())
    assert len(pieces) == 1
