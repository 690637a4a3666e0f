"""Which memory training goes on with after text was appended, and which rows are new to it."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlpmem_jax.errors import ArtifactError, ConfigError
from mlpmem_jax.pipeline.changed import finished_memory_of, memory_before
from mlpmem_jax.pipeline.continuing import new_rows
from mlpmem_jax.pipeline.corpus_record import Change, CorpusRecord
from mlpmem_jax.pipeline.execute import record, write_config
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.stage import Stage
from mlpmem_jax.store.joined import Rows
from mlpmem_jax.store.manifest import Artifact, Completion
from mlpmem_jax.store.run_record import RunRecord

APPENDED = CorpusRecord(changes=(Change("append"),))


def _rows(root: Path, name: str, rows: int | Rows, **recipe: Any) -> Artifact:
    recipe = {"split": "train", "name": name, **recipe}
    artifact = Artifact.of(root, "datastore", recipe, label="datastore/train")
    artifact.begin({})
    artifact.finish(counts={"rows": rows} if isinstance(rows, int) else rows.counts())
    return artifact


def _memory(root: Path, *made_from: Artifact) -> Artifact:
    artifact = Artifact.of(root, "memory", {}, made_from, "memory")
    artifact.begin({one.relative: one.load().fingerprint for one in made_from})
    artifact.finish()
    return artifact


def _run(root: Path, train: Artifact, corpus: CorpusRecord = APPENDED) -> Any:
    return SimpleNamespace(store=root, workdir=root, corpus=corpus, datastore=lambda _: train)


def test_rows_are_new_that_the_memory_was_not_trained_on(tmp_path):
    first, one, two = (_rows(tmp_path, name, size) for name, size in (("a", 5), ("b", 2), ("c", 1)))
    memory = _memory(tmp_path, _rows(tmp_path, "valid", 3, split="valid"), first)
    both = Rows.of(first).followed_by(Rows.of(one))
    grown = _rows(tmp_path, "all", both.followed_by(Rows.of(two)))
    assert np.flatnonzero(new_rows(_run(tmp_path, grown), memory)).tolist() == [5, 6, 7]
    # After another training, only what came last is new.
    later = _memory(tmp_path, _rows(tmp_path, "both", both))
    assert np.flatnonzero(new_rows(_run(tmp_path, grown), later)).tolist() == [7]


def test_after_compacting_the_copied_rows_are_known(tmp_path):
    first, one = (_rows(tmp_path, name, size) for name, size in (("a", 5), ("b", 2)))
    copy = _rows(tmp_path, "copy", 5, compacted=first.relative)
    grown = _rows(tmp_path, "all", Rows.of(copy).followed_by(Rows.of(one)))
    corpus = dataclasses.replace(APPENDED, start={"datastore/train": copy.relative})
    found = new_rows(_run(tmp_path, grown, corpus), _memory(tmp_path, first))
    assert np.flatnonzero(found).tolist() == [5, 6]


def test_a_memory_that_cannot_go_on_is_refused(tmp_path):
    first, one = (_rows(tmp_path, name, size) for name, size in (("a", 5), ("b", 2)))
    memory = _memory(tmp_path, first)
    with pytest.raises(ConfigError, match="no text was appended since .*memory.* was trained"):
        new_rows(_run(tmp_path, first), memory)
    fewer = Rows.of(first).kept(np.arange(5) != 2).followed_by(Rows.of(one))
    with pytest.raises(ConfigError, match="trained on 1 rows that were removed since"):
        new_rows(_run(tmp_path, _rows(tmp_path, "fewer", fewer)), memory)
    online = _memory(tmp_path, _rows(tmp_path, "valid", 3, split="valid"))
    with pytest.raises(ArtifactError, match="not trained on stored rows"):
        new_rows(_run(tmp_path, one), online)
    with pytest.raises(ConfigError, match="and no text was appended in"):
        memory_before(_run(tmp_path, first, CorpusRecord()))
    with pytest.raises(ConfigError, match="no finished memory before its text was changed last"):
        memory_before(_run(tmp_path, first))


def test_a_command_that_ends_after_a_change_leaves_todays_roles(tiny_config):
    run = Artifacts(tiny_config)
    old = _rows(run.store, "old", 5)
    memory = _memory(run.store, old)
    stage = Stage(artifact=memory, build=Completion)
    write_config(run)
    record(run, [stage])
    roles = {"datastore/train": old.relative, "memory": memory.relative}
    assert RunRecord.read(run.workdir).roles == roles
    # The text is changed by another command; a memory is trained on the new rows.
    APPENDED.write(run.workdir)
    now = Artifacts(tiny_config)
    today = _memory(now.store, _rows(now.store, "new", 7))
    record(now, [Stage(artifact=today, build=Completion)])
    roles = RunRecord.read(run.workdir).roles
    assert roles["memory"] == today.relative
    # The command that began before ends now.
    record(run, [stage])
    late = {"memory [before change 1]": memory.relative}
    assert RunRecord.read(run.workdir).roles == {**roles, **late}
    # A change that found no finished memory is followed by that one.
    assert memory_before(now).relative == memory.relative
    assert finished_memory_of(now) == today.relative
