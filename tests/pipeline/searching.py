"""What tests of `index` and `retrieve` share: a made-up datastore, and a search of it."""

import numpy as np

from mlpmem_jax.pipeline import index, retrieve
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.stage import run_stages
from mlpmem_jax.store.array_specs import SPLITS, datastore_arrays
from mlpmem_jax.store.arrays import open_array, read_rows
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


def run_maker(make_config):
    """Returns a maker of runs whose datastores hold such states, without tokens or a decoder."""

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


def search(run):
    run_stages([*index.stages(run), *retrieve.stages(run)])
    return run


def read_array(artifact, name):
    store = open_array(artifact.path / name)
    return read_rows(store, 0, store.shape[0])


def nearest_rows(layout, split):
    """Distances and rows of all neighbours by plain NumPy."""
    train = read_array(layout.datastore("train"), "key").astype(np.float32)
    query = read_array(layout.datastore(split), "key").astype(np.float32)
    distance = np.empty((len(query), len(train)), np.float32)
    for start in range(0, len(query), 50):  # All differences at once would fill a gigabyte.
        difference = query[start : start + 50, None] - train[None]
        distance[start : start + 50] = np.einsum("qnd,qnd->qn", difference, difference)
    if split == "train":
        np.fill_diagonal(distance, np.inf)
    order = np.argsort(distance, axis=1, kind="stable")[:, :K]
    return np.take_along_axis(distance, order, axis=1), order
