"""tokenize: the artifacts, and what it refuses."""

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlpmem_jax.__main__ import main
from mlpmem_jax.config.schema import Config
from mlpmem_jax.corpus import retries, writer
from mlpmem_jax.corpus import tokens as tokens_module
from mlpmem_jax.corpus.stream import Corpus
from mlpmem_jax.corpus.tokenizer import load_tokenizer
from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.corpus.windows import TokenWindows
from mlpmem_jax.errors import PREEMPTED, ArtifactError, UserError
from mlpmem_jax.pipeline import sources
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.sources import Sources
from mlpmem_jax.store.array_specs import SPLITS
from mlpmem_jax.store.checked_json import fingerprint_of
from mlpmem_jax.store.run_record import RunRecord
from tests.pipeline.tokenizing import (
    WORDS,
    contents,
    failing_at,
    make,
    planned,
    settings,
)

pytestmark = pytest.mark.usefixtures("small_shards")


def test_the_stream_decodes_to_the_documents(text: Path) -> None:
    layout = make(settings(text))
    tokenizer = load_tokenizer(layout.tokenizer)
    manifest = layout.tokens.verify()
    pieces = list(Corpus(Config(**settings(text)).corpus).pieces())
    for split in SPLITS:
        stream = TokenSplit.open(layout.tokens, split)
        documents = [piece.text for piece in pieces if piece.split == split]
        assert stream.num_documents == len(documents) > 0
        assert stream.num_rows == stream.num_tokens - 1
        assert 290 < stream.vocab_size == tokenizer.vocab_size <= 300
        assert stream.padded_vocab == 384
        offsets = stream.document_offset
        assert offsets.dtype == np.int64
        assert (offsets[0], offsets[-1]) == (0, stream.num_tokens)
        for number, document in enumerate(documents):
            ids = stream.read(int(offsets[number]), int(offsets[number + 1]))
            assert ids[0] == stream.separator_id
            assert stream.separator_id not in ids[1:]
            assert tokenizer.decode(ids[1:]) == document
        assert stream.document_bytes.tolist() == [len(one.encode()) for one in documents]
        assert stream.document_words.tolist() == [len(re.split(r"\s+", one)) for one in documents]
        assert stream.num_bytes == stream.document_bytes.sum()
        assert stream.num_words == stream.document_words.sum()
        about = manifest.arrays[f"{split}/token"]
        assert about["shape"] == [stream.num_tokens] and about["dtype"] == "uint16"
        assert len(about["shards"]) == -(-stream.num_tokens // about["shard_rows"])
        windows = TokenWindows(stream, 32, "score").read(np.arange(-(-stream.num_rows // 32)))
        assert windows["weight"].sum() == stream.num_tokens - len(documents)


def test_documents_cut_from_one_file_or_record_share_its_number(text: Path) -> None:
    """Of each split apart: statistics draw files, not the documents that were cut from them."""
    records = [{"text": "def one\ndef two\n"}, {"text": "def three\ndef four\ndef five\n"}] * 20
    lines = [json.dumps({"text": one["text"].replace("\n", f" {n}\n")}) for n, one in
             enumerate(records)]  # fmt: skip
    (text / "text.jsonl").write_text("\n".join(lines))
    more = [{"source": "jsonl", "paths": [f"{text}/text.jsonl"]}]
    values = settings(text, corpus={"document_regex": "def", "more": more, "test_fraction": 0.4})
    layout = make(values)
    pieces = list(Corpus(Config(**values).corpus).pieces())
    for split in SPLITS:
        stream = TokenSplit.open(layout.tokens, split)
        places = [piece.position for piece in pieces if piece.split == split]
        items = [(place.part, place.file, place.item) for place in places]
        numbers = {item: number for number, item in enumerate(dict.fromkeys(items))}
        assert stream.document_file.tolist() == [numbers[item] for item in items]
        assert stream.document_file.dtype == np.int64
        assert any(item[0] == 1 for item in items)
    train = TokenSplit.open(layout.tokens, "train")
    assert train.document_file[-1] + 1 < train.num_documents


def test_windows_are_the_same_from_disk(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = make(settings(text))
    starts = np.asarray([0, 5, 300, TokenSplit.open(layout.tokens, "train").num_tokens - 7])
    resident = TokenSplit.open(layout.tokens, "train").read_windows(starts, 100)
    monkeypatch.setattr(tokens_module, "_RESIDENT_BYTES", 0)
    stream = TokenSplit.open(layout.tokens, "train")
    np.testing.assert_array_equal(stream.read_windows(starts, 100), resident)
    assert (resident[3, 7:] == stream.separator_id).all()
    np.testing.assert_array_equal(stream.read(300, 400), resident[2])
    shard = layout.tokens.path / "train" / "token" / "c" / "1"
    shard.write_bytes(shard.read_bytes()[:-40])
    with pytest.raises(ArtifactError, match="train/token"):
        TokenSplit.open(layout.tokens, "train").read_windows(starts, 100)


def test_words_are_those_of_the_harness(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the whole document, however it is cut into pieces: an empty word at each blank end."""
    documents = [
        " = Title = \n\n a\tb \n",
        "one",
        "   ",
        "a b\u00a0c\u2003 d",
        "\nx" * 300,
        "y " * 300,
    ]
    for number, document in enumerate(documents):
        (text / "text" / f"{number:02}.txt").write_text(document)
    given = {split: {"paths": [f"{text}/text/{digit}*.txt"]} for split, digit in
             zip(SPLITS, "012", strict=True)}  # fmt: skip
    for piece_chars in (1 << 20, 50, 7, 1):
        monkeypatch.setattr("mlpmem_jax.corpus.documents.PIECE_CHARS", piece_chars)
        values = settings(text, f"run-{piece_chars}", corpus={"paths": [], **given},
                          tokenizer={"vocab_size": 257})  # fmt: skip
        stream = TokenSplit.open(make(values).tokens, "train")
        words = [len(re.split(r"\s+", document)) for document in documents]
        assert stream.document_words[: len(documents)].tolist() == words
        assert stream.num_words == stream.document_words.sum()


def test_a_dataset_that_breaks_off_is_started_again_by_the_launcher(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    breaking = True

    class Rows(list):  # type: ignore[type-arg]
        def skip(self, count: int) -> "Rows":
            return Rows(self[count:])

        def __iter__(self) -> Any:
            for row in super().__iter__():
                if breaking and row["number"] == 150:
                    raise ConnectionResetError(104, "Connection reset by peer")
                yield row

    words = np.random.default_rng(0)
    rows = [{"number": n, "text": " ".join(words.choice(WORDS, 40))} for n in range(300)]
    module = types.SimpleNamespace(load_dataset=lambda *_, **__: Rows(rows))
    monkeypatch.setitem(sys.modules, "datasets", module)  # type: ignore[arg-type]
    monkeypatch.setattr(retries, "FIRST_WAIT_SECS", 0.0)
    monkeypatch.setattr(writer, "_SAVE_SECS", 0.0)
    tiny = str(Path(__file__).resolve().parents[2] / "configs" / "tiny.yaml")
    command = ["tokenize", "--config", tiny, "corpus.source=huggingface", "corpus.dataset=some/set",
               "tokenizer.train_bytes=2000", "corpus.max_bytes=null"]  # fmt: skip
    assert main([*command, "--workdir", str(tmp_path / "run")]) == PREEMPTED
    message = "error: corpus.dataset=some/set, row 150: the connection broke 5 times"
    assert message in capsys.readouterr().err
    begun = tmp_path / "run" / "artifacts" / RunRecord.read(tmp_path / "run").roles["tokens"]
    assert (begun / "progress.npz").exists()
    breaking = False
    assert main([*command, "--workdir", str(tmp_path / "run")]) == 0
    assert f"tokens ({begun.name[:8]}): continuing" in capsys.readouterr().out
    assert main([*command, "--workdir", str(tmp_path / "straight")]) == 0
    one, other = (contents(tmp_path / name) for name in ("run", "straight"))
    assert one == other


def test_records_that_are_left_out_are_counted(
    text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ['{"text": "one"}', '{"text": 1}', "no record", '{"text": "two"}', '{"text": "one"}']
    (text / "x.jsonl").write_text("\n".join(lines))
    more = [{"source": "jsonl", "paths": [f"{text}/x.jsonl"]}]
    with pytest.raises(UserError, match=r"x.jsonl, line 2: field 'text' .* holds int"):
        make(settings(text, corpus={"more": more}))
    assert not (text / "run").exists()
    layout = make(settings(text, corpus={"more": more, "on_error": "skip", "document_regex": "@"}))
    counts = layout.tokens.load().counts
    assert (counts["skipped_files"], counts["skipped_records"]) == (0, 2)
    assert (counts["duplicate_documents"], counts["duplicate_bytes"]) == (1, 3)
    printed = capsys.readouterr()
    assert "not UTF-8 text: 0; records left out, without usable text: 2" in printed.out
    for said in (
        "the first that is left out: ",
        "document_regex='@' matches no line of corpus (60 files)",
    ):
        assert printed.err.count(said) == 1


def test_a_rebuild_that_cannot_do_leaves_what_is_there(text: Path) -> None:
    make(settings(text))
    before = contents(text / "run")
    with pytest.raises(UserError, match="the test split is empty"):
        planned(settings(text, corpus={"test_fraction": 1e-9}))
    assert contents(text / "run") == before


def test_a_given_tokenizer(text: Path) -> None:
    first = make(settings(text))
    path = first.tokenizer.path / "tokenizer.json"
    second = make(settings(text, "other", tokenizer={"path": str(path)}))
    assert (second.tokenizer.path / "tokenizer.json").read_bytes() == path.read_bytes()
    one, other = (contents(text / name) for name in ("run", "other"))
    assert one == other


def test_many_ids_take_four_bytes(text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make(settings(text)).tokenizer.path / "tokenizer.json"
    described = json.loads(path.read_bytes())
    described["model"]["vocab"]["unused"] = 70_000
    large = text / "large.json"
    large.write_text(json.dumps(described))
    layout = make(settings(text, "large", tokenizer={"path": str(large)}))
    manifest = layout.tokens.load()
    assert manifest.arrays["train/token"]["dtype"] == "uint32"
    assert (manifest.counts["vocab_size"], manifest.counts["padded_vocab"]) == (70_001, 70_016)


def test_pieces_of_a_document_make_one_document(
    text: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make(settings(text))
    # Splits are drawn by first pieces, so explicit splits compare the same documents.
    files = {
        split: {"paths": [f"{text}/text/{digit}*.txt"]}
        for split, digit in zip(SPLITS, "012", strict=True)
    }
    given = settings(text, "whole", corpus={"paths": [], **files})
    make(given)
    monkeypatch.setattr("mlpmem_jax.corpus.documents.PIECE_CHARS", 40)
    make({**given, "workdir": str(text / "pieces")})
    whole, pieces = (
        TokenSplit.open(Artifacts(Config(**{**given, "workdir": str(text / name)})).tokens, "train")
        for name in ("whole", "pieces")
    )
    np.testing.assert_array_equal(
        whole.read(0, whole.num_tokens), pieces.read(0, pieces.num_tokens)
    )
    for name in ("document_offset", "document_bytes", "document_words", "document_file"):
        np.testing.assert_array_equal(getattr(whole, name), getattr(pieces, name))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": {"valid_fraction": 1e-9}}, "the valid split is empty (documents: train"),
        ({"corpus": {"paths": ["nowhere/*.txt"]}}, "corpus.paths: 'nowhere/*.txt' matches no"),
        ({"decoder": {"context_tokens": 32768}}, "decoder.context_tokens=32768"),
        ({"decoder": {"context_tokens": 8192}}, "decoder.context_tokens=8192"),
        ({"pretrain": {"window_tokens": 9000}, "decoder": {"context_tokens": 16384}},
         "pretrain.window_tokens=9000"),
        ({"tokenizer": {"path": "text/00.txt"}}, "is no tokenizer.json"),
        ({"corpus": {"max_bytes": 3}}, "corpus.max_bytes=3"),
        ({"corpus": {"paths": ["copies/*"]}}, "train split is empty (documents: train 0, valid 1, "
         "test 0; 3 duplicates left out)"),
    ],
)  # fmt: skip
def test_what_cannot_do_is_refused_before_anything_is_written(
    text: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(text)
    (text / "copies").mkdir()
    for name in "abcd":
        (text / "copies" / name).write_text("four times the same")
    with pytest.raises(UserError) as caught:
        planned(settings(text, **changes))
    assert message in str(caught.value)
    assert not (text / "run").exists()


def test_binary_files_stop_or_are_counted(text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (text / "text" / "30a.txt").write_bytes(b"ab\xff")
    with pytest.raises(UserError, match="30a.txt: not UTF-8 text at byte 2"):
        make(settings(text))
    assert not (text / "run").exists()
    layout = make(settings(text, corpus={"on_error": "skip"}))
    assert layout.tokens.load().counts["skipped_files"] == 1
    assert "files left out, not UTF-8 text: 1;" in capsys.readouterr().out


def test_near_duplicates_are_left_out_and_counted(
    text: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Variants of the first files come last; a start after a kill makes the same tokens."""
    plain = make(settings(text, "plain"))
    assert not any("near" in name for name in plain.tokens.load().counts)
    for number in range(0, 60, 2):
        content = (text / "text" / f"{number:02}.txt").read_text()
        (text / "text" / f"z{number}.txt").write_text(f"{content}\n".upper())
        (text / "text" / f"zz{number}.txt").write_text(f"{content}\n".upper())
    capsys.readouterr()
    changes = {"corpus": {"near_duplicates": 0.9}}
    layout = make(settings(text, "straight", **changes))
    counts = layout.tokens.load().counts
    expected = contents(text / "straight")
    found = {
        split: (
            counts[f"{split}_near_duplicate_documents"],
            counts[f"{split}_near_duplicate_bytes"],
        )
        for split in ("train", "valid", "test")
    }
    assert sum(documents for documents, _ in found.values()) == 30
    assert counts["duplicate_documents"] == 30
    whole, _ = (counts[f"train_{name}"] for name in ("documents", "bytes"))
    assert whole + counts["valid_documents"] + counts["test_documents"] == 60
    shown = ", ".join(
        f"{split} {number} ({size:,} bytes)" for split, (number, size) in found.items()
    )
    copied = counts["near_copied_documents"]
    assert copied > 0
    assert (
        f"tokens: near-duplicate documents left out: {shown}; they resemble one of another split: "
        f"{copied} (test comes before valid, valid before train)"
    ) in capsys.readouterr().out
    for failing in (2, 6, 12):
        values = settings(text, f"failing{failing}", **changes)
        with monkeypatch.context() as patch:
            patch.setattr(writer.TokenWriter, "save", failing_at(failing))
            with pytest.raises(OSError, match="No space"):
                make(values)
        assert make(values).tokens.load().counts == counts
        assert contents(text / f"failing{failing}") == expected


def test_a_key_that_is_not_set_leaves_ids_as_they_were(text: Path) -> None:
    """Work directories from before `corpus.near_duplicates` go on, also where the text is gone."""
    config = Config(**settings(text))
    asked = sources._settings(config.corpus)
    assert sorted(asked) == [
        "dataset", "dataset_config", "dataset_split", "document_regex", "field", "max_bytes",
        "more", "on_error", "source", "test_fraction", "valid_fraction", "weight",
    ]  # fmt: skip
    other = Config(**settings(text, corpus={"near_duplicates": 0.9}))
    assert sources._settings(other.corpus) == {**asked, "near_duplicates": 0.9}
    reading = Sources(str(text / "run"), reads=True)
    reading.text(config.corpus)
    keys = config.corpus.model_dump(mode="json", exclude={"attention", "near_duplicates"})
    assert set(reading.found) == {fingerprint_of(["text", keys])}
    reading.text(other.corpus)
    assert len(reading.found) == 2
