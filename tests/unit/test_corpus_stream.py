"""The stream of pieces: splits, weights, limits, and continuing from any piece."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpmem_jax.config.data import CorpusConfig
from mlpmem_jax.corpus import documents, duplicates
from mlpmem_jax.corpus.duplicates import SeenDocuments
from mlpmem_jax.corpus.sample import sample_texts
from mlpmem_jax.corpus.splits import split_of
from mlpmem_jax.corpus.stream import Corpus, Position, nothing_seen
from mlpmem_jax.errors import UserError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(300):
        (tmp_path / f"{number:03}.txt").write_text(f"document {number % 200}\n" * 5)
    return tmp_path


def corpus(folder: Path, **config: Any) -> Corpus:
    config = {"source": "text", "paths": [f"{folder}/*.txt"], **config}
    return Corpus(CorpusConfig(**config))


def test_duplicates_share_a_split(folder: Path) -> None:
    splits: dict[str, set[str]] = {}
    counts = dict.fromkeys(("train", "valid", "test"), 0)
    for piece in corpus(folder, valid_fraction=0.1, test_fraction=0.2).pieces():
        splits.setdefault(piece.text, set()).add(piece.split)
        counts[piece.split] += 1
    assert all(len(found) == 1 for found in splits.values())
    assert sum(counts.values()) == 200  # Of 300, read once each.
    assert 5 < counts["valid"] < 40 < 2 * counts["test"] < 130


def test_equal_documents_are_read_once(folder: Path) -> None:
    once = list(corpus(folder, paths=[f"{folder}/0*.txt"]).pieces())
    assert len(once) == 100
    # The same 100 texts again under 200 other names, and as records.
    again = folder / "again"
    again.mkdir()
    for number in range(200):
        (again / f"{number}.txt").write_bytes((folder / f"{number % 100:03}.txt").read_bytes())
    records = [json.dumps({"text": piece.text}) for piece in once]
    (folder / "x.jsonl").write_text("\n".join(records))
    more = [
        {"source": "text", "paths": [f"{again}/*.txt"]},
        {"source": "jsonl", "paths": [f"{folder}/x.jsonl"]},
    ]
    text = corpus(folder, paths=[f"{folder}/0*.txt"], more=more)
    twice = list(text.pieces())
    assert [piece.text for piece in twice] == [piece.text for piece in once]
    assert [piece.split for piece in twice] == [piece.split for piece in once]
    num_bytes = sum(piece.num_bytes for piece in once)
    left_out = {"duplicate_documents": 300, "duplicate_bytes": 3 * num_bytes}
    assert text.position.left_out == left_out
    # What is left out is not counted by max_bytes.
    limited = corpus(folder, paths=[f"{folder}/0*.txt"], more=more, max_bytes=num_bytes)
    assert len(list(limited.pieces())) == 100 and limited.position.left_out == left_out
    assert [piece.text for piece in corpus(folder).pieces()][:100] == [one.text for one in once]


@pytest.mark.parametrize("recent", [1, 7, 1 << 20])
def test_a_set_of_digests(monkeypatch: pytest.MonkeyPatch, recent: int) -> None:
    monkeypatch.setattr(duplicates, "_MOST_RECENT", recent)
    draw = random.Random(0)
    numbers = [draw.getrandbits(64) for _ in range(60)] + [0, 2**64 - 1]
    seen = SeenDocuments(np.asarray(numbers[:20], np.uint64))
    for number in numbers[20:]:
        assert number not in seen
        seen.add(number)
    assert all(number in seen for number in numbers)
    assert not any(number ^ 1 in seen for number in numbers)


def test_a_copy_of_a_test_file_is_not_trained_on(folder: Path) -> None:
    """Test comes before validation, and validation before training, whatever the order of keys."""
    for number in range(300):
        (folder / f"{number:03}.txt").write_text(f"document {number}\n" * 5)
    for name, number in {"test-copy": 205, "valid-copy": 105, "train-copy": 5}.items():
        data = (folder / f"{number:03}.txt").read_bytes()
        (folder / f"0-{name}.txt").write_bytes(data)
        (folder / f"1-{name}.txt").write_bytes(data)
    (folder / "x.jsonl").write_text(
        '{"text": "new"}\n' + json.dumps({"text": "document 250\n" * 5})
    )
    text = corpus(
        folder,
        paths=[],
        train={"paths": [f"{folder}/0*.txt"]},
        valid={"paths": [f"{folder}/1*.txt"]},
        test={"paths": [f"{folder}/2*.txt"]},
        more=[{"source": "jsonl", "paths": [f"{folder}/x.jsonl"]}],
    )
    found: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for piece in text.pieces():
        found[piece.split].append(piece.text.split()[1] if piece.text != "new" else "new")
    assert found["test"] == [str(number) for number in range(200, 300)]
    # Its copy of a training file is validation's: that file is not trained on.
    assert sorted(found["valid"]) == sorted(["5", *(str(number) for number in range(100, 200))])
    assert found["train"] == [*(str(number) for number in range(100) if number != 5), "new"]
    assert text.position.left_out["copied_documents"] == 6
    assert text.position.left_out["duplicate_documents"] == 7
    # Nor does the tokenizer learn from them.
    sampled = "".join(sample_texts(text, 10_000_000))
    assert "document 205" not in sampled and "document 105" not in sampled
    assert "document 250" not in sampled and sampled.endswith("new")


def test_a_pattern_that_matches_nothing_is_said(folder: Path) -> None:
    (folder / "x.jsonl").write_text('{"text": "# a\\nb\\n# c"}\n')
    (folder / "0").mkdir()
    (folder / "0" / "crlf.txt").write_bytes(b"one\r\n---\r\ntwo\r\n---\r\n" * 40)
    more = [{"source": "jsonl", "paths": [f"{folder}/x.jsonl"]}]
    text = corpus(folder, paths=[f"{folder}/2*.txt"], more=more, document_regex="# ")
    assert len(list(text.pieces())) == 102
    assert text.notes() == [
        "corpus.document_regex='# ' matches no line of corpus (100 files): documents are whole "
        "files or records"
    ]
    # What max_bytes leaves unread may match.
    (folder / "first.md").write_text("# a\n# b\n")
    more = [{"source": "text", "paths": [f"{folder}/2*.txt"]}]
    text = corpus(folder, paths=[f"{folder}/first.md"], document_regex="# ", max_bytes=8, more=more)
    assert len(list(text.pieces())) == 2 and text.notes() == []
    text = corpus(folder, paths=[f"{folder}/0/*.txt"], document_regex="^---$")
    assert sum(piece.begins for piece in text.pieces()) == 4  # Of 81, of which most are equal.
    assert text.position.left_out["duplicate_documents"] == 77
    assert text.notes() == []


def test_splits_are_permanent() -> None:
    # Splits of published runs must not change with the software.
    drawn = "".join(split_of(b"%d" % n, 0.2, 0.3)[1] for n in range(24))
    assert drawn == "aaerraerrrerrerraeaaaaar"


def test_explicit_splits(folder: Path) -> None:
    for number in range(300):
        (folder / f"{number:03}.txt").write_text(f"document {number}\n")
    for number in range(10):
        (folder / f"more{number}.txt").write_text(f"one more: {number}\n")
    given = {"train": ["0*"], "valid": ["1*"], "test": ["2*"]}
    found = corpus(
        folder,
        paths=[],
        **{
            split: {"paths": [f"{folder}/{p}.txt" for p in paths]} for split, paths in given.items()
        },
        more=[{"source": "text", "paths": [f"{folder}/more*.txt"]}],
    )
    splits = [piece.split for piece in found.pieces()]
    assert splits == ["test"] * 100 + ["valid"] * 100 + ["train"] * 110


def test_weight_keeps_a_share_by_content(folder: Path) -> None:
    kept = [piece.text for piece in corpus(folder, weight=0.3).pieces()]
    assert 50 < len(kept) < 130
    assert kept == [piece.text for piece in corpus(folder, weight=0.3).pieces()]
    more = corpus(
        folder, weight=0.3, more=[{"source": "text", "paths": [f"{folder}/0*.txt"]}]
    ).pieces()
    assert [piece.text for piece in more][: len(kept)] == kept


def test_max_bytes_stops_before_the_document_that_passes_it(folder: Path) -> None:
    sizes = [piece.num_bytes for piece in corpus(folder).pieces()]
    for limit in (sizes[0], sum(sizes[:7]), sum(sizes[:7]) + sizes[7] - 1):
        taken = [piece.num_bytes for piece in corpus(folder, max_bytes=limit).pieces()]
        assert taken == sizes[: 1 if limit == sizes[0] else 7]
    assert not list(corpus(folder, max_bytes=sizes[0] - 1).pieces())


def test_max_bytes_never_cuts_a_document_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "PIECE_CHARS", 10)
    (tmp_path / "a.txt").write_text("# a\n" + "word\n" * 10 + "# b\n" + "word\n" * 10)
    for limit, begun in ((53, 0), (54, 1), (107, 1), (108, 2)):
        found = list(corpus(tmp_path, document_regex="# ", max_bytes=limit).pieces())
        assert sum(piece.begins for piece in found) == begun
        assert sum(piece.num_bytes for piece in found) == 54 * begun


@pytest.mark.parametrize("max_bytes", [None, 700])
def test_every_position_continues_the_same_stream(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_bytes: int | None
) -> None:
    monkeypatch.setattr(documents, "PIECE_CHARS", 10)
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(f"# a{number}\nlonger than ten\n# b\nc\n" * 3)
        long = f"# long {number % 4}\n" + "some words of many pieces " * 12 + f"\n# {number}\nend\n"
        (tmp_path / f"{number}b.txt").write_text(long)
        (tmp_path / f"{number}a.txt").write_bytes(b"\xff")
    records = '{"text": "one and two"}\n\n{"text": "three"}\nno record\n{"text": "# b\\nc\\n"}\n'
    (tmp_path / "x.jsonl").write_text(records * 2)
    text = corpus(
        tmp_path,
        document_regex="# ",
        on_error="skip",
        weight=0.7,
        max_bytes=max_bytes,
        more=[{"source": "jsonl", "paths": [f"{tmp_path}/x.jsonl"]}],
    )
    pieces = list(text.pieces())
    end = text.position
    left_out = {name: count for name, count in end.left_out.items() if "bytes" not in name}
    if max_bytes is None:
        assert left_out["skipped_files"] == 6 and left_out["skipped_records"] == 2
        assert left_out["duplicate_documents"] > 20
        assert len(end.cut) == 2
    for number, piece in enumerate(pieces):
        resumed = Position(**piece.position.to_json())
        seen = nothing_seen()
        for before in pieces[: number + 1]:
            if before.begins:
                seen[before.split].add(before.digest)
        assert list(text.pieces(resumed, seen)) == pieces[number + 1 :]
        assert text.position == end
    assert list(text.pieces(end)) == []  # Nothing follows.
    assert text.position == end


def test_a_file_that_is_no_text_stops_or_is_left_out(folder: Path) -> None:
    (folder / "000a.txt").write_bytes(b"ok \xfe")
    with pytest.raises(UserError, match=r"000a.txt: not UTF-8 text at byte 3"):
        list(corpus(folder).pieces())
    text = corpus(folder, on_error="skip")
    assert len(list(text.pieces())) == 200
    assert text.position.left_out["skipped_files"] == 1
    assert text.first_skipped and "000a.txt: not UTF-8 text at byte 3" in text.first_skipped


def test_the_sample_is_bounded_and_of_the_training_split(folder: Path) -> None:
    (folder / "big").mkdir()
    (folder / "big" / "z.txt").write_text("zzz é\n" * 10_000)
    text = corpus(folder, more=[{"source": "text", "paths": [f"{folder}/big/z.txt"]}])
    found = list(sample_texts(text, 3001))
    assert sum(len(one.encode()) for one in found) in (3000, 3001, 3002)
    train = [piece.text for piece in text.pieces() if piece.split == "train"]
    assert all(any(whole.startswith(one) for whole in train) for one in found)
    everything = list(sample_texts(text, 10_000_000))
    assert everything == train
    limited = corpus(folder, max_bytes=5000)
    few = [piece.text for piece in limited.pieces() if piece.split == "train"]
    assert list(sample_texts(limited, 10_000_000)) == few
