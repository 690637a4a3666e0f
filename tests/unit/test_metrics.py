"""Metrics against numbers worked out by hand, and the log of a training run in a bucket."""

import dataclasses
import json
import math
import threading

import numpy as np
import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from tensorboardX.proto.event_pb2 import Event

from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.evaluation import metrics
from mlpmem_jax.training import uploads
from mlpmem_jax.training.metrics import metrics_log

SEPARATOR = 0
# Three documents: "0 5 6 7", "0", "0 8 9". Row n predicts token n + 1.
TOKENS = np.array([0, 5, 6, 7, 0, 0, 8, 9])
OFFSETS = np.array([0, 4, 5, 8])
LABELS = TOKENS[1:]
WORDS = np.array([2, 0, 1])
BYTES = np.array([10, 0, 6])


def _counts() -> metrics.DocumentCounts:
    return metrics.count_documents(LABELS, SEPARATOR, OFFSETS, WORDS, BYTES)


def test_labels_belong_to_the_document_that_holds_them():
    counts = _counts()
    assert counts.document_N.tolist() == [0, 0, 0, -1, -1, 2, 2]
    assert counts.tokens_D.tolist() == [3, 0, 2]
    assert counts.totals == {"documents": 3, "tokens": 5, "words": 3, "bytes": 16}


def test_uneven_documents_count_for_fewer():
    counts = _counts()
    assert counts.effective_sample_size == pytest.approx(25 / 13)
    assert counts.largest_share == pytest.approx(0.6)
    assert counts.summary["documents"] == 3

    def notes(*tokens: int) -> list[str]:
        split = dataclasses.replace(counts, tokens_D=np.array(tokens))
        return metrics.document_notes(split, split)

    even = [50] * 40
    assert not notes(*even)
    few, chosen = notes(*even[:12])
    assert few == "warning: the test split has only 12 documents; the intervals are optimistic"
    assert chosen == (
        "warning: the effective sample size of validation is 12.0; λ and τ are poorly determined"
    )
    # 2,000 and 1,000 tokens: 9e6 / (40 · 2,500 + 1e6).
    uneven, _ = notes(*even, 1000)
    assert uneven == (
        "warning: the test split has 41 documents but an effective sample size of 8.2 (the largest "
        "holds 33 % of its tokens); the intervals are optimistic"
    )


def test_documents_of_one_file_are_one_cluster():
    """Files 4 and 9 hold documents 0 and 2; document 1 has no token and counts for none."""
    counts = dataclasses.replace(_counts(), file_D=np.array([4, 7, 9]))
    assert counts.cluster_D.tolist() == [0, -1, 1] and counts.num_clusters == 2
    assert counts.tokens_C.tolist() == [3, 2]
    assert counts.scored_cluster_N.tolist() == [0, 0, 0, 1, 1]
    assert counts.by_cluster(np.array([[1.0, 2], [0, 0], [3, 4]])).tolist() == [[1, 2], [3, 4]]
    tokens_D, file_D = np.full(40, 50), np.repeat(np.arange(4), [30, 5, 3, 2])
    cut = dataclasses.replace(counts, tokens_D=tokens_D, file_D=file_D)
    # 40² / (30² + 5² + 3² + 2²).
    assert cut.effective_sample_size == pytest.approx(1600 / 938)
    assert cut.summary["largest_cluster_share"] == 0.75 and cut.summary["files"] == 4
    test, valid = metrics.document_notes(cut, cut)
    assert test == (
        "warning: the test split has 40 documents from 4 files but an effective sample size of 1.7 "
        "(the largest file holds 75 % of its tokens); the intervals are optimistic"
    )
    assert "the effective sample size of validation is 1.7" in valid
    one = dataclasses.replace(cut, file_D=np.zeros(40, np.int64))
    assert metrics.document_notes(one)[0] == (
        "warning: the test split has 40 documents from 1 file: there are no intervals"
    )
    alone = [note for note in metrics.document_notes(cut, one) if "held fixed" in note]
    assert alone == [
        "warning: validation has 40 documents from 1 file: λ is held fixed in the intervals"
    ]


def test_scores_of_a_worked_example():
    nats_N = np.array([1.0, 2.0, 3.0, 50.0, 60.0, 0.5, 1.5])  # separators are not scored
    counts = _counts()
    nats_D = counts.sum_by_document(nats_N)
    assert nats_D.tolist() == [6.0, 0.0, 2.0]
    result = metrics.score(nats_D, counts)
    assert tuple(result) == metrics.QUALITY
    assert result["token_perplexity"] == pytest.approx(math.exp(8 / 5))
    assert result["word_perplexity"] == pytest.approx(math.exp(8 / 3))
    assert result["bits_per_byte"] == pytest.approx(8 / (16 * math.log(2)))


def test_a_separator_inside_a_document_is_not_scored():
    labels = LABELS.copy()
    labels[1] = SEPARATOR
    counts = metrics.count_documents(labels, SEPARATOR, OFFSETS, WORDS, BYTES)
    assert counts.tokens_D.tolist() == [2, 0, 2]


def test_rows_that_do_not_cover_the_documents_are_refused():
    with pytest.raises(ArtifactError, match="5 rows do not cover the documents' 8 tokens"):
        metrics.count_documents(LABELS[:5], SEPARATOR, OFFSETS, WORDS, BYTES, name="test")


def test_documents_of_other_tokens_are_refused():
    with pytest.raises(ArtifactError, match="does not begin with the separator"):
        metrics.count_documents(LABELS, 3, OFFSETS, WORDS, BYTES)


def test_no_words_and_overflow_are_not_errors():
    counts = metrics.count_documents(
        np.array([5, 6]), SEPARATOR, np.array([0, 3]), np.array([0]), np.array([4])
    )
    result = metrics.score(np.array([5000.0]), counts)
    assert math.isnan(result["word_perplexity"])
    assert result["token_perplexity"] == math.inf


class Bucket(MemoryFileSystem):
    """Stands in for S3: objects in memory, written whole."""

    protocol = "s3"
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol("memory://" + path.removeprefix("s3://"))


class Uploaded:
    """Counts what goes to the bucket, which can be out of reach.

    Attributes:
        sizes: Of each object that was written.
        reachable: Whether it can be written now.
    """

    def __init__(self):
        self.sizes = []
        self.reachable = threading.Event()
        self.reachable.set()

    def __call__(self, path, data):
        assert str(path).startswith("s3://")
        if not self.reachable.is_set():
            raise OSError("the bucket is out of reach")
        self.sizes.append(len(data))
        path.write_bytes(data)


@pytest.fixture
def bucket(monkeypatch):
    """A folder in an empty bucket, and a counter of what is uploaded."""
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: Bucket())
    uploaded = Uploaded()
    monkeypatch.setattr(uploads, "write_bytes", uploaded)
    return epath.Path("s3://bucket/run/metrics"), uploaded


def _steps(directory):
    """The steps that a reader finds who puts all pieces one behind the other."""
    pieces = uploads.pieces_of(directory / "metrics.jsonl")
    lines = b"".join(piece.read_bytes() for piece in pieces).splitlines()
    return [json.loads(line)["step"] for line in lines]


def _scalars(directory):
    found = []
    names = sorted(path.name for path in directory.iterdir() if "tfevents" in path.name)
    data = b"".join((directory / name).read_bytes() for name in names)
    while data:
        length = int.from_bytes(data[:8], "little")
        event = Event.FromString(data[12 : 12 + length])
        found += [(value.tag, event.step) for value in event.summary.value]
        data = data[12 + length + 4 :]
    return found


def _sent(log):
    """Flushes, and waits until the additions have arrived."""
    log.flush()
    log._uploads._running.result()


def test_a_bucket_gets_a_line_a_few_times_and_not_at_each_further_line(bucket):
    directory, uploaded = bucket
    log = metrics_log(directory, 0)
    count = 128
    for step in range(1, count + 1):
        log.write(step, {"loss": 1 / step, "grad_norm": math.inf})
        if step % 2 == 0:
            _sent(log)
            assert _steps(directory) == list(range(1, step + 1))
    pieces = len(list(directory.iterdir()))
    assert pieces <= 2 * (1 + math.log2(count))
    log.close()
    assert _steps(directory) == list(range(1, count + 1))
    assert _scalars(directory) == [(n, s) for s in range(1, 129) for n in ("loss", "grad_norm")]
    files = {path.name: len(path.read_bytes()) for path in directory.iterdir()}
    assert len(files) == 2 and "metrics.jsonl" in files
    # Whole files at each flush would be 32 times as much.
    assert sum(uploaded.sizes) < (2 + math.log2(count)) * sum(files.values())


def test_lines_are_sent_once_a_minute(bucket, monkeypatch):
    directory, uploaded = bucket
    now = [1000.0]
    monkeypatch.setattr(uploads.time, "monotonic", lambda: now[0])
    log = metrics_log(directory, 0)
    begun = len(uploaded.sizes)
    for step in range(1, 60):
        now[0] += 1
        log.write(step, {"loss": 1.0})
        log.poll()
    assert len(uploaded.sizes) == begun and _steps(directory) == []
    now[0] += 1
    log.poll()  # Without a further line too.
    log._uploads._running.result()
    assert _steps(directory) == list(range(1, 60))
    sent = len(uploaded.sizes)
    now[0] += 61
    log.poll()  # There is nothing new.
    log.close()
    assert len(uploaded.sizes) == sent


def test_a_killed_run_goes_on_and_drops_what_it_repeats(bucket):
    directory, _ = bucket
    log = metrics_log(directory, 0)
    for step in range(1, 12):
        log.write(step, {"loss": float(step)})
        _sent(log)
    # Killed while pieces were merged: the second still stands beside the first, which holds it.
    first, second = uploads.pieces_of(directory / "metrics.jsonl")[:2]
    first.write_bytes(first.read_bytes() + second.read_bytes())
    again = metrics_log(directory, 8)
    assert _steps(directory) == list(range(1, 9))
    again.write(9, {"loss": -9.0})
    again.close()
    assert _steps(directory) == list(range(1, 10))
    (file,) = uploads.pieces_of(directory / "metrics.jsonl")
    assert json.loads(file.read_text().splitlines()[-1]) == {"step": 9, "loss": -9.0}


def test_a_bucket_out_of_reach_holds_up_nothing_and_loses_nothing(bucket, capsys):
    directory, uploaded = bucket
    log = metrics_log(directory, 0)
    uploaded.reachable.clear()
    log.write(1, {"loss": 1.0})
    log.flush()
    assert log._uploads._running.exception() is not None
    log.write(2, {"loss": 2.0})
    uploaded.reachable.set()
    _sent(log)
    assert "metrics were not uploaded, which is tried again: the bucket" in capsys.readouterr().err
    assert _steps(directory) == [1, 2]
    log.write(3, {"loss": 3.0})
    uploaded.reachable.clear()
    with pytest.raises(OSError, match="out of reach"):
        log.close()


def test_a_local_log_is_there_at_once(tmp_path):
    log = metrics_log(epath.Path(tmp_path), 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0})
        assert _steps(epath.Path(tmp_path)) == list(range(1, step + 1))
    log.close()
    assert _scalars(epath.Path(tmp_path)) == [("loss", 1), ("loss", 2), ("loss", 3)]
    metrics_log(epath.Path(tmp_path), 2).close()
    assert _steps(epath.Path(tmp_path)) == [1, 2]


@pytest.mark.parametrize("place", ["bucket", "folder"])
def test_an_attempt_from_the_beginning_removes_what_the_one_before_logged(bucket, tmp_path, place):
    """TensorBoard would join both to one curve; one that is continued keeps what it has."""
    directory = bucket[0] if place == "bucket" else epath.Path(tmp_path / "metrics")

    def attempt(start, steps):
        log = metrics_log(directory, start)
        for step in steps:
            log.write(step, {"loss": 1.0})
        log.close()

    attempt(0, range(1, 5))
    (directory / "notes.txt").write_text("mine")
    attempt(0, range(1, 3))
    assert _steps(directory) == [1, 2] and _scalars(directory) == [("loss", 1), ("loss", 2)]
    attempt(2, range(3, 5))
    assert _steps(directory) == [1, 2, 3, 4]
    assert sorted(_scalars(directory)) == [("loss", step) for step in (1, 2, 3, 4)]
    assert (directory / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("damaged", [b"\xff\x00{", b'{"loss": 1.0}', b"[2]", b'{"step": "2"}'])
def test_a_damaged_line_is_left_out_and_named_and_those_after_it_stay(tmp_path, damaged, capsys):
    log = metrics_log(epath.Path(tmp_path), 0)
    for step in (1, 2, 3):
        log.write(step, {"loss": 1.0})
    log.close()
    file = tmp_path / "metrics.jsonl"
    lines = file.read_bytes().splitlines()
    file.write_bytes(b"\n".join([lines[0], damaged, lines[2], b'{"step": 3, "lo']))
    metrics_log(epath.Path(tmp_path), 3).close()
    assert _steps(epath.Path(tmp_path)) == [1, 3]
    assert capsys.readouterr().err == f"warning: {file}: line 2 is damaged; it is left out\n"


def test_metrics_of_somebody_else_are_not_written_over(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"loss": 1.0}\n')
    for step in (0, 2):
        with pytest.raises(ArtifactError, match="metrics.jsonl: not written by this program"):
            metrics_log(epath.Path(tmp_path), step)
    assert file.read_text() == '{"loss": 1.0}\n'
