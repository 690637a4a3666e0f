"""`index` and `retrieve` over a made-up datastore: results, resuming, mistakes."""

import dataclasses
import sys

import numpy as np
import pytest

from mlpmem_jax.errors import ArtifactError, ConfigError
from mlpmem_jax.evaluation.timed_decoding import make_search
from mlpmem_jax.parallel.hardware import this_machine
from mlpmem_jax.pipeline import index, retrieve
from mlpmem_jax.pipeline.estimates import ROUTED_FLOPS, index_estimate, targets_estimate
from mlpmem_jax.pipeline.search_needs import chosen_engine
from mlpmem_jax.pipeline.stage import run_stages
from mlpmem_jax.retrieval import approximate, engine, index_builder, index_files, targets
from mlpmem_jax.retrieval.approximate import SearchSettings
from mlpmem_jax.retrieval.distributions import LabelEvidence
from mlpmem_jax.retrieval.index_builder import open_index
from mlpmem_jax.retrieval.knn_lm import StoredKnn, read_labels
from mlpmem_jax.store.contents import foreign_file
from tests.pipeline.searching import (
    ROWS,
    SEPARATOR,
    VOCAB,
    WIDTH,
    K,
    nearest_rows,
    read_array,
    run_maker,
    search,
)


class _Killed(BaseException):
    pass


@pytest.fixture
def make_run(make_config):
    return run_maker(make_config)


def _expected_target(distance, label, tau, kept):
    """A loop over neighbours: the kNN distribution of one row."""
    probability = np.zeros(VOCAB)
    for d, y in zip(distance, label, strict=True):
        probability[y] += np.exp(-(float(d) - float(distance[0])) / tau)
    probability /= probability.sum()
    top = np.lexsort((np.arange(VOCAB), -probability.astype(np.float32)))[:kept]
    return top, probability[top]


def test_exact_neighbours_and_targets(make_run, capsys):
    layout = search(make_run("retrieval.engine=exact"))
    assert "recall@12 of the exact engine is 1.0000 on 1,0" in capsys.readouterr().out
    for split in ("valid", "test"):
        distance, row = nearest_rows(layout, split)
        np.testing.assert_array_equal(read_array(layout.neighbors(split), "row"), row)
        np.testing.assert_allclose(
            read_array(layout.neighbors(split), "distance"), distance, rtol=1e-5
        )
    train_label = read_array(layout.datastore("train"), "label")
    for split in ("train", "valid"):
        manifest = layout.targets(split).load()
        tau = manifest.counts["temperature"]
        distance, row = nearest_rows(layout, split)
        label = read_array(layout.datastore(split), "label")
        found = {name: read_array(layout.targets(split), name) for name in ("id", "prob", "mass")}
        np.testing.assert_array_equal(read_array(layout.targets(split), "label"), label)
        is_separator = label == SEPARATOR
        assert is_separator.any()
        assert not found["mass"][is_separator].any() and not found["prob"][is_separator].any()
        for n in np.flatnonzero(~is_separator)[::53]:
            _, prob = _expected_target(distance[n], train_label[row[n]], tau, 6)
            np.testing.assert_allclose(found["prob"][n], prob, atol=6e-4)
            np.testing.assert_allclose(found["mass"][n], prob.sum(), rtol=1e-4)
        assert manifest.counts["rows_with_target"] == (~is_separator).sum()


def _evidence(layout, split):
    label, train_label = (read_labels(layout.datastore(s)) for s in (split, "train"))
    rows = np.flatnonzero(label != SEPARATOR)
    return StoredKnn(layout.neighbors(split), label, train_label).evidence(rows), rows


def test_the_temperature_is_the_best_on_validation(make_run):
    layout = search(make_run("retrieval.engine=exact"))
    made = layout.targets("train").load()
    found, row = _evidence(layout, "valid")
    uniform = np.full(len(row), -np.log(VOCAB))

    def nats(tau):
        weights = np.linspace(0, 1, 200, endpoint=False)[:, None]
        knn = np.exp(found.logprob(tau))[None]
        mixed = np.log(weights * knn + (1 - weights) * np.exp(uniform)[None])
        return -mixed.mean(axis=1).max()

    best = min(nats(tau) for tau in np.geomspace(0.05, 100, 60))
    assert made.measured["knn_lm_valid_nats"] <= best + 1e-4
    assert 0 < made.measured["knn_lm_weight"] < 1


def test_a_tiny_temperature_keeps_the_nearest_neighbour(make_run):
    """As τ goes to 0 it has all the mass, shared among those that are equally near."""
    layout = search(make_run("retrieval.engine=exact", "targets.temperature=1e-6"))
    train_label = read_array(layout.datastore("train"), "label")
    for split in ("train", "valid"):
        distance, row = nearest_rows(layout, split)
        label = read_array(layout.datastore(split), "label")
        scored = label != SEPARATOR
        mass, prob = (read_array(layout.targets(split), name) for name in ("mass", "prob"))
        np.testing.assert_array_equal(mass > 0, scored)
        # Some keys are repeated: more labels may be equally near than are kept.
        alone = scored & (distance[:, 1] > distance[:, 0] * (1 + 1e-5))
        top = read_array(layout.targets(split), "id")[alone, 0]
        np.testing.assert_array_equal(top, train_label[row[alone, 0]])
        np.testing.assert_array_equal(prob[alone, 0], 1)
        np.testing.assert_array_equal(mass[alone], 1)


def test_keys_whose_distances_overflow_are_refused(make_run):
    run = make_run("retrieval.engine=exact", "datastore.dtype=float32", scale=1e25)
    with pytest.raises(ArtifactError, match="key: row 0 is too large: squared distances overflow"):
        search(run)


def test_targets_of_no_row_are_refused(make_run, monkeypatch):
    """An engine that finds nothing leaves nothing to train on."""
    run = make_run("retrieval.engine=exact")
    found = targets.sparse_distributions
    monkeypatch.setattr(
        targets,
        "sparse_distributions",
        lambda distance_QK, *rest: found(np.full_like(distance_QK, np.inf), *rest),
    )
    with pytest.raises(ArtifactError, match=r"none of 2,\d+ rows has a neighbour at a finite"):
        search(run)


def test_rows_without_targets_are_counted(make_run, monkeypatch, capsys):
    run = make_run("retrieval.engine=exact")
    found = targets.sparse_distributions

    def make(distance_QK, *rest):
        missing_Q1 = np.arange(len(distance_QK))[:, None] % 4 == 0
        return found(np.where(missing_Q1, np.float32(np.inf), distance_QK), *rest)

    monkeypatch.setattr(targets, "sparse_distributions", make)
    layout = search(run)
    scored = (read_array(layout.datastore("train"), "label") != SEPARATOR).sum()
    kept = layout.targets("train").load().counts["rows_with_target"]
    assert kept == (read_array(layout.targets("train"), "mass") > 0).sum() < scored
    assert f"warning: {scored - kept:,} of {scored:,} rows of train have" in capsys.readouterr().out


def test_the_approximate_engine(make_run, capsys):
    pytest.importorskip("scann")
    layout = search(make_run("retrieval.engine=scann", "retrieval.shard_rows=1600"))
    made = layout.targets("train").load()
    assert made.measured["engine"] == "scann" and made.measured["recall"] >= 0.95
    made_index = layout.index.load()
    assert (made_index.counts["shards"], made_index.counts["shard_by"]) == (2, "rows")
    exact = nearest_rows(layout, "train")
    assert exact[0].shape == (3000, K)
    search(layout)
    assert capsys.readouterr().out.count(": complete (") == 5
    # What another version may cut otherwise is not read as ranges of rows.
    layout.index.begin(made_index.made_from)
    layout.index.finish(counts=made_index.counts | {"shard_by": "cells"}, files=made_index.files)
    with pytest.raises(ArtifactError, match="cut by cells; this software reads shards cut by rows"):
        open_index(layout.index, layout.config.retrieval, WIDTH, pytest.fail)


def test_auto_says_what_it_chose_and_an_index_that_is_there_decides(make_run, capsys, monkeypatch):
    run = make_run("retrieval.engine=auto")
    run_stages(index.stages(run))
    assert "index: exact engine (auto: 3,000 rows are at most" in capsys.readouterr().out
    monkeypatch.setattr(engine, "ROUTED_ROWS_CPU", 2999)
    machine = this_machine(str(run.store))
    assert chosen_engine(run, machine, ROWS["train"]) == "exact"
    assert ROUTED_FLOPS not in targets_estimate(run, "train")
    search(run)
    assert run.targets("train").load().measured["engine"] == "exact"


@pytest.mark.parametrize("name", ["routed", "scann"])
def test_targets_take_a_less_thorough_search_than_the_index(make_run, name, capsys):
    """No more cells or leaves than the recall takes; those of the index stay as they were."""
    if name == "scann":
        pytest.importorskip("scann")
    layout = ("retrieval.cells=40", "retrieval.num_leaves=40", f"retrieval.engine={name}")
    usual = search(make_run(*layout)).targets("train").load()
    run = search(make_run(*layout, "targets.min_recall=0.6"))
    made, index_counts = run.targets("train").load(), run.index.load().counts
    assert "for targets.min_recall=0.6" in capsys.readouterr().out
    assert 0.6 <= made.measured["recall"] < usual.measured["recall"]
    assert made.fingerprint != usual.fingerprint
    key = {"routed": "cells_to_search", "scann": "num_leaves_to_search"}[name]
    assert made.measured[key] < usual.measured[key] == index_counts[key]
    # The rows that are found are the nearest of those that are visited: never nearer ones.
    given = f"retrieval.{key}={index_counts[key]}", "retrieval.num_reorder=26"
    fixed = search(make_run(*layout, *given, "targets.min_recall=0.6")).targets("train").load()
    assert fixed.measured[key] == index_counts[key]


def test_auto_routes_many_rows_from_plan_to_the_knn_lm(make_run, capsys, monkeypatch):
    monkeypatch.setattr(engine, "ROUTED_ROWS_CPU", 2999)
    run = make_run("retrieval.engine=auto", "retrieval.cells=40")
    machine = this_machine(str(run.store))
    assert chosen_engine(run, machine, ROWS["train"]) == "routed"
    assert index_estimate(run)["cells"] == 40
    search(run)
    assert "index: routed engine (auto: 3,000 rows are more than 2,999)" in capsys.readouterr().out
    made = run.targets("train").load().measured
    assert made["engine"] == "routed" and made["recall"] >= 0.95
    cells, visited = (run.index.load().counts[name] for name in ("cells", "cells_to_search"))
    flops = 2 * WIDTH * 3000 * (cells + visited * 3000 / cells)
    assert targets_estimate(run, "train")[ROUTED_FLOPS] == pytest.approx(flops)
    # The kNN-LM that generates.
    opened, settings = open_index(run.index, run.config.retrieval, WIDTH, pytest.fail)
    assert (opened.name, settings.cells_to_search) == ("routed", visited)
    label, (_, row) = read_labels(run.datastore("train")), nearest_rows(run, "test")
    key = read_array(run.datastore("test"), "key")[:20].astype(np.float32)
    weight, found = make_search(opened, label, K, 1.0, 0.5)(key)
    np.testing.assert_allclose(weight.sum(axis=1), 0.5, rtol=1e-5)
    assert (found == label[row[:20]]).mean() > 0.9


def test_auto_gives_scann_up_for_cells_where_its_recall_stays_low(make_run, capsys, monkeypatch):
    """A build of cells that is killed goes on with them, without ScaNN."""
    pytest.importorskip("scann")
    monkeypatch.setattr(engine, "EXACT_ROWS_CPU", 2999)
    low = SearchSettings(54, 208), 0.7
    monkeypatch.setattr(index_builder, "choose_settings", lambda *_: low)
    given = make_run("retrieval.engine=auto", "retrieval.num_reorder=208")
    run_stages(index.stages(given))
    assert given.index.load().counts["engine"] == "scann"
    assert "raise retrieval.num_leaves_to_search (now 54)" in capsys.readouterr().err
    run, build = make_run("retrieval.engine=auto"), index_builder.build_cells
    monkeypatch.setattr(index_builder, "build_cells", lambda *_: (_ for _ in ()).throw(_Killed))
    with pytest.raises(_Killed):
        run_stages(index.stages(run))
    monkeypatch.setattr(index_builder, "build_cells", build)
    monkeypatch.setattr(index_builder, "choose_settings", pytest.fail)
    search(run)
    why = "auto: ScaNN reaches recall@12=0.7000, below retrieval.min_recall=0.95"
    said = capsys.readouterr()
    assert said.out.count(f"index: routed engine ({why})") == 2 and said.err == ""
    made = run.index.load()
    assert (made.counts["engine"], made.measured["why"]) == ("routed", why)
    assert not index_files.shard_names(run.index.path)
    assert foreign_file(run.index.path, "index") is None
    assert run.targets("train").load().measured["recall"] >= 0.95


def test_neighbours_of_training_rows_can_be_kept(make_run):
    without = search(make_run("retrieval.engine=exact"))
    direct = {name: read_array(without.targets("train"), name) for name in ("id", "prob", "mass")}
    layout = search(make_run("retrieval.engine=exact", "retrieval.keep_train=all"))
    assert layout.index.relative == without.index.relative
    assert layout.targets("train").relative != without.targets("train").relative
    _, row = nearest_rows(layout, "train")
    np.testing.assert_array_equal(read_array(layout.neighbors("train"), "row"), row)
    for name, values in direct.items():
        np.testing.assert_array_equal(read_array(layout.targets("train"), name), values)
        np.testing.assert_array_equal(read_array(without.targets("train"), name), values)


def test_too_many_neighbours(make_run):
    run = make_run("retrieval.engine=exact", "retrieval.num_neighbors=3000")
    with pytest.raises(ConfigError, match=r"retrieval.num_neighbors=3000 .* 2999 other rows"):
        search(run)


def test_keys_that_are_not_finite(make_run):
    run = make_run("retrieval.engine=exact", bad_row=1234)
    where = run.datastore("train").path
    with pytest.raises(ArtifactError, match=f"{where}/key: row 1234 is not finite"):
        search(run)


def test_a_low_recall_is_warned_of_and_targets_are_made(make_run, capsys):
    pytest.importorskip("scann")
    # With a single leaf, given, candidates alone can be raised: no setting reaches the floor.
    run = make_run(
        "retrieval.engine=scann", "retrieval.num_leaves_to_search=1", "retrieval.num_leaves=100"
    )
    search(run)
    message = "below retrieval.min_recall=0.95: raise retrieval.num_leaves_to_search (now 1)"
    assert capsys.readouterr().err.count(message) == 2  # Of the calibration, and as measured.
    calibrated = run.index.load().measured["calibration_recall"]
    measured = run.targets("train").load().measured["recall"]
    assert 0 < calibrated < 0.95 and 0 < measured < 0.95


def test_a_missing_package_names_the_engine_that_needs_none(make_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "scann", None)
    with pytest.raises(ConfigError, match=r"scann: .*not installed.*retrieval.engine=routed"):
        run_stages(index.stages(make_run("retrieval.engine=scann")))
    with pytest.raises(ConfigError, match=r"scann.*retrieval.engine=routed needs no package"):
        approximate._import()


def test_a_damaged_index_file_is_named(make_run):
    pytest.importorskip("scann")
    run = make_run("retrieval.engine=scann")
    run_stages(index.stages(run))
    file = run.index.path / "shard-00000" / "dataset.npy"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match="dataset.npy: damaged"):
        run_stages(retrieve.stages(run))


def test_splits_of_different_decoders_are_refused(make_run):
    run = make_run("retrieval.engine=exact")
    valid = run.datastore("valid")
    manifest = valid.load()
    valid.begin({**manifest.made_from, run.decoder.relative: "0" * 16})
    valid.finish(counts=manifest.counts, arrays=manifest.arrays)
    with pytest.raises(ArtifactError, match=f"made from another {run.decoder.relative}"):
        search(run)


def test_the_labels_probability_uses_all_neighbours(make_run):
    layout = search(make_run("retrieval.engine=exact"))
    distance, row = nearest_rows(layout, "test")
    label = read_array(layout.datastore("test"), "label")
    neighbor_label = read_array(layout.datastore("train"), "label")[row]
    scored = label != SEPARATOR
    found, rows = _evidence(layout, "test")
    np.testing.assert_array_equal(rows, np.flatnonzero(scored))
    expected = LabelEvidence(distance[scored], neighbor_label[scored], label[scored])
    np.testing.assert_allclose(found.logprob(2.0), expected.logprob(2.0), rtol=1e-4)
    assert dataclasses.is_dataclass(layout.index.load())
