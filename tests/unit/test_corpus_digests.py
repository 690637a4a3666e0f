"""Text is identified by what files hold; what is remembered of it saves reading, no more."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from mlpmem_jax.config.data import CorpusConfig
from mlpmem_jax.corpus import digests as digests_module
from mlpmem_jax.corpus.digests import FILE, Digests
from mlpmem_jax.corpus.sources import find_parts


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name, text in {"a": "a" * 20_000, "b": "b" * 30_000, "c": "c"}.items():
        write(tmp_path / "d" / f"{name}.txt", text)
    return tmp_path


def write(path: Path, text: str) -> None:
    """Writes a file that was changed a while ago."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    os.utime(path, ns=(10**18, 10**18 + len(text)))


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were read whole."""
    paths: list[str] = []
    real = digests_module._digest

    def counted(wanted: Any) -> str:
        paths.append(os.path.basename(wanted.path))
        return real(wanted)

    monkeypatch.setattr(digests_module, "_digest", counted)
    return paths


def listing(pattern: str, max_bytes: int | None = None, **config: Any) -> dict[str, Any]:
    corpus = CorpusConfig(source="text", paths=[pattern] if pattern else [], **config)
    digests = Digests(".")
    found = digests.listing_of(find_parts(corpus), max_bytes)
    digests.save()
    return found


def test_moved_and_renamed_files_are_the_same_text(here: Path) -> None:
    first = listing("d/*.txt")
    assert (first["files"], first["bytes"]) == (3, 50_001)
    os.rename("d", "e")
    assert listing("e/*") == listing(str(here / "e/*.txt")) == first
    os.rename("e/b.txt", "e/bb.txt")
    assert listing("e/*.txt") == first
    os.rename("e/bb.txt", "e/z.txt")  # Another order makes other tokens.
    assert listing("e/*.txt")["digest"] != first["digest"]


def test_a_byte_anywhere_is_another_text(here: Path) -> None:
    seen = [listing("d/*.txt")["digest"]]
    for place in (0, 9_999, 19_999):
        text = "a" * place + "x" + "a" * (19_999 - place)
        write(here / "d" / "a.txt", text)
        os.utime("d/a.txt", ns=(10**18, 10**18 + place))
        seen.append(listing("d/*.txt")["digest"])
    assert len(set(seen)) == 4
    splits = {"train": ["d/a.txt", "d/b.txt"], "valid": ["d/c.txt"]}
    one = listing("", **{split: {"paths": paths} for split, paths in splits.items()})
    splits = {"train": ["d/a.txt"], "valid": ["d/b.txt", "d/c.txt"]}
    other = listing("", **{split: {"paths": paths} for split, paths in splits.items()})
    assert one["digest"] != other["digest"]


def test_only_what_has_changed_is_read_again(here: Path, read: list[str]) -> None:
    first = listing("d/*.txt")
    assert sorted(read) == ["a.txt", "b.txt", "c.txt"]
    read.clear()
    assert listing("d/*.txt") == listing(str(here / "d/*.txt")) == first
    assert read == []
    os.utime("d/b.txt")  # Touched: the same text, and settled only in a while.
    assert listing("d/*.txt") == listing("d/*.txt") == first
    assert read == ["b.txt", "b.txt"]
    os.utime("d/b.txt", ns=(10**18, 10**18))
    os.rename("d/a.txt", "d/kept.txt")
    write(here / "d" / "a.txt", "x" * 20_000)  # Same name, size and time, and another inode.
    read.clear()
    assert listing("d/?.txt")["digest"] != first["digest"]
    assert sorted(read) == ["a.txt", "b.txt"]


@pytest.mark.parametrize("damage", ["cut", "digest", "no JSON", "a list"])
def test_a_damaged_memory_is_not_believed(here: Path, read: list[str], damage: str) -> None:
    first = listing("d/*.txt")
    text = Path(FILE).read_text()
    entry = json.loads(text)["files"]
    digest = next(iter(entry.values()))[-1]
    changed = {
        "cut": text[:-20],
        "digest": text.replace(digest, digest[::-1]),
        "no JSON": "\xff",
        "a list": "[1]",
    }[damage]
    assert changed != text
    Path(FILE).write_text(changed)
    read.clear()
    assert listing("d/*.txt") == first
    assert len(read) == 3


def test_a_limit_bounds_what_is_read(
    here: Path, read: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    real = digests_module._digest
    monkeypatch.setattr(
        digests_module, "_digest", lambda wanted: sizes.append(wanted.num_bytes) or real(wanted)
    )
    first = listing("d/*.txt", max_bytes=25_000)
    assert sorted(sizes) == [1, 5_000, 20_000]
    for place, same in ((4_999, False), (5_000, True), (29_999, False)):
        write(here / "d" / "b.txt", "b" * place + "x" + "b" * (29_999 - place))
        os.utime("d/b.txt", ns=(10**18, 10**18 + place))
        assert (listing("d/*.txt", max_bytes=25_000) == first) == same
