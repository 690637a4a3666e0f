"""Text in a bucket, which a server of the tests keeps (bucket_server.py)."""

import gzip
import io
import json
from pathlib import Path

import pytest
import yaml
from etils import epath

from mlpmem_jax.__main__ import main
from mlpmem_jax.config.data import CorpusConfig
from mlpmem_jax.corpus import files, retries
from mlpmem_jax.corpus.sources import find_parts
from mlpmem_jax.corpus.stream import Corpus
from mlpmem_jax.errors import PREEMPTED, TryAgain, UserError
from mlpmem_jax.store.array_specs import SPLITS
from mlpmem_jax.store.run_record import RunRecord
from tests.pipeline.bucket_server import Driver, assert_same

TINY = Path(__file__).resolve().parents[2] / "configs" / "tiny.yaml"
TEXTS = {f"text-{n:02d}.txt": f"document {n} tells of {n * n}\n" * (20 + n) for n in range(24)}


def _tokenize_flags(paths, *more):
    return [
        "--config", str(TINY), "corpus.source=text", f"corpus.paths={json.dumps(paths)}",
        "corpus.valid_fraction=0.3", "corpus.test_fraction=0.3", *more,
    ]  # fmt: skip


@pytest.fixture
def texts(bucket):
    """A bucket with texts, half of them compressed, and what must not be read."""
    for number, (name, text) in enumerate(TEXTS.items()):
        packed = number % 2
        data = gzip.compress(text.encode()) if packed else text.encode()
        epath.Path(f"{bucket}/texts/{name}{'.gz' if packed else ''}").write_bytes(data)
    epath.Path(f"{bucket}/texts/notes.md").write_bytes(b"\0 no text")
    epath.Path(f"{bucket}/texts/deeper/text.txt").write_bytes(b"\0 no text")
    return f"{bucket}/texts"


@pytest.mark.parametrize("scheme", ["gs", "s3"])
def test_text_is_read_from_globs_and_paths_of_a_bucket(texts, scheme):
    texts = texts.replace("gs://", f"{scheme}://")
    patterns = [f"{texts}/text-0*", f"{texts}/text-1?.txt*", f"{texts}/text-20.txt"]
    corpus = Corpus(CorpusConfig(source="text", paths=patterns))
    assert [piece.text for piece in corpus.pieces()] == list(TEXTS.values())[:21]


def test_what_a_bucket_does_not_hold_is_told_at_once(texts):
    patterns = [f"{texts}/*.tex", f"{texts}/gone.txt", f"{texts}/deeper", f"{texts}/**/*.txt"]
    with pytest.raises(UserError) as caught:
        find_parts(CorpusConfig(source="text", paths=patterns))
    assert list(caught.value.messages) == [
        f"corpus.paths: '{texts}/*.tex' matches no file",
        f"corpus.paths: '{texts}/gone.txt' does not exist",
        f"corpus.paths: '{texts}/deeper' is a directory; name its files, for example "
        f"'{texts}/deeper/*.txt'",
        f"corpus.paths: '{texts}/**/*.txt' uses ** on a remote path; write out its folders",
    ]


@pytest.mark.parametrize("operation", ["info", "ls", "open"])
def test_a_bucket_that_stops_answering_is_named(texts, operation, monkeypatch):
    def fail(self, path, *_, **__):
        raise RuntimeError("token expired\nlog in again")

    monkeypatch.setattr(Driver, operation, fail)
    pattern = f"{texts}/text-00.txt" if operation == "info" else f"{texts}/text-*"
    with pytest.raises(UserError, match="cannot be reached .token expired.$") as caught:
        list(Corpus(CorpusConfig(source="text", paths=[pattern])).pieces())
    (line,) = caught.value.messages
    expected = f"{texts}/text-00.txt: " if operation == "open" else f"corpus.paths: '{pattern}' "
    assert line.startswith(expected)


class _Breaking(io.BytesIO):
    """An object whose connection breaks now and then, or for good."""

    def __init__(self, data, breaks):
        super().__init__(data)
        self._breaks = breaks

    def read(self, size=-1):
        if self._breaks and self.tell() >= self._breaks[0]:
            self._breaks.pop(0)
            raise ConnectionResetError(104, "Connection reset by peer")
        return super().read(min(size, 40))


@pytest.mark.parametrize("name", ["text-00.txt", "text-01.txt.gz"])
@pytest.mark.parametrize("num_breaks", [3, 60])
def test_a_broken_connection_is_taken_up_at_its_byte(texts, name, num_breaks, monkeypatch):
    monkeypatch.setattr(retries, "FIRST_WAIT_SECS", 0.0)
    monkeypatch.setattr(files, "BLOCK_BYTES", 100)
    path = f"{texts}/{name}"
    breaks = [0, 0] + [20] * (num_breaks - 2)
    data = epath.Path(path).read_bytes()
    monkeypatch.setattr(Driver, "_open", lambda *_, **__: _Breaking(data, breaks))
    corpus = Corpus(CorpusConfig(source="text", paths=[path]))
    if num_breaks == 3:
        assert [piece.text for piece in corpus.pieces()] == [TEXTS[name.removesuffix(".gz")]]
        assert not breaks
        return
    with pytest.raises(TryAgain) as caught:
        list(corpus.pieces())
    (line,) = caught.value.messages
    assert line.startswith(f"{path}, byte ") and line.endswith("the same command continues")
    assert "the connection broke 5 times" in line
    assert caught.value.exit_code == PREEMPTED


def test_tokenize_from_and_to_a_bucket(texts, bucket, objects, tmp_path, capsys):
    """The tokens of the same texts here; a dry run before, which writes nothing."""
    for name, text in TEXTS.items():
        (tmp_path / name).write_text(text)
    assert (
        main(["tokenize", *_tokenize_flags([f"{tmp_path}/*.txt"], f"workdir={tmp_path}/run")]) == 0
    )
    given = f"{bucket}/given/tokenizer.json"
    (trained,) = (tmp_path / "run/artifacts/tokenizer").iterdir()
    epath.Path(given).write_bytes((trained / "tokenizer.json").read_bytes())
    objects.written.clear()
    flags = _tokenize_flags([f"{texts}/text-*"], f"tokenizer.path={given}")
    flags += ["--workdir", f"{bucket}/run"]
    capsys.readouterr()
    assert main(["tokenize", "--dry-run", *flags]) == 0
    plan = capsys.readouterr().out
    assert f"# plan for workdir {bucket}/run" in plan and "will be made" in plan
    assert not objects.written
    assert main(["tokenize", *flags]) == 0
    written = yaml.safe_load(epath.Path(f"{bucket}/run/config.yaml").read_text())
    assert written["workdir"] == f"{bucket}/run" and written["tokenizer"]["path"] == given
    here, there = (
        RunRecord.read(run).artifact("tokens", "the run")
        for run in (f"{tmp_path}/run", f"{bucket}/run")
    )
    assert here.load().counts == there.load().counts
    for split in SPLITS:
        assert_same(here.path / split, there.path / split, ["token", "document_offset"])
    objects.written.clear()
    capsys.readouterr()
    assert main(["tokenize", *flags]) == 0
    assert f"{there.title}: complete" in capsys.readouterr().out and not objects.written
    assert main(["tokenize", "--rebuild", *flags]) == 0
    assert_same(here.path / "train", there.path / "train", ["token"])
