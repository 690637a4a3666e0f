"""Records and rows: what is no text, connections that break, and what is left out."""

import gzip
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from mlpmem_jax.config.data import CorpusConfig
from mlpmem_jax.corpus import retries
from mlpmem_jax.corpus.stream import Corpus
from mlpmem_jax.errors import PREEMPTED, TryAgain, UserError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(retries, "FIRST_WAIT_SECS", 0.0)
    return tmp_path


def texts(corpus: Corpus) -> list[str]:
    return [piece.text for piece in corpus.pieces()]


def jsonl(**config: Any) -> Corpus:
    return Corpus(CorpusConfig(source="jsonl", paths=["x.jsonl"], **config))


UNUSUAL = [
    '{"text": "digits", "id": ' + "7" * 5000 + "}",
    '{"text": "float", "id": 1e' + "9" * 5000 + ', "no": [NaN, Infinity]}',
    '{"text": "twice", "text": "the last of two"}',
    '{"text": "a line of Windows"}\r',
    '{"text": "\\ud83d\\ude42", "other": "\\ud800"}',
]
BAD = [
    '{"text": "cut',
    "[" * 100_000,
    '{"text": "\\ud800"}',
    '{"other": 1}',
    '{"text": null}',
    '{"text": ' + "7" * 5000 + "}",
    "7" * 5000,
    "\ufeff",
]


def test_unusual_records_are_read(here: Path) -> None:
    (here / "x.jsonl").write_bytes("\n".join(UNUSUAL).encode())
    expected = ["digits", "float", "the last of two", "a line of Windows", "🙂"]
    assert texts(jsonl()) == expected


@pytest.mark.parametrize("line", BAD)
def test_a_bad_record_is_one_short_message(here: Path, line: str) -> None:
    (here / "x.jsonl").write_text(f'{{"text": "good"}}\n{line}\n')
    with pytest.raises(UserError) as caught:
        texts(jsonl())
    (message,) = caught.value.messages
    assert message.startswith("x.jsonl, line 2: ")
    assert message.endswith("skip such records with corpus.on_error=skip")
    assert len(message) < 300 and "\n" not in message


def test_bad_records_are_left_out_and_counted(here: Path) -> None:
    lines = ['{"text": "good"}', *BAD, '{"text": "also good"}', BAD[0]]
    (here / "x.jsonl").write_text("\n".join(lines))
    corpus = jsonl(on_error="skip")
    assert texts(corpus) == ["good", "also good"]
    assert corpus.position.left_out == {"skipped_records": len(BAD) + 1}
    (note,) = corpus.notes()
    assert "the first that is left out: x.jsonl, line 2: no JSON" in note


@pytest.mark.parametrize("name", ["x.jsonl", "x.JSONL.GZ", "x.jsonl.Zst", "x.jsonl.zstd"])
def test_a_byte_order_mark_is_no_text(here: Path, name: str) -> None:
    data = b"\xef\xbb\xbf" + b'{"text": "one"}\n{"text": "two"}\n'
    if name.lower().endswith(".gz"):
        data = gzip.compress(data)
    elif "zst" in name.lower():
        data = zstandard.compress(data)
    (here / name).write_bytes(data)
    assert texts(Corpus(CorpusConfig(source="jsonl", paths=[name]))) == ["one", "two"]


class Reset(ConnectionResetError):
    """As urllib3's and aiohttp's, not of the standard library's module."""


class HfHubHTTPError(Exception):
    """As the hub's client raises them."""

    def __init__(self, status: int):
        super().__init__(f"{status} of a server\nRequest ID: 1")
        self.response = types.SimpleNamespace(status_code=status)


class Rows:
    """A dataset whose connection breaks before some rows, each time it gets there."""

    def __init__(self, breaks: dict[int, list[Exception]], first: int = 0):
        self.breaks, self.first = breaks, first

    def skip(self, count: int) -> "Rows":
        return Rows(self.breaks, self.first + count)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for number in range(self.first, 200):
            if self.breaks.get(number):
                raise self.breaks[number].pop(0)
            yield {"text": f"row {number}"} if number != 7 else {"text": None}


def dataset(
    monkeypatch: pytest.MonkeyPatch, breaks: dict[int, list[Exception]], **config: Any
) -> Corpus:
    module = types.SimpleNamespace(load_dataset=lambda *_, **__: Rows(breaks))
    monkeypatch.setitem(sys.modules, "datasets", module)  # type: ignore[arg-type]
    return Corpus(CorpusConfig(source="huggingface", dataset="some/set", on_error="skip", **config))


def test_a_broken_connection_is_taken_up_at_its_row(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    breaks: dict[int, list[Exception]] = {
        0: [TimeoutError("slow")],
        150: [Reset("reset by peer"), HfHubHTTPError(503), HfHubHTTPError(429)],
        199: [OSError(113, "No route to host")] * 4,
    }
    corpus = dataset(monkeypatch, breaks)
    assert texts(corpus) == [f"row {number}" for number in range(200) if number != 7]
    assert not any(breaks.values())
    assert corpus.position.left_out == {"skipped_records": 1}


def test_a_connection_that_stays_broken_asks_for_another_start(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = dataset(monkeypatch, {150: [Reset("reset by peer")] * 9})
    seen = []
    with pytest.raises(TryAgain) as caught:
        for piece in corpus.pieces():
            seen.append(piece.text)
    assert caught.value.exit_code == PREEMPTED
    assert list(caught.value.messages) == [
        "corpus.dataset=some/set, row 150: the connection broke 5 times (reset by peer); the same "
        "command continues"
    ]
    assert len(seen) == 149
    rest = dataset(monkeypatch, {}).pieces(corpus.position)
    assert [piece.text for piece in rest] == [f"row {number}" for number in range(150, 200)]


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        (0, Reset("no network"), "corpus.dataset=some/set: no network"),
        (0, HfHubHTTPError(404), "corpus.dataset=some/set: 404 of a server"),
        (5, HfHubHTTPError(403), "corpus.dataset=some/set, row 5: 403 of a server"),
        (5, ValueError("broken file\nof ten lines"), "corpus.dataset=some/set, row 5: broken file"),
        (5, RuntimeError("x" * 20_000), f"corpus.dataset=some/set, row 5: {'x' * 150}…"),
    ],
)
def test_what_another_try_cannot_mend_is_a_mistake(
    here: Path, monkeypatch: pytest.MonkeyPatch, row: int, error: Exception, message: str
) -> None:
    corpus = dataset(monkeypatch, {row: [error] * 9})
    with pytest.raises(UserError) as caught:
        texts(corpus)
    assert list(caught.value.messages) == [message]
    assert caught.value.exit_code == 2


def test_records_are_numbered_as_lines_when_some_are_left_out(here: Path) -> None:
    lines = [json.dumps({"text": f"record {number}"}) for number in range(20)]
    lines[3] = lines[11] = "{"
    (here / "x.jsonl").write_text("\n".join(lines))
    corpus = jsonl(on_error="skip")
    pieces = list(corpus.pieces())
    assert [piece.position.item for piece in pieces] == [n for n in range(20) if n not in (3, 11)]
    for number, piece in enumerate(pieces):
        assert [one.text for one in corpus.pieces(piece.position)] == [
            one.text for one in pieces[number + 1 :]
        ]
        assert corpus.position.left_out == {"skipped_records": 2}
