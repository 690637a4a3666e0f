"""What rows far from all others cost ScaNN's recall: in its codes, and searched exactly.

    .venv/bin/python -m benchmarks.far_rows DATASTORE [--rows 100000] [--neighbors 128]

DATASTORE is an artifact of `embed`, runs/…/artifacts/datastore/ID. Prints how many rows are far,
and recall and queries a second of both indexes at several settings, on the same 256 queries.
"""

import argparse
import tempfile
import time
from unittest import mock

import numpy as np
from etils import epath

from mlpmem_jax.config.data import RetrievalConfig
from mlpmem_jax.console import quiet_libraries, say
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.retrieval import approximate, recall
from mlpmem_jax.retrieval.engine import ArrayKeys
from mlpmem_jax.retrieval.exact import ExactEngine
from mlpmem_jax.retrieval.far_rows import far_rows
from mlpmem_jax.store.arrays import open_array, read_rows

SHARES = (0.025, 0.1, 1.0)  # Of the leaves that are searched.
CANDIDATES = (2, 8)  # For each neighbour.


def main() -> None:
    """Builds both indexes and prints their recall."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("datastore", type=epath.Path)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--neighbors", type=int, default=128)
    flags = parser.parse_args()
    quiet_libraries()
    stored = open_array(flags.datastore / "key")
    key_ND = read_rows(stored, 0, min(flags.rows, stored.shape[0])).astype(np.float32)
    keys, config = ArrayKeys(key_ND), RetrievalConfig(num_neighbors=flags.neighbors)
    exact = ExactEngine(keys, single_device_mesh())
    sample = recall.draw_sample(keys, exact.search, 256, flags.neighbors, (0, 2))
    say(f"{len(far_rows(key_ND)):,} of {len(key_ND):,} rows are far")
    leaves = approximate.num_leaves(config, len(key_ND))
    no_rows = mock.patch.object(approximate, "far_rows", lambda _: np.empty(0, np.int64))
    for name in ("in its codes", "searched exactly"):
        with tempfile.TemporaryDirectory(prefix="far-rows-") as root:
            path = epath.Path(root) / "index"
            if name == "in its codes":
                with no_rows:
                    list(approximate.build_shards(keys, path, config))
            else:
                list(approximate.build_shards(keys, path, config))
            for share in SHARES:
                for each in CANDIDATES:
                    settings = approximate.SearchSettings(
                        max(1, round(share * leaves)), each * (flags.neighbors + 1)
                    )
                    engine = approximate.ApproximateEngine(path, settings)
                    started = time.monotonic()
                    engine.search(sample.query_QD, flags.neighbors + 1)
                    rate = len(sample.row_Q) / (time.monotonic() - started)
                    found = recall.measure(engine, sample)
                    say(f"far rows {name}: {settings} recall {found:.4f}, {rate:,.0f} queries/s")


if __name__ == "__main__":
    main()
