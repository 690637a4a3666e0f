"""tokenize started again: the same text, moved, copied or changed text, after a failure."""

import os
import shutil
from pathlib import Path

import pytest

from mlpmem_jax.corpus import digests, writer
from mlpmem_jax.store.run_record import RunRecord
from tests.pipeline.tokenizing import (
    contents,
    failing_at,
    files_of,
    make,
    settings,
)

pytestmark = pytest.mark.usefixtures("small_shards")


def test_a_second_start_does_nothing_and_changed_text_makes_others_beside(
    text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = make(settings(text))
    before = contents(text / "run")
    capsys.readouterr()
    make(settings(text))
    assert capsys.readouterr().out.count("complete") == 2
    assert contents(text / "run") == before
    within = make(settings(text, corpus={"attention": "within"}))
    assert within.tokens.relative == first.tokens.relative
    assert contents(text / "run") == before
    old = [files_of(one) for one in (first.tokenizer, first.tokens)]
    changed = text / "text" / "07.txt"
    data = changed.read_bytes()
    changed.write_text("other text")
    other = make(settings(text))
    for name in ("tokenizer", "tokens"):
        one, two = getattr(first, name), getattr(other, name)
        assert one.relative != two.relative
        assert one.load().fingerprint != two.load().fingerprint
    assert [files_of(one) for one in (first.tokenizer, first.tokens)] == old
    # The old text again: what was made of it is there, and used.
    changed.write_bytes(data)
    capsys.readouterr()
    assert make(settings(text)).tokens.relative == first.tokens.relative
    assert capsys.readouterr().out.count("complete") == 2


def test_text_that_was_moved_is_the_same_text(
    text: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make(settings(text))
    for path in (text / "text").iterdir():
        os.utime(path, ns=(10**18, 10**18))
    before = contents(text / "run")
    (text / "text").rename(text / "moved")
    monkeypatch.chdir(text)
    capsys.readouterr()
    for paths in (["moved/*.txt"], [f"{text}/moved/*"], ["moved/[0-2]*.txt", "moved/[3-5]*"]):
        make(settings(text, corpus={"paths": paths}))
        assert capsys.readouterr().out.count("complete") == 2
    assert contents(text / "run") == before
    # What is remembered is read no more, and a changed byte in the middle is noticed all the same.
    changed = text / "moved" / "07.txt"
    data = changed.read_bytes()
    monkeypatch.setattr(digests, "_END_BYTES", 4)
    changed.write_bytes(data[:9] + bytes([data[9] ^ 1]) + data[10:])
    other = make(settings(text, corpus={"paths": ["moved/*.txt"]}))
    digests_of = [run.tokens.load().recipe["listing"]["digest"] for run in (first, other)]
    assert digests_of[0] != digests_of[1]
    changed.write_bytes(data)
    same = make(settings(text, corpus={"paths": ["moved/*.txt"]}))
    assert same.tokens.relative == first.tokens.relative != other.tokens.relative


def test_the_same_files_twice_give_the_same_tokens_as_once(
    text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once = make(settings(text))
    (text / "twice").mkdir()
    for path in (text / "text").iterdir():
        shutil.copy(path, text / "twice" / path.name)
        (text / "twice" / f"{path.stem}-again.txt").write_bytes(path.read_bytes())
    capsys.readouterr()
    twice = make(settings(text, "other", corpus={"paths": [f"{text}/twice/*.txt"]}))
    one, other = (contents(text / name) for name in ("run", "other"))
    assert one == other
    counts = twice.tokens.load().counts
    num_bytes = sum(path.stat().st_size for path in (text / "text").iterdir())
    assert (counts["duplicate_documents"], counts["duplicate_bytes"]) == (60, num_bytes)
    assert f"duplicate documents left out: 60 ({num_bytes:,} bytes)" in capsys.readouterr().out
    assert once.tokens.load().counts["duplicate_documents"] == 0


def test_what_a_start_after_a_kill_knows_of_the_documents_before(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies of the first files come last: whether they are duplicates is known from the disk."""
    for number in range(0, 60, 2):
        data = (text / "text" / f"{number:02}.txt").read_bytes()
        (text / "text" / f"z{number}.txt").write_bytes(data)
    make(settings(text, "straight"))
    expected = contents(text / "straight")
    for failing in (2, 6, 12):
        with monkeypatch.context() as patch:
            patch.setattr(writer.TokenWriter, "save", failing_at(failing))
            with pytest.raises(OSError, match="No space"):
                make(settings(text, f"failing{failing}"))
        layout = make(settings(text, f"failing{failing}"))
        assert contents(text / f"failing{failing}") == expected
        assert layout.tokens.load().counts["duplicate_documents"] == 30


def test_text_that_changes_before_a_start_is_continued_makes_tokens_of_its_own(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Of a tokenizer that is given, so that the tokens alone depend on the text.
    path = text / "given.json"
    shutil.copy(make(settings(text)).tokenizer.path / "tokenizer.json", path)
    values = settings(text, "broken", tokenizer={"path": str(path)})
    with monkeypatch.context() as patch:
        patch.setattr(writer.TokenWriter, "save", failing_at(5))
        with pytest.raises(OSError, match="No space"):
            make(values)
    begun = text / "broken" / "artifacts" / RunRecord.read(text / "broken").roles["tokens"]
    left = {str(one): one.read_bytes() for one in begun.rglob("*") if one.is_file()}
    assert begun / "progress.npz" in begun.iterdir() and begun / "building.json" in begun.iterdir()
    changed = text / "text" / "50.txt"
    data = changed.read_bytes()
    changed.write_bytes(data.upper())
    capsys.readouterr()
    other = make(values)
    assert "continuing" not in capsys.readouterr().out
    assert str(other.tokens.path) != str(begun)
    assert {str(one): one.read_bytes() for one in begun.rglob("*") if one.is_file()} == left
    changed.write_bytes(data)
    assert str(make(values).tokens.path) == str(begun)
    assert "continuing" in capsys.readouterr().out
    found = contents(text / "broken").items()
    assert {name: each for name, each in found if not name.startswith("artifacts/")} == contents(
        text / "run"
    )
