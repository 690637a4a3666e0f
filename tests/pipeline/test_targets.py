"""Targets of a share of rows, by mass, without documents of their own, and of n-grams.

Real tokens of small texts; decoder and datastore are made up.
"""

import dataclasses

import numpy as np
import pytest

from mlpmem_jax.config.schema import Config
from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.errors import ConfigError, UserError
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.pipeline import index, retrieve, tokenize
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.resolve import resolved
from mlpmem_jax.pipeline.sources import Sources
from mlpmem_jax.pipeline.stage import run_stages
from mlpmem_jax.pipeline.tasks import memory_task
from mlpmem_jax.store.array_specs import SPLITS, datastore_arrays
from mlpmem_jax.store.arrays import open_array, read_rows
from mlpmem_jax.store.shards import ShardWriter
from tests.pipeline import tokenizing

WIDTH, K, S = 16, 10, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Texts; the store beside them holds tokens, datastore and index once for all tests."""
    path = tmp_path_factory.mktemp("targets")
    tokenizing.write_corpus(path / "text")
    return path


@pytest.fixture
def make_run(folder, tmp_path):
    """Returns a maker of runs with tokens, and with a datastore if asked for."""

    def make(*, keys=True, store=None, **changes):
        sections = {
            "decoder": {"width": WIDTH, "num_heads": 2},
            "memory": {"width": 16, "num_layers": 1, "recent_tokens": 0},
            "datastore": {"shard_rows": 256, "chunk_rows": 32, "window_tokens": 32},
            "retrieval": {"num_neighbors": K, "engine": "exact", "recall_queries": 1000},
            "targets": {"num_tokens": S},
            "train": {"batch_size": 4, "num_steps": 4},
        }
        for name, values in changes.items():
            sections[name] = sections.get(name, {}) | values
        values = tokenizing.settings(folder, **sections)
        values |= {"workdir": str(tmp_path / "run"), "store": str(store or folder / "store")}
        config = resolved(Config(**values))
        run = Artifacts(config, Sources(config.workdir, reads=True))
        run_stages(tokenize.stages(run))
        if keys and not run.datastore("test").is_complete():
            _fill(run)
        return run

    return make


def _fill(run):
    """Makes up states that depend on the last two tokens, and on the document."""
    run.decoder.begin({run.tokens.relative: run.tokens.load().fingerprint})
    run.decoder.finish(counts={"steps": 1})
    origin = {one.relative: one.load().fingerprint for one in (run.tokens, run.decoder)}
    generator = np.random.default_rng(0)
    by_token = generator.normal(size=(2, 512, WIDTH))
    for split in SPLITS:
        token, offset = _tokens(run, split)
        document = np.repeat(generator.normal(size=(len(offset) - 1, WIDTH)), np.diff(offset), 0)
        state = by_token[0, token] + by_token[1, np.roll(token, 1)] + 0.5 * document
        state = state[:-1] + 0.1 * generator.normal(size=(len(token) - 1, WIDTH))
        arrays = {
            "key": state,
            "input": state,
            "label": token[1:],
            "logprob": np.full(len(token) - 1, -5.0),
        }
        artifact = run.datastore(split)
        artifact.begin(origin)
        specs = datastore_arrays(run.config.datastore, WIDTH)
        writer = ShardWriter(artifact.path, specs, len(token) - 1)
        for rows in writer.own_rows():
            writer.put(rows.start, {name: arrays[name][rows] for name in specs})
        artifact.finish(counts={"rows": len(token) - 1}, arrays=writer.close())


def _tokens(run, split):
    tokens = TokenSplit.open(run.tokens, split)
    return tokens.read(0, tokens.num_tokens), tokens.document_offset


def _all(artifact, *names):
    stores = [open_array(artifact.path / name) for name in names]
    found = [read_rows(store, 0, store.shape[0]) for store in stores]
    return found if len(found) > 1 else found[0]


def _made(run):
    run_stages([*index.stages(run), *retrieve.stages(run)])
    return run


def _drawn(run):
    """Rows whose whole document has targets or none."""
    token, offset = _tokens(run, "train")
    document = np.repeat(np.arange(len(offset) - 1), np.diff(offset))[:-1]
    return document, token[1:] != TokenSplit.open(run.tokens, "train").separator_id


def test_a_share_of_documents_has_targets(make_run, capsys):
    whole = _made(make_run())
    run = _made(make_run(targets={"share": 0.4}))
    assert run.index.relative == whole.index.relative
    assert run.neighbors("valid").relative == whole.neighbors("valid").relative
    document, scored = _drawn(run)
    names = ("id", "prob", "mass", "label")
    found, expected = (_all(one.targets("train"), *names) for one in (run, whole))
    has_target = found[2] > 0
    held = np.unique(document[has_target])
    assert 5 < len(held) < document.max()
    np.testing.assert_array_equal(has_target, np.isin(document, held) & scored)
    for ours, others in zip(found[:3], expected[:3], strict=True):
        np.testing.assert_array_equal(ours[has_target], others[has_target])
        assert not ours[~has_target].any()
    np.testing.assert_array_equal(found[3], expected[3])
    manifest = run.targets("train").load()
    assert manifest.counts["rows_with_target"] == has_target.sum()
    assert manifest.measured["queries"] == np.isin(document, held).sum()
    assert "have no neighbour" not in capsys.readouterr().out
    for ours, others in zip(
        _all(run.targets("valid"), *names), _all(whole.targets("valid"), *names), strict=True
    ):
        np.testing.assert_array_equal(ours, others)


def test_rows_without_targets_are_trained_on_by_their_labels(make_run):
    """They have a weight, and no mass: to the loss that is cross-entropy alone."""
    run = _made(make_run(targets={"share": 0.4, "share_by": "row"}))
    task = memory_task(run, single_device_mesh())
    (batch, *_) = list(task.feed(range(1)))
    mass, weight = np.asarray(batch["target_mass"]), np.asarray(batch["weight"])
    assert 0.2 < (mass > 0).sum() / (weight > 0).sum() < 0.6
    assert not mass[weight == 0].any()
    assert not np.asarray(batch["target_prob"])[mass == 0].any()


def test_fewest_tokens_by_mass(make_run):
    whole = _made(make_run())
    run = _made(make_run(targets={"min_mass": 0.6}))
    for split in ("train", "valid"):
        token_id, prob, mass = _all(run.targets(split), "id", "prob", "mass")
        ids, probs, masses = _all(whole.targets(split), "id", "prob", "mass")
        used = prob > 0
        np.testing.assert_array_equal(prob, np.where(used, probs, 0))
        np.testing.assert_array_equal(token_id, np.where(used, ids, 0))
        has_target = mass > 0
        np.testing.assert_array_equal(has_target, masses > 0)
        count = used.sum(axis=1)
        assert ((mass >= 0.6 - 1e-6) | (count == (probs > 0).sum(axis=1)))[has_target].all()
        before = mass - prob[np.arange(len(prob)), np.maximum(count - 1, 0)]
        assert (before < 0.6 + 1e-3)[has_target].all()  # Stored in half precision.
        about = run.targets(split).load().measured
        assert about["tokens_per_target"] == round(count[has_target].mean(), 3)
        assert about["bytes_per_target"] == round(4 * count[has_target].mean(), 3)
        assert about["stored_bytes_per_target"] == 4 * S
        assert "tokens_per_target" not in whole.targets(split).load().measured
    assert count.max() > 1 and (count[has_target] < S).any()


def test_documents_are_excluded_from_their_own_neighbours(make_run):
    kept = {"keep_train": "all", "exclude": "document", "exclude_repeats_tokens": 2}
    run, whole = _made(make_run(retrieval=kept)), _made(make_run())
    assert run.index.relative == whole.index.relative
    document, _ = _drawn(run)
    label = _all(run.datastore("train"), "label")
    row = _all(run.neighbors("train"), "row")
    assert (row >= 0).all()
    assert (document[row] != document[:, None]).all()
    token, offset = _tokens(run, "train")
    inside = np.arange(len(label)) - offset[document] >= 2
    repeats = (row >= 2) & inside[:, None]
    for back in range(3):
        repeats &= label[row - back] == label[np.arange(len(label)) - back][:, None]
    assert not repeats.any()
    key = _all(run.datastore("train"), "key").astype(np.float64)
    for n in range(100, len(key), 391):
        distance = np.square(key - key[n]).sum(axis=1)
        allowed = document != document[n]
        if inside[n]:
            passage = np.lib.stride_tricks.sliding_window_view(token, 3)
            allowed[1:] &= (passage != passage[n - 1]).any(axis=1)
        distance[~allowed] = np.inf
        np.testing.assert_array_equal(row[n], np.argsort(distance, kind="stable")[:K])
    # Searched for directly, targets are those of the kept neighbours.
    direct = _made(make_run(retrieval=kept | {"keep_train": "none"}))
    for name in ("id", "prob", "mass"):
        ours, others = (_all(one.targets("train"), name) for one in (direct, run))
        np.testing.assert_array_equal(ours, others)


def test_a_single_document_has_no_neighbours(make_run, monkeypatch):
    run = make_run(retrieval={"exclude": "document"})
    manifest = run.tokens.load()
    counts = {**manifest.counts, "train_documents": 1}
    changed = dataclasses.replace(manifest, counts=counts)
    monkeypatch.setattr(type(run.tokens), "load", lambda self: changed)
    with pytest.raises(ConfigError, match="retrieval.exclude=document leaves no row a neighbour"):
        retrieve.check_retrieval(run)


class _Killed(BaseException):
    pass


def _target_stages(run):
    return [stage for stage in retrieve.stages(run) if stage.artifact.kind == "targets"]


def _expected(token, offset, occurrences, n, min_count):
    """Counts of what follows the longest end of n's context that occurs often enough elsewhere."""
    start = offset[np.searchsorted(offset, n, side="right") - 1]
    context = token[start : n + 1]
    for length in range(len(context), -1, -1):
        end = context[len(context) - length :]
        windows = np.lib.stride_tricks.sliding_window_view(token, max(length, 1))
        same = (windows == end).all(axis=1) if length else np.ones(len(windows), bool)
        place = np.flatnonzero(same) + max(length, 1) - 1
        place = place[(place != n) & np.isin(place, occurrences)]
        if len(place) >= min_count:
            return np.bincount(token[place + 1], minlength=512)
    return np.zeros(512, int)


@pytest.mark.parametrize(("min_count", "share"), [(1, 1.0), (3, 0.5)])
def test_ngram_targets_are_made_from_tokens_alone(
    make_run, tmp_path, monkeypatch, min_count, share
):
    """No decoder and no datastore is there. A killed start continues to the same bits."""
    changes = {"teacher": "ngram", "ngram_min_count": min_count, "share": share}
    run = make_run(keys=False, store=tmp_path / "store", targets=changes)
    put, count = ShardWriter.put, 0

    def killed(self, *arguments):
        nonlocal count
        count += 1
        if count == 3:
            raise _Killed
        put(self, *arguments)

    monkeypatch.setattr(ShardWriter, "put", killed)
    with pytest.raises(_Killed):
        run_stages(_target_stages(run))
    run_stages(_target_stages(run))
    assert not run.decoder.path.exists() and not run.datastore("train").path.exists()
    train, train_offset = _tokens(run, "train")
    for split in ("train", "valid"):
        target_id, prob, mass, label = _all(run.targets(split), "id", "prob", "mass", "label")
        token, offset = _tokens(run, split)
        np.testing.assert_array_equal(label, token[1:])
        scored = label != TokenSplit.open(run.tokens, split).separator_id
        if split == "train" and share < 1:
            assert 0 < (mass > 0).sum() < scored.sum()
        else:
            np.testing.assert_array_equal(mass > 0, scored)
        first = 0
        if split == "valid":
            first = len(train)
            token = np.concatenate([train, token])
            offset = np.concatenate([train_offset[:-1], offset + first])
        for n in np.flatnonzero(mass > 0)[::61]:
            counts = _expected(token, offset, np.arange(len(train) - 1), n + first, min_count)
            order = [y for y in np.lexsort((np.arange(512), -counts)) if counts[y]][:S]
            used = prob[n] > 0
            assert target_id[n, used].tolist() == order
            np.testing.assert_allclose(prob[n, used], counts[order] / counts.sum(), rtol=1e-3)
        assert "temperature" not in run.targets(split).load().counts
    # An uninterrupted run makes the same.
    if min_count == 1:
        other = make_run(keys=False, store=tmp_path / "other", targets=changes)
        run_stages(_target_stages(other))
        for one, two in zip(_target_stages(run), _target_stages(other), strict=True):
            assert one.artifact.load().fingerprint == two.artifact.load().fingerprint


def _write_arrow(arrow, path, label, rng, form):
    """Writes a distribution for each label; returns their tokens and probabilities."""
    rows = []
    for _ in label:
        count = int(rng.integers(1, 9))
        weight = np.sort(rng.random(count))[::-1]
        prob = (weight / weight.sum()).astype(np.float16)
        prob[-1:] = prob[-2:-1] if count > 2 else prob[-1:]  # Equal ones, still descending.
        prob = (prob / prob.sum(dtype=np.float32)).astype(np.float16)
        rows.append((rng.choice(250, count, replace=False).astype(np.int32), prob))
    columns = {
        "id_cnt": arrow.array([len(ids) for ids, _ in rows], arrow.int32()),
        "token_id": arrow.array([ids for ids, _ in rows], arrow.list_(arrow.int32())),
        "prob": arrow.array([prob for _, prob in rows], arrow.list_(arrow.float16())),
        "label": arrow.array(label, arrow.int32()),
    }
    table = arrow.table(columns)
    with form(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=100)
    return rows


def test_targets_of_the_official_code_are_taken_over(make_run, tmp_path):
    """Every row's most probable tokens, bit for bit; files about other text are refused."""
    arrow = pytest.importorskip("pyarrow", reason="targets in Arrow files need pyarrow")
    given = {"teacher": "arrow", "train_arrow": str(tmp_path / "train")}
    given["valid_arrow"] = str(tmp_path / "valid.arrow")
    tokens = make_run(keys=False)
    (tmp_path / "train").mkdir()
    separator = TokenSplit.open(tokens.tokens, "train").separator_id
    label = {split: _tokens(tokens, split)[0][1:] for split in ("train", "valid")}
    about = {"train": np.arange(len(label["train"]))}
    about["valid"] = np.flatnonzero(label["valid"] != separator)  # Separators are left out.
    half, rng = len(label["train"]) // 2, np.random.default_rng(0)
    stream, file = arrow.ipc.new_stream, arrow.ipc.new_file
    parts = label["train"][:half], label["train"][half:]
    rows = {
        "train": [
            row
            for place, part in enumerate(parts)
            for row in _write_arrow(arrow, tmp_path / f"train/{place}.arrow", part, rng, stream)
        ],
        "valid": _write_arrow(
            arrow, tmp_path / "valid.arrow", label["valid"][about["valid"]], rng, file
        ),
    }
    run = make_run(keys=False, targets=given)
    run_stages(_target_stages(run))
    for split in ("train", "valid"):
        target_id, prob, mass, stored = _all(run.targets(split), "id", "prob", "mass", "label")
        np.testing.assert_array_equal(stored, label[split])
        np.testing.assert_array_equal(mass > 0, label[split] != separator)
        for n, (ids, probs) in zip(about[split], rows[split], strict=True):
            if label[split][n] == separator:
                continue
            order = np.lexsort((ids, -probs))[:S]
            assert target_id[n][: len(order)].tolist() == ids[order].tolist()
            np.testing.assert_array_equal(prob[n][: len(order)], probs[order])
            assert not prob[n][len(order) :].any()
    wrong = label["valid"].copy()
    wrong[5] = (wrong[5] + 1) % 250
    for changed, message in ((wrong, "row 5 has the label"), (wrong[:-1], "are cut off, or")):
        _write_arrow(arrow, tmp_path / "valid.arrow", changed, rng, file)
        other = make_run(keys=False, targets=given)
        assert other.targets("valid").relative != run.targets("valid").relative
        with pytest.raises(UserError, match=message):
            run_stages(_target_stages(other))
