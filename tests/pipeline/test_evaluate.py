"""The table of a tiny run, from stored artifacts, against direct computation."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import xlogy

from mlpmem_jax.commands import run_command
from mlpmem_jax.config.schema import Config
from mlpmem_jax.corpus.recent import read_recent
from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.pipeline import evaluate
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.networks import finished_decoder, finished_memory
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.store.array_specs import Split
from mlpmem_jax.store.arrays import open_array, read_rows


def _read(layout: Artifacts, artifact: str, split: Split, name: str) -> np.ndarray:
    store = open_array(getattr(layout, artifact)(split).path / name)
    return read_rows(store, 0, store.shape[0])


def _results(config: Config) -> dict:
    return json.loads((Artifacts(config).results.path / evaluate.RESULTS).read_text())


def test_decoder_and_knn_numbers_from_the_arrays(tiny_run: Config):
    """A loop in plain NumPy over the stored arrays gives the same nats."""
    layout, results = Artifacts(tiny_run), _results(tiny_run)
    label_N = _read(layout, "datastore", "test", "label")
    scored = label_N != TokenSplit.open(layout.tokens, "test").separator_id
    decoder_N = _read(layout, "datastore", "test", "logprob").astype(np.float64)
    systems = results["systems"]
    assert systems["decoder"]["test_nats"] == pytest.approx(-decoder_N[scored].mean(), rel=1e-6)
    row_NK = _read(layout, "neighbors", "test", "row")
    distance_NK = _read(layout, "neighbors", "test", "distance").astype(np.float64)
    train_label = _read(layout, "datastore", "train", "label")
    knn = systems["knn"]
    weight_NK = np.exp((distance_NK.min(1, keepdims=True) - distance_NK) / knn["temperature"])
    hits_NK = train_label[row_NK] == label_N[:, None]
    share_N = (weight_NK * hits_NK).sum(1) / weight_NK.sum(1)
    mixture_N = knn["interpolation"] * share_N + (1 - knn["interpolation"]) * np.exp(decoder_N)
    assert knn["test_nats"] == pytest.approx(-np.log(mixture_N[scored]).mean(), rel=1e-5)
    assert results["test"]["tokens"] == scored.sum()


def test_the_memory_is_scored_on_every_row(tiny_run: Config):
    """Chunks, batches and padding against the whole split at once."""
    layout, results = Artifacts(tiny_run), _results(tiny_run)
    mesh = single_device_mesh()
    memory, decoder = finished_memory(layout, mesh), finished_decoder(layout, mesh)
    separator = TokenSplit.open(layout.tokens, "valid").separator_id
    alone: dict[str, float] = {}
    for split in ("valid", "test"):
        label_N = _read(layout, "datastore", split, "label")
        tokens = TokenSplit.open(layout.tokens, split)
        recent_NM = read_recent(
            tokens, np.zeros(1, np.int64), len(label_N), tiny_run.memory.recent_tokens
        )[0]
        state_ND = jnp.asarray(_read(layout, "datastore", split, "input"))
        hidden_NE = memory.hidden(memory.inputs(state_ND, recent_NM, decoder.embedding[...]))
        logprob_NV = np.asarray(jax.nn.log_softmax(memory.logits(hidden_NE)))
        scored = label_N != separator
        nats_N = -np.take_along_axis(logprob_NV, label_N[:, None], axis=1)[:, 0]
        alone[split] = nats_N[scored].mean()
        if split == "valid":
            valid_NV, valid_scored = logprob_NV, scored
    for split, nats in alone.items():
        assert results["diagnostics"][split]["memory_alone_nats"] == pytest.approx(nats, rel=1e-5)
    against = results["diagnostics"]["valid_memory_against_targets"]
    assert against["ce"] == pytest.approx(alone["valid"], rel=1e-5)
    id_NS = _read(layout, "targets", "valid", "id")[valid_scored].astype(np.int64)
    prob_NS = _read(layout, "targets", "valid", "prob")[valid_scored].astype(np.float64)
    prob_NS /= prob_NS.sum(1, keepdims=True)
    logprob_NS = np.take_along_axis(valid_NV[valid_scored], id_NS, axis=1)
    kl_N = (xlogy(prob_NS, prob_NS) - prob_NS * logprob_NS).sum(1)
    assert against["kl"] == pytest.approx(kl_N.mean(), rel=1e-4)


def test_tuned_systems_are_never_worse_than_the_decoder_on_validation(tiny_run: Config):
    systems = _results(tiny_run)["systems"]
    for name in ("knn", "memory"):
        assert systems[name]["valid_nats"] <= systems["decoder"]["valid_nats"] + 1e-9
        assert 0 <= systems[name]["interpolation"] <= 1


def test_costs(tiny_run: Config):
    systems = _results(tiny_run)["systems"]
    counts = {
        name: int(getattr(Artifacts(tiny_run), name).load().counts["parameters"])
        for name in ("decoder", "memory")
    }
    assert systems["decoder"]["parameters"] == counts["decoder"]
    assert systems["memory"]["parameters"] == sum(counts.values())
    assert systems["knn"]["stored_bytes"] > systems["memory"]["stored_bytes"]
    tables = tiny_run.decoder.width * 384 * 2  # embedding and head, vocabulary padded
    assert systems["decoder"]["non_embedding_parameters"] == counts["decoder"] - tables


def test_files_and_report(tiny_run: Config, capsys: pytest.CaptureFixture[str]):
    path = Artifacts(tiny_run).results.path
    assert (path / evaluate.PICTURE).read_bytes().startswith(b"\x89PNG")
    assert (path / evaluate.TABLE).read_text().count("\n") == 4
    assert run_command("evaluate", tiny_run, Options(workdir=tiny_run.workdir)) == 0
    shown = capsys.readouterr().out
    assert "complete" in shown
    assert "+ kNN-LM" in shown
    assert "on test" in shown.lower()
    assert "time: " in shown
    assert "pretrain" in shown
    latency = json.loads((path / evaluate.MEASURED).read_text())["latency_ms"]
    assert all(latency[name]["p50"] > 0 for name in ("decoder", "knn", "memory"))


def _copied(tiny_run: Config, tmp_path: Path) -> Config:
    shutil.copytree(tiny_run.workdir, tmp_path / "run")
    return tiny_run.model_copy(update={"workdir": str(tmp_path / "run")})


def test_made_again_it_is_the_same_bit_for_bit(tiny_run: Config, tmp_path: Path):
    config = _copied(tiny_run, tmp_path)
    layout = Artifacts(config)
    before = layout.results.load().fingerprint
    layout.results.remove()
    assert run_command("evaluate", config, Options(workdir=config.workdir)) == 0
    assert layout.results.load().fingerprint == before


def test_a_damaged_result_is_named(tiny_run: Config, tmp_path: Path):
    config = _copied(tiny_run, tmp_path)
    file = Artifacts(config).results.path / evaluate.RESULTS
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ArtifactError, match=r"evaluate\.json: truncated"):
        evaluate.print_report(Artifacts(config))


def test_missing_neighbours_name_the_command(tiny_run: Config, tmp_path: Path):
    config = _copied(tiny_run, tmp_path)
    layout = Artifacts(config)
    layout.results.remove()
    layout.neighbors("test").remove()
    with pytest.raises(ArtifactError, match="command `retrieve`"):
        run_command("evaluate", config, Options(workdir=config.workdir))
