"""append, remove, compact: as if everything had been made anew, and nothing old is touched."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlpmem_jax.corpus.stream import Corpus
from mlpmem_jax.corpus.tokenizer import load_tokenizer
from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.corpus.train_documents import TrainDocuments, id_of
from mlpmem_jax.pipeline.changed_stages import segment_corpus
from mlpmem_jax.pipeline.corpus_record import CorpusRecord
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.tasks import run_data
from mlpmem_jax.retrieval.index_builder import ExactCache
from mlpmem_jax.retrieval.search import Search, keep_neighbors
from mlpmem_jax.retrieval.targets import TargetInputs, make_train_targets
from mlpmem_jax.store.array_specs import SPLITS, Split
from mlpmem_jax.store.joined import Rows
from mlpmem_jax.store.manifest import Artifact
from tests.pipeline.changing import (
    arrays,
    artifacts,
    call,
    make_base,
    searched,
    write_base,
    write_documents,
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a run with targets; its folder is copied, not changed."""
    config = write_base(tmp_path_factory.mktemp("base"))
    make_base(config)
    return config


@pytest.fixture
def config(base: Path, tmp_path: Path) -> Path:
    """The same in a folder of its own."""
    folder = Path(shutil.copytree(base.parent, tmp_path / "copy"))
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace(str(base.parent), str(folder)))
    return folder / "config.yaml"


def _files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes())
        for path in sorted((folder / "artifacts").rglob("*"))
        if path.is_file() and ".runs" not in path.parts
    }


def _rebuilt(run: Artifacts, folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Searches every row of every split among all training rows; makes the targets from that."""
    config, train = run.config, run.datastore("train")
    exact = ExactCache(train, config.retrieval, config.mesh)
    search = Search(train, None, exact, config.retrieval, config.seed, run.tokens)
    found: dict[str, Artifact] = {}
    for split in SPLITS:
        found[split] = Artifact(folder, f"neighbors/{split}", "neighbors")
        found[split].begin({})
        done = keep_neighbors(found[split], run.datastore(split), split, config.datastore, search)
        found[split].finish(counts=done.counts, arrays=done.arrays)
    targets = Artifact(folder, "targets/train", "targets")
    targets.begin({})
    inputs = TargetInputs(
        run.tokens, run.datastore("valid"), found["valid"], config.targets, config.datastore
    )
    done = make_train_targets(targets, inputs, search, found["train"])
    targets.finish(counts=done.counts, arrays=done.arrays)
    return {name: arrays(one) for name, one in {**found, "targets": targets}.items()}


def _same_as_rebuilt(run: Artifacts, folder: Path) -> None:
    for name, expected in _rebuilt(run, folder).items():
        artifact = run.targets("train") if name == "targets" else run.neighbors(_split(name))
        found = arrays(artifact)
        assert found.keys() == expected.keys()
        for array, values in expected.items():
            np.testing.assert_array_equal(found[array], values, err_msg=f"{name} {array}")


def _split(name: str) -> Split:
    return next(split for split in SPLITS if split == name)


def test_appending_equals_a_rebuild_and_touches_nothing(
    config: Path, capsys: pytest.CaptureFixture[str]
):
    before, first = _files(config.parent / "run"), artifacts(config)
    old_rows = int(first.datastore("train").load().counts["rows"])
    write_documents(config.parent / "new", range(100, 104))
    assert call("append", config, "--text", f"{config.parent}/new/*.txt") == 0
    shown = capsys.readouterr().out
    run = artifacts(config)
    rows = arrays(run.datastore("train"))
    new_rows = int(run.segment.load().counts["rows"])
    assert len(rows["label"]) == old_rows + new_rows
    assert f"append: {new_rows:,} of {old_rows + new_rows:,} training rows embedded" in shown
    # What was there is the same to the byte, and has not been written again.
    after = _files(config.parent / "run")
    assert before.items() <= after.items()
    for role in ("tokenizer", "tokens", "decoder"):
        assert getattr(run, role).relative == getattr(first, role).relative
    assert run.before.datastore("train").relative == first.datastore("train").relative
    _same_as_rebuilt(run, config.parent / "rebuilt")
    plain = searched(rows["key"], rows["key"], 12, own=True)
    found = arrays(run.neighbors("train"))
    np.testing.assert_array_equal(found["row"], plain["row"])
    np.testing.assert_allclose(found["distance"], plain["distance"], rtol=1e-6)
    assert (found["row"][:old_rows] >= old_rows).any()  # Old rows have new neighbours.
    # A second segment, which repeats a document of the first, of the base and of another split.
    write_documents(config.parent / "more", [*range(103, 106), *range(40)])
    assert call("append", config, "--text", f"{config.parent}/more/*.txt") == 0
    second = artifacts(config)
    counts = second.segment_tokens.load().counts
    assert counts["train_documents"] == 2 and counts["duplicate_documents"] == 41
    assert counts["copied_documents"] > 0
    assert after.items() <= _files(config.parent / "run").items()
    _same_as_rebuilt(second, config.parent / "rebuilt-2")
    # Where the lists of before are gone, everything is searched, and the same is found.
    lists = arrays(second.neighbors("train"))
    assert call("artifacts", config, "--remove-unused") == 0
    assert not second.before.neighbors("train").path.exists()
    assert call("retrieve", config, "--rebuild") == 0
    for name, values in arrays(second.neighbors("train")).items():
        np.testing.assert_array_equal(values, lists[name])
    # And the commands that follow take what there is now.
    capsys.readouterr()
    for command in ("embed", "index", "retrieve"):
        assert call(command, config) == 0
    assert "making" not in capsys.readouterr().out


def _code(number: int) -> str:
    """What only the document of this number holds; see `write_documents`."""
    return f"zq{number}x{number}zq"


def _holds(ids: np.ndarray, sought: list[int]) -> bool:
    windows = np.lib.stride_tricks.sliding_window_view(ids, len(sought))
    return bool((windows == np.asarray(sought)).all(axis=1).any())


def _is_trained_on(run: Artifacts, sought: list[int]) -> bool:
    """Whether any window of training rows holds tokens, as labels or as recent tokens."""
    rows = run_data(run, "train").stored_rows("train", 32)
    batch = rows.read(np.arange(rows.num_windows))
    own_token = batch["recent"][..., 0].reshape(-1)
    return _holds(own_token, sought) or _holds(batch["label"].reshape(-1), sought)


def _train_file(run: Artifacts, folder: Path) -> Path:
    """Returns a file of the base whose document is trained on, and is not the last."""
    corpus = run.config.corpus
    digests = TrainDocuments.of(run.datastore("train"), run.tokens).digest[1:-1].tolist()
    for file in sorted((folder / "base").glob("*.txt"))[10:]:
        (piece,) = Corpus(segment_corpus(corpus, (str(file),))).pieces()
        if piece.digest in digests:
            return file
    raise AssertionError("no such file")


def test_a_removed_document_is_nowhere_and_compacting_changes_nothing(
    config: Path, capsys: pytest.CaptureFixture[str]
):
    folder = config.parent
    write_documents(folder / "new", range(100, 104))
    assert call("append", config, "--text", f"{folder}/new/*.txt") == 0
    first = artifacts(config)
    file = _train_file(first, folder)
    tokenizer = load_tokenizer(first.tokenizer)
    encoded = tokenizer.encode([_code(number) for number in (int(file.stem), 101, 102)])
    *sought, kept = ([int(token) for token in one] for one in encoded)
    assert all(_is_trained_on(first, one) for one in [*sought, kept])
    appended = TrainDocuments.of_tokens(_opened(first.segment_tokens))
    assert len(appended.digest) == 4
    texts = Corpus(segment_corpus(first.config.corpus, (str(folder / "new" / "101.txt"),)))
    (piece,) = texts.pieces()
    old = arrays(first.neighbors("train"))["row"]
    assert call("remove", config, "--documents", str(file), "--documents", id_of(piece.digest)) == 0
    run = artifacts(config)
    rows, found = arrays(run.datastore("train")), arrays(run.neighbors("train"))
    documents = TrainDocuments.of(run.datastore("train"), run.tokens)
    before = TrainDocuments.of(first.datastore("train"), first.tokens)
    assert len(documents.digest) == len(before.digest) - 2
    assert piece.digest not in documents.digest
    assert len(rows["label"]) < len(old) and found["row"].max() < len(rows["label"])
    assert not any(_is_trained_on(run, one) for one in sought)
    assert _is_trained_on(run, kept)
    assert not _holds(rows["label"], sought[0])
    _same_as_rebuilt(run, folder / "rebuilt")
    # Most lists are kept: those without a removed neighbour.
    searched_again = run.neighbors("train").load().measured["searched_among_all"]
    is_gone = np.ones(len(old), bool)
    is_gone[first_rows_kept(first, run)] = False
    touched = (is_gone[np.maximum(old, 0)] & (old >= 0)).any(axis=1)[~is_gone]
    assert searched_again == touched.sum() < len(rows["label"])
    # Compacted: the same numbers in one artifact; what was copied can be removed.
    targets = arrays(run.targets("train"))
    assert call("compact", config) == 0
    last = artifacts(config)
    assert last.datastore("train").relative != run.datastore("train").relative
    for name, values in arrays(last.datastore("train")).items():
        np.testing.assert_array_equal(values, rows[name])
    for split in SPLITS:
        for name, values in arrays(last.neighbors(split)).items():
            np.testing.assert_array_equal(values, arrays(run.neighbors(split))[name])
    for name, values in arrays(last.targets("train")).items():
        np.testing.assert_array_equal(values, targets[name])
    assert call("artifacts", config, "--remove-unused") == 0
    assert not first.segment.path.exists() and not first.before.datastore("train").path.exists()
    # And on: the same document may come again, and everything is as if made anew.
    assert call("append", config, "--text", f"{folder}/new/101.txt") == 0
    again = artifacts(config)
    assert _is_trained_on(again, sought[1]) and not _is_trained_on(again, sought[0])
    _same_as_rebuilt(again, folder / "rebuilt-2")
    capsys.readouterr()
    assert call("train", config) == 0
    assert call("evaluate", config) == 0
    assert "memory" in capsys.readouterr().out


def _opened(tokens: Artifact) -> TokenSplit:
    return TokenSplit.open(tokens, "train")


def first_rows_kept(first: Artifacts, run: Artifacts) -> np.ndarray:
    """Returns the rows before that are still there, by their numbers before."""
    return Rows.of(run.datastore("train")).numbers_in(Rows.of(first.datastore("train")))


KILLS = [
    ("mlpmem_jax.store.appender.Appender.append", 4, "tokens/segment-1"),
    ("mlpmem_jax.store.shards.write_rows", 2, "datastore/segment-1"),
    ("mlpmem_jax.store.manifest.Artifact.finish", 3, "datastore/train"),
    ("mlpmem_jax.store.shards.write_rows", 9, "neighbors"),
    ("mlpmem_jax.pipeline.corpus_record.CorpusRecord.write", 1, "the record"),
]


def _process(config: Path, *words: str, kill: tuple[str, int] = ("os.getpid", 0)):
    here = Path(__file__).resolve().parent
    killed = [sys.executable, str(here / "killed.py"), kill[0], str(kill[1]), "before"]
    environment = os.environ | {"PYTHONPATH": str(here.parents[1])}
    return subprocess.Popen(
        [*killed, words[0], "--config", str(config), *words[1:]],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_killed_append_changes_nothing_and_continues(config: Path, tmp_path: Path):
    folder = config.parent
    write_documents(folder / "new", range(100, 104))
    words = ("append", "--text", f"{folder}/new/*.txt")
    for function, call_number, _ in KILLS:
        process = _process(config, *words, kill=(function, call_number))
        process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL
        assert CorpusRecord.read(folder / "run") == CorpusRecord()
    assert call(*words[:1], config, *words[1:]) == 0
    run = artifacts(config)
    assert len(run.corpus.changes) == 1
    _same_as_rebuilt(run, tmp_path / "rebuilt")
    # So it is with the other changes.
    for number, words in enumerate(
        (("remove", "--documents", f"{folder}/new/101.txt"), ("compact",)), start=1
    ):
        record = CorpusRecord.read(folder / "run")
        process = _process(config, *words, kill=("mlpmem_jax.store.shards.write_rows", 9))
        process.communicate(timeout=300)
        assert process.returncode == -signal.SIGKILL
        assert CorpusRecord.read(folder / "run") == record
        assert call(words[0], config, *words[1:]) == 0
        assert CorpusRecord.read(folder / "run") != record
        _same_as_rebuilt(artifacts(config), tmp_path / f"rebuilt-{number}")


@pytest.mark.slow
def test_of_two_appends_at_once_none_is_lost(config: Path, tmp_path: Path):
    folder = config.parent
    write_documents(folder / "one", range(100, 102))
    write_documents(folder / "two", range(102, 104))
    both = [
        _process(config, "append", "--text", f"{folder}/{name}/*.txt") for name in ("one", "two")
    ]
    shown = [process.communicate(timeout=500)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], shown
    run = artifacts(config)
    assert len(run.corpus.changes) == 2
    documents = TrainDocuments.of(run.datastore("train"), run.tokens)
    first = run.before.before
    base = TrainDocuments.of(first.datastore("train"), first.tokens)
    assert len(documents.digest) == len(base.digest) + 4
    _same_as_rebuilt(run, tmp_path / "rebuilt")


def test_a_plan_makes_nothing(config: Path, capsys: pytest.CaptureFixture[str]):
    before = _files(config.parent / "run")
    write_documents(config.parent / "new", range(100, 102))
    capsys.readouterr()
    assert call("append", config, "--text", f"{config.parent}/new/*.txt", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert shown.count("complete; nothing to do") >= 3
    assert "tokens/segment-1" in shown and "will be made" in shown
    assert _files(config.parent / "run") == before
    assert not (config.parent / "run" / "corpus.json").exists()


def _refused(capsys: pytest.CaptureFixture[str], config: Path, *words: str) -> str:
    capsys.readouterr()
    assert call(words[0], config, *words[1:]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


def test_what_cannot_be_changed_is_refused_in_one_line(
    config: Path, capsys: pytest.CaptureFixture[str]
):
    folder = config.parent
    new = ("--text", f"{write_documents(folder / 'new', range(100, 102))[0]}")
    for words, expected in (
        (("append",), "append: which text?"),
        (("append", "--text", f"{folder}/none.txt"), "--text: .*none.txt.* does not exist"),
        (("append", *new, "corpus.attention=across"), "corpus.attention=across: states depend"),
        (("append", *new, "retrieval.keep_train=none"), "set retrieval.keep_train=all"),
        (("append", *new, "retrieval.exact_rows=9"), "set retrieval.exact_rows=all"),
        (("append", *new, "decoder.num_layers=3"), "datastore/train does not exist"),
        (
            ("append", *new, "tokenizer.vocab_size=299"),
            "not exist.*vocab_size=300, now 299",
        ),
        (("append", *new, "--rebuild"), "made once"),
        (("append", *new, "--text", f"{folder}/some.jsonl"), "append them one by one"),
        (("remove",), "remove: which documents?"),
        (("remove", "--documents", "0" * 16), f"not in the training text: {'0' * 16}; nothing"),
        (("remove", "--documents", f"{folder}/none.txt"), "--documents: .*none.txt"),
        (("remove", "--documents", "0" * 15), "--documents: .*0{15}"),
        (("remove", "--documents", f"{folder}/base/*.txt"), "some are in valid and test"),
        (("compact",), "nothing was appended or removed"),
    ):
        line = _refused(capsys, config, *words)
        assert re.search(expected, line), line
    assert not (folder / "run" / "corpus.json").exists()
    # And once the text has changed.
    assert call("append", config, *new) == 0
    record = CorpusRecord.read(folder / "run")
    for words, expected in (
        (("append", *new), "no new document"),
        (("retrieve", "tokenizer.vocab_size=299"), "corpus.json: .*tokenizer=.*, now"),
        (("append", *new, "decoder.num_layers=1"), "corpus.json: .*decoder=.*, now"),
        (("append", *new, "tokenizer.vocab_size=299"), "corpus.json: .*tokenizer=.*, now"),
        (("append", *new, "corpus.attention=across"), "corpus.attention=across"),
        (("remove", "--documents", "0" * 16), f"not in the training text: {'0' * 16}; nothing"),
        (("train", "train.inputs=online"), "train.inputs=online: the training text was changed"),
        (("analyze",), "analyze: the training text was changed"),
        (("compare",), "tables of several runs: the training text was changed"),
        (("search-quality",), "search-quality: the training text was changed"),
        (("cost", "cost.quality=train"), "cost.quality=train: the training text was changed"),
        (("evaluate-tasks", "tasks.model=rag"), "tasks.model=rag: the training text was changed"),
        (("search-quality", "targets.workdir=/a"), "targets.workdir=/a: search-quality makes"),
    ):
        line = _refused(capsys, config, *words)
        assert re.search(expected, line), line
    assert CorpusRecord.read(folder / "run") == record
    assert record.changes[0].kind == "append"
