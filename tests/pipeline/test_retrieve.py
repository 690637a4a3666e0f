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
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.search_needs import chosen_engine
from mlpmem_jax.pipeline.stage import run_stages
from mlpmem_jax.retrieval import approximate, engine, index_builder, index_files, targets
from mlpmem_jax.retrieval.approximate import SearchSettings
from mlpmem_jax.retrieval.distributions import LabelEvidence
from mlpmem_jax.retrieval.index_builder import open_index
from mlpmem_jax.retrieval.knn_lm import StoredKnn, read_labels
from mlpmem_jax.store.array_specs import SPLITS, datastore_arrays
from mlpmem_jax.store.arrays import open_array, read_rows
from mlpmem_jax.store.contents import foreign_file
from mlpmem_jax.store.shards import ShardWriter

WIDTH, VOCAB, SEPARATOR = 32, 300, 0
ROWS = {"train": 3000, "valid": 700, "test": 500}
K = 12


def _states(generator, num_rows):
    """Keys in clusters, some repeated, with labels that the cluster decides in part."""
    centres = np.random.default_rng(5).normal(size=(60, WIDTH)).astype(np.float32)
    cluster = generator.integers(0, 60, num_rows)
    key = centres[cluster] + 0.3 * generator.normal(size=(num_rows, WIDTH))
    key[num_rows // 2 : num_rows // 2 + 40] = key[0]
    noise = generator.integers(1, VOCAB, num_rows)
    label = np.where(generator.random(num_rows) < 0.6, cluster + 1, noise)
    label[::97] = SEPARATOR
    return key, label


@pytest.fixture
def make_run(make_config):
    def make(*overrides, bad_row=None, scale=1.0, workdir=None):
        config = make_config(
            "datastore.shard_rows=1024",
            f"decoder.width={WIDTH}",
            f"retrieval.num_neighbors={K}",
            "targets.num_tokens=6",
            *overrides,
            workdir=workdir,
        )
        layout = Artifacts(config)
        if layout.tokens.is_complete():
            return layout
        for artifact, origins in ((layout.tokens, ()), (layout.decoder, (layout.tokens,))):
            artifact.begin({one.relative: one.load().fingerprint for one in origins})
            counts = {"separator_id": SEPARATOR, "vocab_size": VOCAB}
            artifact.finish(counts=counts | {f"{s}_tokens": ROWS[s] + 1 for s in SPLITS})
        origin = {one.relative: one.load().fingerprint for one in (layout.tokens, layout.decoder)}
        for seed, split in enumerate(SPLITS):
            generator = np.random.default_rng(seed)
            key, label = _states(generator, ROWS[split])
            if bad_row is not None and split == "train":
                key[bad_row, 3] = np.nan
            arrays = {
                "key": scale * key,
                "label": label,
                "logprob": np.full(ROWS[split], -np.log(VOCAB)),
            }
            artifact = layout.datastore(split)
            artifact.begin(origin)
            specs = {
                name: datastore_arrays(config.datastore, config.decoder.width)[name]
                for name in arrays
            }
            writer = ShardWriter(artifact.path, specs, ROWS[split], refuse_non_finite=False)
            for rows in writer.own_rows():
                writer.put(rows.start, {name: values[rows] for name, values in arrays.items()})
            artifact.finish(counts={"rows": ROWS[split]}, arrays=writer.close())
        return layout

    return make


def _run(run):
    run_stages([*index.stages(run), *retrieve.stages(run)])
    return run


def _all(artifact, name):
    store = open_array(artifact.path / name)
    return read_rows(store, 0, store.shape[0])


def _reference(layout, split):
    """Distances and rows of all neighbours by plain NumPy."""
    train = _all(layout.datastore("train"), "key").astype(np.float32)
    query = _all(layout.datastore(split), "key").astype(np.float32)
    difference = query[:, None] - train[None]
    distance = np.einsum("qnd,qnd->qn", difference, difference)
    if split == "train":
        np.fill_diagonal(distance, np.inf)
    order = np.argsort(distance, axis=1, kind="stable")[:, :K]
    return np.take_along_axis(distance, order, axis=1), order


def _expected_target(distance, label, tau, kept):
    """A loop over neighbours: the kNN distribution of one row."""
    probability = np.zeros(VOCAB)
    for d, y in zip(distance, label, strict=True):
        probability[y] += np.exp(-(float(d) - float(distance[0])) / tau)
    probability /= probability.sum()
    top = np.lexsort((np.arange(VOCAB), -probability.astype(np.float32)))[:kept]
    return top, probability[top]


def test_exact_neighbours_and_targets(make_run, capsys):
    layout = _run(make_run("retrieval.engine=exact"))
    assert "recall@12 of the exact engine is 1.0000 on 1,0" in capsys.readouterr().out
    for split in ("valid", "test"):
        distance, row = _reference(layout, split)
        np.testing.assert_array_equal(_all(layout.neighbors(split), "row"), row)
        np.testing.assert_allclose(_all(layout.neighbors(split), "distance"), distance, rtol=1e-5)
    train_label = _all(layout.datastore("train"), "label")
    for split in ("train", "valid"):
        manifest = layout.targets(split).load()
        tau = manifest.counts["temperature"]
        distance, row = _reference(layout, split)
        label = _all(layout.datastore(split), "label")
        found = {name: _all(layout.targets(split), name) for name in ("id", "prob", "mass")}
        np.testing.assert_array_equal(_all(layout.targets(split), "label"), label)
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
    layout = _run(make_run("retrieval.engine=exact"))
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
    layout = _run(make_run("retrieval.engine=exact", "targets.temperature=1e-6"))
    train_label = _all(layout.datastore("train"), "label")
    for split in ("train", "valid"):
        distance, row = _reference(layout, split)
        label = _all(layout.datastore(split), "label")
        scored = label != SEPARATOR
        mass, prob = (_all(layout.targets(split), name) for name in ("mass", "prob"))
        np.testing.assert_array_equal(mass > 0, scored)
        # Some keys are repeated: more labels may be equally near than are kept.
        alone = scored & (distance[:, 1] > distance[:, 0] * (1 + 1e-5))
        top = _all(layout.targets(split), "id")[alone, 0]
        np.testing.assert_array_equal(top, train_label[row[alone, 0]])
        np.testing.assert_array_equal(prob[alone, 0], 1)
        np.testing.assert_array_equal(mass[alone], 1)


def test_keys_whose_distances_overflow_are_refused(make_run):
    run = make_run("retrieval.engine=exact", "datastore.dtype=float32", scale=1e25)
    with pytest.raises(ArtifactError, match="key: row 0 is too large: squared distances overflow"):
        _run(run)


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
        _run(run)


def test_rows_without_targets_are_counted(make_run, monkeypatch, capsys):
    run = make_run("retrieval.engine=exact")
    found = targets.sparse_distributions

    def make(distance_QK, *rest):
        missing_Q1 = np.arange(len(distance_QK))[:, None] % 4 == 0
        return found(np.where(missing_Q1, np.float32(np.inf), distance_QK), *rest)

    monkeypatch.setattr(targets, "sparse_distributions", make)
    layout = _run(run)
    scored = (_all(layout.datastore("train"), "label") != SEPARATOR).sum()
    kept = layout.targets("train").load().counts["rows_with_target"]
    assert kept == (_all(layout.targets("train"), "mass") > 0).sum() < scored
    assert f"warning: {scored - kept:,} of {scored:,} rows of train have" in capsys.readouterr().out


def test_the_approximate_engine(make_run, capsys):
    pytest.importorskip("scann")
    layout = _run(make_run("retrieval.engine=scann", "retrieval.shard_rows=1600"))
    made = layout.targets("train").load()
    assert made.measured["engine"] == "scann" and made.measured["recall"] >= 0.95
    made_index = layout.index.load()
    assert (made_index.counts["shards"], made_index.counts["shard_by"]) == (2, "rows")
    exact = _reference(layout, "train")
    assert exact[0].shape == (3000, K)
    _run(layout)
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
    monkeypatch.setattr(engine, "ROUTED_ROWS", 2999)
    machine = this_machine(str(run.store))
    assert chosen_engine(run, machine, ROWS["train"]) == "exact"
    assert ROUTED_FLOPS not in targets_estimate(run, "train")
    _run(run)
    assert run.targets("train").load().measured["engine"] == "exact"


def test_auto_routes_many_rows_from_plan_to_the_knn_lm(make_run, capsys, monkeypatch):
    monkeypatch.setattr(engine, "ROUTED_ROWS", 2999)
    run = make_run("retrieval.engine=auto", "retrieval.cells=40")
    machine = this_machine(str(run.store))
    assert chosen_engine(run, machine, ROWS["train"]) == "routed"
    assert index_estimate(run)["cells"] == 40
    _run(run)
    assert "index: routed engine (auto: 3,000 rows are more than 2,999)" in capsys.readouterr().out
    made = run.targets("train").load().measured
    assert made["engine"] == "routed" and made["recall"] >= 0.95
    cells, visited = (run.index.load().counts[name] for name in ("cells", "cells_to_search"))
    flops = 2 * WIDTH * 3000 * (cells + visited * 3000 / cells)
    assert targets_estimate(run, "train")[ROUTED_FLOPS] == pytest.approx(flops)
    # The kNN-LM that generates.
    opened, settings = open_index(run.index, run.config.retrieval, WIDTH, pytest.fail)
    assert (opened.name, settings.cells_to_search) == ("routed", visited)
    label, (_, row) = read_labels(run.datastore("train")), _reference(run, "test")
    key = _all(run.datastore("test"), "key")[:20].astype(np.float32)
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
    run, build = make_run("retrieval.engine=auto"), index_builder.build_routed
    monkeypatch.setattr(index_builder, "build_routed", lambda *_: (_ for _ in ()).throw(_Killed))
    with pytest.raises(_Killed):
        run_stages(index.stages(run))
    monkeypatch.setattr(index_builder, "build_routed", build)
    monkeypatch.setattr(index_builder, "choose_settings", pytest.fail)
    _run(run)
    why = "auto: ScaNN reaches recall@12=0.7000, below retrieval.min_recall=0.95"
    said = capsys.readouterr()
    assert said.out.count(f"index: routed engine ({why})") == 2 and said.err == ""
    made = run.index.load()
    assert (made.counts["engine"], made.measured["why"]) == ("routed", why)
    assert not index_files.shard_names(run.index.path)
    assert foreign_file(run.index.path, "index") is None
    assert run.targets("train").load().measured["recall"] >= 0.95


def test_neighbours_of_training_rows_can_be_kept(make_run):
    without = _run(make_run("retrieval.engine=exact"))
    direct = {name: _all(without.targets("train"), name) for name in ("id", "prob", "mass")}
    layout = _run(make_run("retrieval.engine=exact", "retrieval.keep_train=all"))
    assert layout.index.relative == without.index.relative
    assert layout.targets("train").relative != without.targets("train").relative
    _, row = _reference(layout, "train")
    np.testing.assert_array_equal(_all(layout.neighbors("train"), "row"), row)
    for name, values in direct.items():
        np.testing.assert_array_equal(_all(layout.targets("train"), name), values)
        np.testing.assert_array_equal(_all(without.targets("train"), name), values)


class _Killed(BaseException):
    pass


@pytest.mark.parametrize(("engine", "share"), [("exact", 1), ("scann", 1), ("exact", 0.4)])
def test_a_killed_search_continues_bit_for_bit(make_run, monkeypatch, tmp_path, engine, share):
    if engine == "scann":
        pytest.importorskip("scann")
    overrides = (
        f"retrieval.engine={engine}", "retrieval.query_batch=500", "retrieval.shard_rows=1600",
        f"targets.share={share}", "targets.share_by=row",
    )  # fmt: skip
    whole = _run(make_run(*overrides, workdir=tmp_path / "whole"))
    run = make_run(*overrides)
    write, count = ShardWriter.put, 0

    def killed(self, rows, arrays):
        nonlocal count
        count += 1
        if count in (2, 5):
            raise _Killed
        write(self, rows, arrays)

    monkeypatch.setattr(ShardWriter, "put", killed)
    for _ in range(2):
        with pytest.raises(_Killed):
            _run(run)
    layout = _run(run)
    for artifact, names in (
        ("neighbors", ("row", "distance")),
        ("targets", ("id", "prob", "mass")),
    ):
        for name in names:
            ours, other = (getattr(one, artifact)("valid") for one in (layout, whole))
            np.testing.assert_array_equal(_all(ours, name), _all(other, name))
    for name in ("id", "prob", "mass", "label"):
        np.testing.assert_array_equal(
            _all(layout.targets("train"), name), _all(whole.targets("train"), name)
        )
    assert layout.targets("valid").load().fingerprint == whole.targets("valid").load().fingerprint


def test_a_killed_index_build_continues(make_run, monkeypatch):
    pytest.importorskip("scann")
    run = make_run("retrieval.engine=scann", "retrieval.shard_rows=1600")
    check, count = approximate._check_written, 0

    def killed(path, files, rows):
        nonlocal count
        count += 1
        if count == 2:
            raise _Killed
        check(path, files, rows)

    monkeypatch.setattr(approximate, "_check_written", killed)
    with pytest.raises(_Killed):
        run_stages(index.stages(run))
    run_stages(index.stages(run))
    assert count == 3  # The first shard was not built again.
    assert sorted(p.name for p in run.index.path.glob("shard-*")) == [
        "shard-00000", "shard-00001",
    ]  # fmt: skip


def test_a_damaged_shard_of_an_interrupted_index_is_built_again(make_run, monkeypatch, capsys):
    """Else the manifest would record the damaged file as the right one."""
    pytest.importorskip("scann")
    run = make_run("retrieval.engine=scann", "retrieval.shard_rows=1600")
    with monkeypatch.context() as patch, pytest.raises(_Killed):
        patch.setattr("mlpmem_jax.retrieval.index_builder.choose_settings", _kill)
        run_stages(index.stages(run))
    shard = run.index.path / "shard-00001"
    for name in ("dataset.npy", "shard.json"):
        whole = (shard / name).read_bytes()
        (shard / name).write_bytes(whole.replace(whole[-40:-20], whole[-20:]))
        with monkeypatch.context() as patch, pytest.raises(_Killed):
            patch.setattr("mlpmem_jax.retrieval.index_builder.choose_settings", _kill)
            run_stages(index.stages(run))
        assert f"{shard / name}: damaged" in capsys.readouterr().err
        assert (shard / name).read_bytes() == whole
    run_stages(index.stages(run))
    assert not capsys.readouterr().err


def _kill(*_, **__):
    raise _Killed


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace('"temperature": ', '"temperature": 4'),
        lambda text: text.replace("temperature", "temperatur"),
        lambda text: text[:-9],
    ],
    ids=["another value", "another key", "cut"],
)
def test_a_changed_temperature_of_an_interrupted_start_is_named(make_run, monkeypatch, edit):
    run = make_run("retrieval.engine=exact")
    put = ShardWriter.put
    monkeypatch.setattr(
        ShardWriter, "put", lambda self, *rows: _kill() if "prob" in rows[1] else put(self, *rows)
    )
    with pytest.raises(_Killed):
        _run(run)
    monkeypatch.undo()
    file = run.targets("train").path / "temperature.json"
    text = file.read_text()
    file.write_text(edit(text))
    with pytest.raises(ArtifactError, match=f"{file}: damaged"):
        _run(run)
    file.unlink()  # Then it is chosen again, and is the same.
    _run(run)
    assert file.read_text() == text


def test_too_many_neighbours(make_run):
    run = make_run("retrieval.engine=exact", "retrieval.num_neighbors=3000")
    with pytest.raises(ConfigError, match=r"retrieval.num_neighbors=3000 .* 2999 other rows"):
        _run(run)


def test_keys_that_are_not_finite(make_run):
    run = make_run("retrieval.engine=exact", bad_row=1234)
    where = run.datastore("train").path
    with pytest.raises(ArtifactError, match=f"{where}/key: row 1234 is not finite"):
        _run(run)


def test_a_low_recall_is_warned_of_and_targets_are_made(make_run, capsys):
    pytest.importorskip("scann")
    # With a single leaf, given, candidates alone can be raised: no setting reaches the floor.
    run = make_run(
        "retrieval.engine=scann", "retrieval.num_leaves_to_search=1", "retrieval.num_leaves=100"
    )
    _run(run)
    message = "below retrieval.min_recall=0.95: raise retrieval.num_leaves_to_search (now 1)"
    assert capsys.readouterr().err.count(message) == 2  # Of the calibration, and as measured.
    calibrated = run.index.load().measured["calibration_recall"]
    measured = run.targets("train").load().measured["recall"]
    assert 0 < calibrated < 0.95 and 0 < measured < 0.95


def test_a_missing_package_names_the_exact_engine(make_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "scann", None)
    with pytest.raises(ConfigError, match=r"scann: .*not installed.*retrieval.engine=exact"):
        run_stages(index.stages(make_run("retrieval.engine=scann")))
    with pytest.raises(ConfigError, match=r"scann.*retrieval.engine=exact needs no package"):
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
        _run(run)


def test_the_labels_probability_uses_all_neighbours(make_run):
    layout = _run(make_run("retrieval.engine=exact"))
    distance, row = _reference(layout, "test")
    label = _all(layout.datastore("test"), "label")
    neighbor_label = _all(layout.datastore("train"), "label")[row]
    scored = label != SEPARATOR
    found, rows = _evidence(layout, "test")
    np.testing.assert_array_equal(rows, np.flatnonzero(scored))
    expected = LabelEvidence(distance[scored], neighbor_label[scored], label[scored])
    np.testing.assert_allclose(found.logprob(2.0), expected.logprob(2.0), rtol=1e-4)
    assert dataclasses.is_dataclass(layout.index.load())
