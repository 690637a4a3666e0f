"""run.json: several commands at once in one work directory."""

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from etils import epath

from mlpmem_jax.config.schema import Config
from mlpmem_jax.pipeline import artifacts
from mlpmem_jax.pipeline.corpus_record import Change, CorpusRecord
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.store import file_lock, lock, run_record
from mlpmem_jax.store.checked_json import read_checked_json
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.run_record import FILE, RUNS, RunRecord, store_of

WRITERS = 6


def test_commands_at_once_lose_no_role_of_each_other(tmp_path, monkeypatch):
    """Each waits between reading and writing, so that without a lock the others' roles go."""
    write = RunRecord._write

    def slow(record):
        time.sleep(0.02)
        write(record)

    monkeypatch.setattr(RunRecord, "_write", slow)
    together = threading.Barrier(WRITERS)

    def command(number):
        together.wait(timeout=60)
        for split in ("train", "valid"):
            RunRecord.update(tmp_path, None, {f"{split}{number}": "a/b"}, {f"{number}": split})

    with ThreadPoolExecutor(WRITERS) as pool:
        list(pool.map(command, range(WRITERS)))
    record = RunRecord.read(tmp_path)
    assert record.roles.keys() == {f"{s}{n}" for s in ("train", "valid") for n in range(WRITERS)}
    assert record.sources == {f"{number}": "valid" for number in range(WRITERS)}
    (registered,) = (store_of(tmp_path, None) / RUNS).iterdir()
    assert read_checked_json(registered)["roles"] == record.roles
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifacts", FILE]


def test_what_is_known_is_not_locked(tmp_path, monkeypatch):
    """A finished run on a disk that cannot be written."""
    RunRecord.update(tmp_path, None, {"memory": "memory/1"}, {})
    taken = []

    @contextlib.contextmanager
    def noted(file):
        taken.append(epath.Path(file).name)
        yield

    monkeypatch.setattr(run_record, "only_writer", noted)
    RunRecord.update(tmp_path, None, {"memory": "memory/1"}, {})
    assert taken == []
    RunRecord.update(tmp_path, None, {"memory": "memory/2"}, {})
    assert taken == [FILE] and RunRecord.read(tmp_path).roles == {"memory": "memory/2"}


def test_where_nothing_can_be_locked_one_warning_says_so(tmp_path, monkeypatch, capsys):
    """Of the store; the work directory, which holds it, need not be named too."""
    monkeypatch.setattr(file_lock, "has_locks", lambda path: False)
    monkeypatch.setattr(lock, "_warned", set())
    with lock.only_maker(Artifact(store_of(tmp_path, None), "memory/1", "memory")):
        RunRecord.update(tmp_path, None, {"memory": "memory/1"}, {})
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {tmp_path}/artifacts: this file system does not lock files")
    assert RunRecord.read(tmp_path).roles == {"memory": "memory/1"}


def test_what_compact_made_is_not_removed_whatever_run_json_says(tmp_path):
    """A `train` that began before `compact` writes the roles that it read when it ends."""
    run = Artifacts(Config(workdir=str(tmp_path)))
    start = {role: role.replace("train", "made") for role in ("datastore/train", "neighbors/train")}
    for relative in (*start.values(), "memory/of-before", "memory/other"):
        one = Artifact(run.store, relative, relative.split("/")[0])
        one.begin({})
        one.finish()
    RunRecord.update(tmp_path, None, {"memory": "memory/of-before"}, {})
    CorpusRecord({"decoder": "d"}, start).write(tmp_path)

    def left():
        artifacts.main(run, Options(str(tmp_path), remove_unused=True))
        return {f"{one.parent.name}/{one.name}" for one in run.store.glob("[a-z]*/*")}

    assert left() == {*start.values(), "memory/of-before"}
    # The next change has lists of its own; the rows are still read.
    CorpusRecord({"decoder": "d"}, start, (Change("remove"),)).write(tmp_path)
    assert left() == {start["datastore/train"], "memory/of-before"}
