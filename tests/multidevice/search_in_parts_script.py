"""One of several processes that search keys in parts and write what they find. Not a test itself.

python search_in_parts_script.py DIRECTORY exact|scann|routed row|document, with the variables of a
launcher. With `document`, rows of a document are excluded, and some rows are not searched for.
"""

import sys
from pathlib import Path

from mlpmem_jax.parallel import multihost

ROWS, WIDTH, SHARD, K = 1500, 16, 256, 12


def made_up_keys():
    """Returns float32 keys, some of them equal."""
    import numpy as np

    key = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
    key[ROWS // 2 : ROWS // 2 + 3] = key[0]
    return key


def queries(rule):
    """Returns what is searched for: all rows, or a share without the rows of their documents."""
    import numpy as np

    from mlpmem_jax.retrieval.queries import Exclusion, Queries
    from mlpmem_jax.retrieval.shares import Share

    if rule == "row":
        return Queries(are_keys=True)
    # Of the 700 rows of the second document, many are nearer than the K-th other row.
    offset = np.array([0, 300, 1000, 1001, ROWS])
    return Queries(True, Exclusion(offset, by_document=True), Share(0.6, 3))


def specs():
    """Returns the arrays of neighbours, in six shards."""
    import numpy as np

    from mlpmem_jax.store.array_specs import ArraySpec

    return {
        "row": ArraySpec((K,), np.int64, SHARD, 64),
        "distance": ArraySpec((K,), np.float32, SHARD, 64),
    }


def index_config():
    """Returns settings that make five shards of an index, of which memory holds one."""
    from mlpmem_jax.config.data import RetrievalConfig

    return RetrievalConfig(num_neighbors=K, shard_rows=300, memory_bytes=1_100_000)


def routed(path, keys, mesh):
    """Makes an index of cells in groups, five runs by all processes; returns what opens parts."""
    from mlpmem_jax.config.data import RetrievalConfig
    from mlpmem_jax.retrieval import estimates, groups
    from mlpmem_jax.retrieval.routed import CellSettings, RoutedEngine
    from mlpmem_jax.retrieval.routed_index import build_cells, unfinished_cells

    estimates._RUN_BYTES = 320 * (4 * WIDTH + 12)
    groups._AROUND = 12
    config = RetrievalConfig(engine="routed", cells=20)
    build_cells(path, keys, 64, config, 0, mesh)
    cells = unfinished_cells(path)
    assert len(cells.centroids.group_GD) == 16
    everything = CellSettings(10**6)
    return lambda shards: RoutedEngine(cells, everything, cells.shard(shards, 5))


def main():
    import jax
    from etils import epath

    from mlpmem_jax.config.networks import MeshConfig
    from mlpmem_jax.parallel.mesh import make_mesh
    from mlpmem_jax.retrieval.approximate import ApproximateEngine, SearchSettings
    from mlpmem_jax.retrieval.engine import ArrayKeys, SomeKeys
    from mlpmem_jax.retrieval.estimates import KeyShardPlan, index_plan
    from mlpmem_jax.retrieval.exact import ExactEngine
    from mlpmem_jax.retrieval.key_major import search_by_shards
    from mlpmem_jax.retrieval.key_shards import KeyShards
    from mlpmem_jax.retrieval.neighbors import SplitSearch
    from mlpmem_jax.store.shards import ShardWriter

    directory, name, rule = epath.Path(sys.argv[1]), *sys.argv[2:]
    keys, mesh = ArrayKeys(made_up_keys()), make_mesh(MeshConfig(data=4))

    def load_exact(shards):
        first, stop = shards.start * SHARD, min(shards.stop * SHARD, ROWS)
        return ExactEngine(SomeKeys(keys, first, stop - first), mesh, 64, first_row=first)

    def load_index(shards):
        return ApproximateEngine(directory / "index", SearchSettings(17, 300), shards=shards)

    if name == "exact":
        plan, load = KeyShardPlan(6, 2, 0, None, "", ""), load_exact
    elif name == "routed":
        plan, load = KeyShardPlan(5, 2, 0, None, "", ""), routed(directory / "cells", keys, mesh)
    else:
        plan = index_plan(ROWS, WIDTH, index_config(), jax.process_count(), None)
        assert (plan.num_shards, plan.at_once, plan.num_loads) == (5, 2, 3)
        load = load_index
    engine = KeyShards(name, ROWS, plan, load, spans_processes=name != "routed")
    writer = ShardWriter(directory / name, specs(), ROWS, refuse_non_finite=False)
    search_by_shards(
        engine,
        SplitSearch(
            keys=keys,
            writer=writer,
            consume=lambda row, found: {"row": found.row_QK, "distance": found.distance_QK},
            num_neighbors=K,
            query_batch=100,
            queries=queries(rule),
            description=f"search on processes ({name})",
        ),
    )
    Path(directory / f"done-{name}-{jax.process_index()}").touch()


if __name__ == "__main__":
    with multihost.joined():
        main()
