"""Searches an index of several shards, whose share of shards a process holds. Not a test itself.

python shards_script.py DIRECTORY, with the variables of a launcher. Process 0 writes what was
found to DIRECTORY/found.npz; each process how many shards it holds to DIRECTORY/held-K.
"""

import sys
from pathlib import Path

import numpy as np

from mlpmem_jax.parallel import multihost

NUM_ROWS, WIDTH, NUM_NEIGHBORS = 5000, 16, 20


def main():
    import jax
    from etils import epath

    from mlpmem_jax.config.data import RetrievalConfig
    from mlpmem_jax.retrieval.approximate import ApproximateEngine, SearchSettings, build_shards
    from mlpmem_jax.retrieval.engine import ArrayKeys

    directory = Path(sys.argv[1])
    key_ND = np.random.default_rng(0).normal(size=(NUM_ROWS, WIDTH)).astype(np.float32)
    key_ND[1700] = key_ND[3]  # Equal distances in different shards: the smaller row is first.
    keys = ArrayKeys(key_ND)
    path = epath.Path(directory / "index")
    if multihost.is_writer():
        path.mkdir()
    multihost.barrier("directory")
    list(build_shards(keys, path, RetrievalConfig(num_neighbors=NUM_NEIGHBORS, shard_rows=1700)))
    multihost.barrier("built")
    engine = ApproximateEngine(path, SearchSettings(10**4, 400))
    (directory / f"held-{jax.process_index()}").write_text(str(len(engine._shards)))
    found = [engine.search(key_ND[:n], NUM_NEIGHBORS) for n in (300, 1, 0)]
    if multihost.is_writer():
        order = engine.visiting_order(slice(100, NUM_ROWS))
        arrays = {f"row-{n}": each.row_QK for n, each in enumerate(found)}
        arrays |= {f"distance-{n}": each.distance_QK for n, each in enumerate(found)}
        np.savez(directory / "found.npz", order=order, **arrays)


if __name__ == "__main__":
    with multihost.joined():
        main()
