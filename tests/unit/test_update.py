"""Neighbours after rows came or went: those of a plain search among what is there now."""

from pathlib import Path

import numpy as np
import pytest

from mlpmem_jax.config.data import DatastoreConfig, RetrievalConfig
from mlpmem_jax.config.networks import MeshConfig
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.retrieval.index_builder import ExactCache
from mlpmem_jax.retrieval.search import Search, keep_neighbors
from mlpmem_jax.retrieval.update import UpdateInputs, update_neighbors
from mlpmem_jax.store.array_specs import Split, datastore_arrays
from mlpmem_jax.store.joined import Rows
from mlpmem_jax.store.manifest import Artifact, Completion
from mlpmem_jax.store.shards import ShardWriter
from tests.pipeline.changing import arrays, searched

STORE = DatastoreConfig(arrays=("key",), shard_rows=64, chunk_rows=16)
RETRIEVAL = RetrievalConfig(engine="exact", num_neighbors=20, query_batch=50)
WIDTH = 6


def _rows(root: Path, name: str, key_ND: np.ndarray) -> Artifact:
    artifact = Artifact(root, f"datastore/{name}", "datastore")
    artifact.begin({})
    writer = ShardWriter(artifact.path, datastore_arrays(STORE, WIDTH), len(key_ND))
    for part in writer.own_rows():
        writer.put(part.start, {"key": key_ND[part]})
    artifact.finish(counts={"rows": len(key_ND)}, arrays=writer.close())
    return artifact


def _joined(root: Path, name: str, rows: Rows, like: Artifact) -> Artifact:
    artifact = Artifact(root, f"datastore/{name}", "datastore")
    artifact.begin({})
    artifact.finish(counts=rows.counts(), arrays=rows.arrays(like.load()))
    return artifact


def _finished(artifact: Artifact, done: Completion) -> Artifact:
    artifact.finish(counts=done.counts, arrays=done.arrays, measured=done.measured)
    return artifact


def _cache(rows: Artifact, retrieval: RetrievalConfig) -> ExactCache:
    return ExactCache(rows, retrieval, MeshConfig())


def _anew(
    artifact: Artifact, train: Artifact, rows: Artifact, split: Split, retrieval: RetrievalConfig
) -> Artifact:
    artifact.begin({})
    search = Search(train, None, _cache(train, retrieval), retrieval, 0, train)
    return _finished(artifact, keep_neighbors(artifact, rows, split, STORE, search))


def _keys(seed: int, num_rows: int) -> np.ndarray:
    """Few different keys, so that many distances are equal."""
    draws = np.random.default_rng(seed)
    return draws.integers(0, 3, (num_rows, WIDTH)).astype(np.float16)


# New rows: fewer than K, more than are asked for at first, and as many as all others.
@pytest.mark.parametrize("num_new", [3, 40, 300])
@pytest.mark.parametrize("memory_bytes", ["auto", 12_000])
def test_appending_and_removing_equal_a_search_of_everything(tmp_path, num_new, memory_bytes):
    retrieval = RETRIEVAL.model_copy(update={"memory_bytes": memory_bytes})
    # All new rows near some of the old: then more than are asked for at first belong to a list.
    new_ND = _keys(1, num_new)
    new_ND[: num_new // 2] = 1
    parts = {"old": _keys(0, 300), "new": new_ND, "valid": _keys(2, 90)}
    old, new, valid = (_rows(tmp_path, name, key_ND) for name, key_ND in parts.items())
    rows = Rows.of(old).followed_by(Rows.of(new))
    both = _joined(tmp_path, "both", rows, old)
    is_kept_N = np.ones(rows.num_rows, bool)
    is_kept_N[[*range(30), *range(100, 130), 301]] = False
    fewer = _joined(tmp_path, "fewer", rows.kept(is_kept_N), old)
    splits: dict[Split, Artifact] = {"train": old, "valid": valid}
    for split in splits:
        queries = old if split == "train" else valid
        kept = _anew(
            Artifact(tmp_path, f"neighbors/{split}", "neighbors"), old, queries, split, retrieval
        )
        for before, after in ((old, both), (both, fewer)):
            queries = after if split == "train" else valid
            artifact = Artifact(tmp_path, f"neighbors/{split}-{after.path.name}", "neighbors")
            artifact.begin({})
            appended = _cache(new, retrieval) if after is both else None
            cache = _cache(after, retrieval)
            inputs = UpdateInputs(before, after, cache, appended, kept, retrieval, STORE)
            _finished(artifact, update_neighbors(artifact, queries, split, inputs))
            again = Artifact(tmp_path, f"neighbors/{split}-{after.path.name}-anew", "neighbors")
            expected = arrays(_anew(again, after, queries, split, retrieval))
            found = arrays(artifact)
            np.testing.assert_array_equal(found["row"], expected["row"])
            np.testing.assert_array_equal(found["distance"], expected["distance"])
            plain = searched(arrays(queries)["key"], arrays(after)["key"], 20, own=split == "train")
            np.testing.assert_array_equal(found["row"], plain["row"])
            kept = artifact


def test_too_few_rows_are_left(tmp_path):
    old = _rows(tmp_path, "old", _keys(0, 40))
    is_kept_N = np.arange(40) < 20
    few = _joined(tmp_path, "few", Rows.of(old).kept(is_kept_N), old)
    kept = _anew(Artifact(tmp_path, "neighbors/old", "neighbors"), old, old, "train", RETRIEVAL)
    artifact = Artifact(tmp_path, "neighbors/few", "neighbors")
    inputs = UpdateInputs(old, few, _cache(few, RETRIEVAL), None, kept, RETRIEVAL, STORE)
    with pytest.raises(ConfigError, match="num_neighbors=20 is more than the 19 other rows"):
        update_neighbors(artifact, few, "train", inputs)
