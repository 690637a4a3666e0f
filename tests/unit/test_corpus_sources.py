"""Sources: which files are named, JSONL records, messages."""

import gzip
import json
import os
import sys
import types
from pathlib import Path

import pytest

from mlpmem_jax.config.data import CorpusConfig
from mlpmem_jax.corpus.sources import find_parts
from mlpmem_jax.corpus.stream import Corpus
from mlpmem_jax.errors import UserError


def texts(**config: object) -> list[str]:
    return [piece.text for piece in Corpus(CorpusConfig(**config)).pieces()]  # type: ignore[arg-type]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_standard_library_without_its_tests() -> None:
    (part,) = find_parts(CorpusConfig())
    root = os.path.dirname(os.__file__)
    names = [os.path.relpath(path, root) for path in part.files]
    assert "argparse.py" in names
    assert os.path.join("json", "decoder.py") in names
    forbidden = {"test", "tests", "idle_test", "site-packages", "__pycache__"}
    assert not any(forbidden & set(name.split(os.sep)) for name in names)
    assert list(names) == sorted(names, key=lambda name: name.split(os.sep))
    assert sum(1 for _ in Corpus(CorpusConfig(max_bytes=2_000_000)).pieces()) > 50


def test_globs_are_sorted_and_files_counted_once(here: Path) -> None:
    for name in ("b.txt", "a.txt", "sub/deep/c.txt", "sub/other.md", "odd[1].txt"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(name)
    found = texts(source="text", paths=["**/*.txt", "./a.txt", "sub/../a.txt", "odd[1].txt"])
    assert found == ["a.txt", "b.txt", "odd[1].txt", "sub/deep/c.txt"]


def test_every_pattern_that_names_nothing_is_told_once(here: Path) -> None:
    (here / "folder").mkdir()
    with pytest.raises(UserError) as caught:
        texts(
            source="text",
            paths=["none/*.txt", "none/*.txt", "gone.txt", "folder"],
            more=[{"source": "text", "paths": ["no*"]}],
        )
    assert [m.split(" ")[0:2] for m in caught.value.messages] == [
        ["corpus.paths:", "'none/*.txt'"],
        ["corpus.paths:", "'gone.txt'"],
        ["corpus.paths:", "'folder'"],
        ["corpus.more.0.paths:", "'no*'"],
    ]


def test_explicit_splits_must_not_share_files(here: Path) -> None:
    for name in "abc":
        (here / f"{name}.txt").write_text(name)
    paths = {"train": ["a.txt", "b.txt"], "valid": ["b.txt"], "test": ["c.txt"]}
    given = {split: {"paths": files} for split, files in paths.items()}
    with pytest.raises(
        UserError, match=r"train.paths 'b.txt' and corpus.valid.paths 'b.txt' both hold b.txt"
    ):
        texts(source="text", **given)
    given["valid"] = {"paths": ["c.txt"]}
    with pytest.raises(UserError, match=r"corpus.paths=\['a.txt'\] is not read"):
        texts(source="text", paths=["a.txt"], **given)


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_jsonl_records_are_documents(here: Path, suffix: str) -> None:
    records = [{"body": "one\nline"}, {"body": ""}, {"body": "é🙂", "other": 1}]
    data = "\n\n".join(json.dumps(record) for record in records).encode()
    (here / f"x.jsonl{suffix}").write_bytes(gzip.compress(data) if suffix else data)
    assert texts(source="jsonl", paths=["x.*"], field="body") == ["one\nline", "é🙂"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "x.jsonl, line 2: no JSON"),
        ('["a"]', "x.jsonl, line 2: a JSON list, not an object"),
        ('{"body": "a", "id": 3}', "line 2: no field 'text' (corpus.field); it has 'body', 'id'"),
        ('{"text": 5}', "line 2: field 'text' (corpus.field) holds int, not a string"),
        ('{"text": "\\ud800"}', "line 2: field 'text' is no valid Unicode"),
    ],
)
def test_bad_records_are_named(here: Path, line: str, message: str) -> None:
    (here / "x.jsonl").write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(UserError) as caught:
        texts(source="jsonl", paths=["x.jsonl"])
    assert message in str(caught.value)


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install -r requirements-huggingface.txt"):
        texts(source="huggingface", dataset="some/thing")


def test_a_dataset_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rows(list):  # type: ignore[type-arg]
        def skip(self, count: int) -> list[dict[str, str]]:
            return self[count:]

    def load(name: str, config: str, *, split: str, streaming: bool) -> Rows:
        assert (name, config, split, streaming) == ("some/thing", "small", "train", True)
        return Rows({"text": f"row {n}"} for n in range(5))

    module = types.SimpleNamespace(load_dataset=load)
    monkeypatch.setitem(sys.modules, "datasets", module)  # type: ignore[arg-type]
    corpus = Corpus(
        CorpusConfig(source="huggingface", dataset="some/thing", dataset_config="small")
    )
    pieces = list(corpus.pieces())
    assert [piece.text for piece in pieces] == [f"row {n}" for n in range(5)]
    assert [piece.text for piece in corpus.pieces(pieces[2].position)] == ["row 3", "row 4"]
