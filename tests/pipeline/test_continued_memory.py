"""train.memory_start=checkpoint after `append`: the memory from before goes on, or is refused."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from mlpmem_jax.parallel.mesh import make_mesh
from mlpmem_jax.pipeline import continuing, train
from mlpmem_jax.pipeline.execute import record
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.networks import finished_memory, starting_memory
from mlpmem_jax.store.run_record import RunRecord
from mlpmem_jax.training import loop
from tests.pipeline.changing import artifacts, call, make_base, write_base, write_documents

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
    assert call("append", config, "--text", f"{tmp_path}/new/*.txt") == 0
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
