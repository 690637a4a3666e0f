"""train.memory_start=checkpoint after `append`: the memory from before goes on, or is refused."""

import re
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.corpus.train_documents import TrainDocuments
from mlpmem_jax.parallel.mesh import make_mesh
from mlpmem_jax.pipeline import continuing, train
from mlpmem_jax.pipeline.changed import neighbors_of, rows_of, tokens_of
from mlpmem_jax.pipeline.evaluate import RESULTS
from mlpmem_jax.pipeline.execute import record
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.networks import finished_memory, starting_memory
from mlpmem_jax.store.files import read_json
from mlpmem_jax.store.run_record import RunRecord
from mlpmem_jax.training import loop
from tests.pipeline.changing import (
    arrays,
    artifacts,
    call,
    make_base,
    searched,
    write_base,
    write_documents,
)

CONTINUES = ("train.memory_start=checkpoint", "train.checkpoint_interval_steps=2")
SLOW = ("train.optimizer.learning_rate=1e-12", "train.optimizer.warmup_steps=0")
pytestmark = pytest.mark.slow


def _weights(run: Artifacts, *, before: bool = False) -> np.ndarray:
    from flax import nnx

    mesh = make_mesh(run.config.mesh)
    start = continuing.memory_before(run) if before else None
    memory = starting_memory(run, mesh, start) if before else finished_memory(run, mesh)
    leaves = jax.tree.leaves(nnx.state(memory, nnx.Param))
    return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in leaves])


def _refused(capsys: pytest.CaptureFixture[str], config: Path, *words: str) -> str:
    capsys.readouterr()
    assert call(words[0], config, *words[1:]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, lines
    return lines[0]


def _check_held_out(run: Artifacts) -> None:
    """The documents that are new are held out, and nothing of them is trained on."""
    (held,) = run.corpus.held_out
    digests = TokenSplit.open(tokens_of(run, held), "test").document_digest
    assert len(digests) == 3
    trained = TrainDocuments.of(run.datastore("train"), run.tokens).digest
    assert len(TokenSplit.open(run.segment_tokens, "train").document_digest) == 4
    assert not np.isin(digests, trained).any()
    key, query = (arrays(one)["key"] for one in (run.datastore("train"), rows_of(run, held)))
    found = arrays(neighbors_of(run, held))
    np.testing.assert_array_equal(found["row"], searched(query, key, 12, own=False)["row"])


def _check_scores(run: Artifacts, results: dict[str, Any], new: dict[str, Any]) -> None:
    """The nats of held-out text follow from its rows, λ and τ."""
    (held,) = run.corpus.held_out
    rows, found = arrays(rows_of(run, held)), arrays(neighbors_of(run, held))
    scored = rows["label"] != TokenSplit.open(run.tokens, "test").separator_id
    assert new["documents"] == 3 and new["tokens"] == scored.sum()
    decoder = rows["logprob"][scored].astype(np.float64)
    assert new["nats"]["decoder"] == pytest.approx(-decoder.mean(), rel=1e-6)
    knn = results["systems"]["knn"]
    weight = np.exp(-(found["distance"] - found["distance"][:, :1]) / knn["temperature"])
    label = arrays(run.datastore("train"))["label"][found["row"]]
    has_label = label == rows["label"][:, None]
    share = knn["interpolation"]
    mixed = share * (weight * has_label).sum(1) / weight.sum(1) + (1 - share) * np.exp(
        rows["logprob"]
    )
    assert new["nats"]["knn"] == pytest.approx(-np.log(mixed[scored]).mean(), rel=1e-5)
    # With λ = 0 the memory's would be the decoder's.
    share = results["systems"]["memory"]["interpolation"]
    assert (new["nats"]["memory"] == new["nats"]["decoder"]) == (share == 0)


def test_a_memory_goes_on_after_an_append(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    config = write_base(tmp_path)
    make_base(config)
    line = _refused(capsys, config, "train", *CONTINUES)
    assert re.search("continues the memory from before `append`, and no text was appended", line)
    assert call("train", config) == 0
    first = artifacts(config)
    write_documents(tmp_path / "new", range(100, 104))
    held_out = write_documents(tmp_path / "held-out", range(110, 113))
    shutil.copy(held_out[0], tmp_path / "new" / "110.txt")
    write_documents(tmp_path / "held-out", range(3))  # These the first text has already.
    words = ("--text", f"{tmp_path}/new/*.txt", "--held-out", f"{tmp_path}/held-out/*.txt")
    assert call("append", config, *words) == 0
    _check_held_out(artifacts(config))
    assert artifacts(config).corpus.changes[-1].memory == first.memory.relative

    # The new memory is made from the old one, by content, and begins with its weights.
    run = artifacts(config, *CONTINUES, *SLOW)
    assert call("train", config, *CONTINUES, *SLOW) == 0
    made_from = run.memory.load().made_from
    assert made_from[first.memory.relative] == first.memory.load().fingerprint
    np.testing.assert_allclose(_weights(run), _weights(run, before=True), atol=1e-9)
    np.testing.assert_array_equal(_weights(run, before=True), _weights(first))

    # Interrupted and resumed, it is the same to the last bit.
    other = artifacts(config, *CONTINUES, "train.replay_share=0.25")
    assert other.memory.relative != artifacts(config, *CONTINUES).memory.relative
    words = ("train", config, *CONTINUES, "train.replay_share=0.25")
    assert call(*words) == 0
    whole = other.memory.load().fingerprint
    stops = iter([False, True])
    monkeypatch.setattr(loop, "preempted", lambda: next(stops, False))
    assert call(*words, "--rebuild") != 0
    assert not other.memory.is_complete()
    assert call(*words) == 0
    assert other.memory.load().fingerprint == whole

    # The table shows old and new text, and the documents that were held out of training alone.
    assert call("evaluate", config, *words[2:]) == 0
    shown = capsys.readouterr().out
    assert "appended text, held-out-1" in shown
    results = read_json(other.results.path / RESULTS)
    valid, test, new = results["texts"]
    for split, text in (("valid", valid), ("test", test)):
        assert text["text"] == f"first text, {split}"
        for key, system in results["systems"].items():
            assert text["nats"][key] == system[f"{split}_nats"]
    _check_scores(other, results, new)

    # What it goes on from stays, although another memory has its role now.
    assert RunRecord.read(first.workdir).roles["memory"] == other.memory.relative
    assert call("artifacts", config, "--remove-unused") == 0
    assert first.memory.is_complete()

    # Only what fits is continued.
    for overrides, expected in (
        (("memory.num_layers=3",), "trained with other settings: memory.num_layers=2, now 3"),
        (("train.inputs=online",), "train.inputs=online: the training text was changed"),
        (("pretrain.num_steps=5",), "corpus.json: .*decoder="),
    ):
        line = _refused(capsys, config, "train", *CONTINUES, *overrides)
        assert re.search(expected, line), line

    # Rows that were appended count where there are more neighbours than the first text has rows.
    first_rows = first.datastore("train").load().counts["rows"]
    line = _refused(capsys, config, "retrieve", "retrieval.num_neighbors=100000")
    rows = other.datastore("train").load().counts["rows"]
    assert f"({rows} rows, a row's own excluded)" in line and rows > first_rows

    # What a `train` that began before the change ends with takes no role of today's text.
    roles = RunRecord.read(first.workdir).roles
    record(first, train.stages(first))
    late = RunRecord.read(first.workdir).roles
    assert roles.items() < late.items()
    assert late.keys() - roles.keys() == {"memory [before change 1]"}
    assert late["memory [before change 1]"] == first.memory.relative

    # A document of the old memory's text is removed: it is not continued.
    files = sorted((tmp_path / "base").glob("*.txt"))
    next(one for one in files if call("remove", config, "--documents", str(one)) == 0)
    assert artifacts(config).corpus.changes[-1].memory == other.memory.relative
    assert RunRecord.read(first.workdir).roles.keys() == roles.keys()
    line = _refused(capsys, config, "train", *CONTINUES)
    assert re.search(r"was trained on \d+ rows that were removed since", line), line
