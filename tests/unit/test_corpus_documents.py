"""Documents and pieces: nothing lost, cuts independent of reading, memory bounded."""

import gzip
import hashlib
import random
import re
import tracemalloc
from pathlib import Path

import pytest
import zstandard

from mlpmem_jax.corpus import documents, files
from mlpmem_jax.corpus.documents import documents_of, pieces_of
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


@pytest.mark.parametrize(
    "pattern", ["^---$", r"^---\r?$", "---\n", r"---\r\n|---\n", "(?m:^---$)", "^-{3}$"]
)
def test_lines_may_end_with_carriage_returns(pattern: str) -> None:
    text = "one\n---\ntwo\n----\n---\nthree\n---"
    compiled = re.compile(pattern, re.MULTILINE)
    for lines in (text, text.replace("\n", "\r\n")):
        draw = random.Random(0)
        for longest in (1, 4, 100):
            cut = joined(list(pieces_of(chunks(lines, draw, longest), compiled)))
            # The text itself keeps its line ends; a bare `---` at the end has none.
            assert "".join(cut) == lines
            assert len(cut) == (3 if "\n" in pattern or "\\n" in pattern else 4)
    # A lone carriage return is no end of a line.
    assert len(list(pieces_of(["one\r---\rtwo"], compiled))) == 1


def test_the_last_line_may_end_with_a_carriage_return_alone() -> None:
    compiled = re.compile("^---$", re.MULTILINE)
    assert joined(list(pieces_of(["one\r\n---\r"], compiled))) == ["one\r\n", "---\r"]


@pytest.mark.parametrize("piece_chars", [5, 40, 1000])
@pytest.mark.parametrize("held", [1, 3])
def test_documents_are_known_to_their_end(
    monkeypatch: pytest.MonkeyPatch, piece_chars: int, held: int
) -> None:
    monkeypatch.setattr(documents, "PIECE_CHARS", piece_chars)
    monkeypatch.setattr(documents, "_HELD_PIECES", held)
    draw = random.Random(piece_chars)
    numbers = [draw.choice([0, 1, 9]) for _ in range(13)]
    texts = ["".join(f"\nü{draw.random()}" for _ in range(number)) for number in numbers]
    text = "before" + "".join(f"\n# {number}{one}" for number, one in enumerate(texts))
    reads = 0

    def read() -> list[str]:
        nonlocal reads
        reads += 1
        return chunks(text, draw, 9)

    found = list(documents_of(read, re.compile("# ")))
    expected = reference_documents(text, "# ")
    assert [one.num_bytes for one in found] == [len(one.encode()) for one in expected]
    assert [one.is_cut for one in found] == [False] + [True] * 13
    digests = [hashlib.blake2b(one.encode(), digest_size=8).digest() for one in expected]
    assert [one.digest for one in found] == [int.from_bytes(one, "little") for one in digests]
    again = ["".join(one.pieces) for one in documents_of(read, re.compile("# "))]
    assert again == expected
    # However many are too long to be held, the text is read once more and not for each.
    assert reads in (2, 4)
    (whole,) = documents_of(read, None)
    assert text.startswith(whole.first) and 0 < len(whole.first) <= piece_chars


def test_a_huge_document_needs_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "huge.txt"
    path.write_bytes(b"some text of a line " * 12 + b"\n" * 100)
    path.write_bytes(path.read_bytes() * 120_000)  # 40 MB, one document.
    tracemalloc.start()
    (size,) = (
        (one.num_bytes, sum(map(len, one.pieces)))
        for one in documents_of(lambda: read_text(str(path)), None)
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert size == (path.stat().st_size,) * 2
    assert peak < 30 << 20


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
        (gzip.compress(b"a", mtime=0), "it looks like gzip without the suffix .gz"),
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
    data = gzip.compress(text, mtime=0) if suffix.lower() == ".gz" else zstandard.compress(text)
    for number, damaged in enumerate((data[:-100], b"no " + data, b"")):
        path = tmp_path / f"{number}{suffix}"
        path.write_bytes(damaged)
        with pytest.raises(NotTextError, match="damaged"):
            list(read_text(str(path)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gone.txt: cannot be read"):
        list(read_text(str(tmp_path / "gone.txt")))
