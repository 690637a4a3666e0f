"""Documents and pieces: nothing lost, cuts independent of reading, memory bounded."""

import gzip
import random
import re
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from mlpmem_jax.corpus import documents, files
from mlpmem_jax.corpus.documents import pieces_of
from mlpmem_jax.corpus.files import NotTextError, read_text
from mlpmem_jax.errors import UserError


def chunks(text: str, sizes: random.Random, longest: int) -> list[str]:
    parts, start = [], 0
    while start < len(text):
        stop = start + sizes.randint(1, longest)
        parts.append(text[start:stop])
        start = stop
    return parts


def reference_documents(text: str, pattern: str | None) -> list[str]:
    result: list[str] = []
    for line in text.splitlines(keepends=True):
        if result and not (pattern and re.match(pattern, line)):
            result[-1] += line
        else:
            result.append(line)
    return result


def joined(pieces: list[tuple[bool, str]]) -> list[str]:
    result: list[str] = []
    for begins, text in pieces:
        if begins:
            result.append(text)
        else:
            result[-1] += text
    return result


@pytest.mark.parametrize("pattern", [None, "# ", r"^## .*$", r"\s*\n", "x"])
@pytest.mark.parametrize("piece_chars", [7, 16, 1000])
def test_documents_do_not_depend_on_how_text_arrives(
    monkeypatch: pytest.MonkeyPatch, pattern: str | None, piece_chars: int
) -> None:
    monkeypatch.setattr(documents, "PIECE_CHARS", piece_chars)
    draw = random.Random(piece_chars)
    words = ["# a", "## bé", "x", "long" * 6, "", " ", "  # no"]
    for _ in range(30):
        text = "\n".join(draw.choices(words, k=draw.randint(1, 12))) + draw.choice(["", "\n"])
        if not text:
            continue
        compiled = re.compile(pattern, re.MULTILINE) if pattern else None
        whole = list(pieces_of([text], compiled))
        for longest in (1, 3, 50):
            assert list(pieces_of(chunks(text, draw, longest), compiled)) == whole
        assert all(0 < len(piece) <= piece_chars for _, piece in whole)
        assert joined(whole) == reference_documents(text, pattern)


def test_pieces_are_cut_where_words_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "PIECE_CHARS", 12)
    texts = [text for _, text in pieces_of(["one\n two\nthree\nfour five six seven"], None)]
    assert texts == ["one\n two\n", "three\n", "four five", " six seven"]


def test_empty_text_is_no_document() -> None:
    assert list(pieces_of([], None)) == list(pieces_of([""], re.compile("a"))) == []


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_huge_file_needs_little_memory(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"huge.txt{suffix}"
    block = ("# title\n" + ("some text of a line " * 12 + "\n") * 4).encode() * 1000
    many = 20  # 20 MB
    if suffix == ".gz":
        with gzip.open(path, "wb", compresslevel=1) as file:
            for _ in range(many):
                file.write(block)
    elif suffix == ".zst":
        with zstandard.open(path, "wb") as file:
            for _ in range(many):
                file.write(block)
    else:
        path.write_bytes(block * many)
    tracemalloc.start()
    count = sum(1 for _ in pieces_of(read_text(str(path)), re.compile("# ")))
    whole = sum(len(text) for _, text in pieces_of(read_text(str(path)), None))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1000 * many
    assert whole == len(block) * many
    assert peak < 14 << 20


def test_text_is_read_exactly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "BLOCK_BYTES", 5)
    text = "\ufeffé\r\nΩ🙂\r\ufeffend"
    for name, data in {
        "a.txt": text.encode(),
        "a.gz": gzip.compress(text[:3].encode()) + gzip.compress(text[3:].encode()),
        "a.zst": zstandard.compress(text[:3].encode()) + zstandard.compress(text[3:].encode()),
    }.items():
        (tmp_path / name).write_bytes(data)
        # A byte order mark is no text where the file begins.
        assert "".join(read_text(str(tmp_path / name))) == text[1:]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"good \xff bad", "not UTF-8 text at byte 5"),
        ("good é".encode()[:-1], "not UTF-8 text at byte 5"),
        (b"text\0text", "not UTF-8 text at byte 4 (a NUL byte)"),
        (b"\xfd7zXZ\0\0\4", "not UTF-8 text at byte 0 (invalid start byte); it looks like xz"),
        (gzip.compress(b"a"), "it looks like gzip without the suffix .gz"),
        (zstandard.compress(b"a"), "it looks like zstd without the suffix .zst"),
        (b"BZh91AY&SY\xff", "it looks like bzip2"),
        (b"PK\x03\x04\x14\0", "it looks like zip"),
        (b"PAR1\x15\0\x15", "it looks like Parquet"),
        ("é".encode("utf-16"), "not UTF-8 text at byte 0"),
        ("é".encode("utf-16"), "it looks like UTF-16"),
    ],
)
@pytest.mark.parametrize("block_bytes", [1, 3, 1000])
def test_a_file_that_is_no_text_is_named_with_the_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, message: str, block_bytes: int
) -> None:
    monkeypatch.setattr(files, "BLOCK_BYTES", block_bytes)
    path = tmp_path / "x.bin"
    path.write_bytes(data)
    with pytest.raises(NotTextError, match="corpus.on_error=skip") as caught:
        list(read_text(str(path)))
    assert str(caught.value).startswith(f"{path}: not UTF-8 text at byte ")
    assert message in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(path))


@pytest.mark.parametrize("suffix", [".gz", ".zst", ".GZ", ".zstd"])
def test_damaged_compression_is_named(tmp_path: Path, suffix: str) -> None:
    text = random.Random(0).randbytes(5000).hex().encode()
    data = gzip.compress(text) if suffix.lower() == ".gz" else zstandard.compress(text)
    for number, damaged in enumerate((data[:-100], b"no " + data, b"")):
        path = tmp_path / f"{number}{suffix}"
        path.write_bytes(damaged)
        with pytest.raises(NotTextError, match="damaged"):
            list(read_text(str(path)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone.txt: cannot be read"):
        list(read_text(str(tmp_path / "gone.txt")))
