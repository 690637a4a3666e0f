"""Appending rows, and removing some, against a search of everything anew: seconds and their ratio.

    .venv/bin/python -m benchmarks.append [--rows N] [--width D] [--neighbors K] [--share S]

Keys are drawn at random, old and new ones alike. The three take turns; printed are medians of the
rounds. The neighbours after appending must be those of the search anew.
"""

import argparse
import functools
import statistics
import tempfile
from collections.abc import Callable

import numpy as np
from etils import epath

from benchmarks.exact_search import Spent, make_keys, ratio, spend
from mlpmem_jax.config.data import DatastoreConfig, RetrievalConfig
from mlpmem_jax.config.networks import MeshConfig
from mlpmem_jax.parallel.host import keep_freed_memory
from mlpmem_jax.retrieval.index_builder import ExactCache
from mlpmem_jax.retrieval.neighbors import StoredNeighbors
from mlpmem_jax.retrieval.search import Search, keep_neighbors
from mlpmem_jax.retrieval.update import UpdateInputs, update_neighbors
from mlpmem_jax.store.array_specs import datastore_arrays
from mlpmem_jax.store.joined import Rows
from mlpmem_jax.store.manifest import Artifact, Completion
from mlpmem_jax.store.shards import ShardWriter

STORE = DatastoreConfig(arrays=("key",))
DOCUMENT_ROWS = 500


class Case:
    """Rows, more rows, and both; then both without a document.

    Args:
        root: Where artifacts go.
        num_old: Rows before.
        num_new: Rows that are appended.
        width: D.
        num_neighbors: K.
    """

    def __init__(
        self, root: epath.Path, num_old: int, num_new: int, width: int, num_neighbors: int
    ):
        self._root = root
        self._retrieval = RetrievalConfig(engine="exact", num_neighbors=num_neighbors)
        generator = np.random.default_rng(0)
        self.old, self.new = (
            self._rows(f"part-{size}", make_keys(generator, size, width))
            for size in (num_old, num_new)
        )
        both = Rows.of(self.old).followed_by(Rows.of(self.new))
        self.both = self._joined("both", both)
        is_kept_N = np.ones(both.num_rows, bool)
        is_kept_N[num_old // 2 : num_old // 2 + DOCUMENT_ROWS] = False
        self.fewer = self._joined("fewer", both.kept(is_kept_N))

    def _rows(self, name: str, key_ND: np.ndarray) -> Artifact:
        artifact = Artifact(self._root, f"datastore/{name}", "datastore")
        artifact.begin({})
        writer = ShardWriter(artifact.path, datastore_arrays(STORE, key_ND.shape[1]), len(key_ND))
        for part in writer.own_rows():
            writer.put(part.start, {"key": key_ND[part]})
        artifact.finish(counts={"rows": len(key_ND)}, arrays=writer.close())
        return artifact

    def _joined(self, name: str, rows: Rows) -> Artifact:
        artifact = Artifact(self._root, f"datastore/{name}", "datastore")
        artifact.begin({})
        artifact.finish(counts=rows.counts(), arrays=rows.arrays(self.old.load()))
        return artifact

    def _cache(self, rows: Artifact) -> ExactCache:
        return ExactCache(rows, self._retrieval, MeshConfig())

    def made(self, name: str, build: Callable[[Artifact], Completion]) -> Artifact:
        """Makes neighbours."""
        artifact = Artifact(self._root, f"neighbors/{name}", "neighbors")
        artifact.begin({})
        done = build(artifact)
        artifact.finish(counts=done.counts, arrays=done.arrays, measured=done.measured)
        return artifact

    def anew(self, rows: Artifact, artifact: Artifact) -> Completion:
        """Searches every row among all."""
        search = Search(rows, None, self._cache(rows), self._retrieval, 0, rows)
        return keep_neighbors(artifact, rows, "train", STORE, search)

    def updated(
        self, before: Artifact, after: Artifact, kept: Artifact, artifact: Artifact
    ) -> Completion:
        """Updates the neighbours of the rows before."""
        new = self._cache(self.new) if before is self.old else None
        every = self._cache(after)
        inputs = UpdateInputs(before, after, every, new, kept, self._retrieval, STORE)
        return update_neighbors(artifact, after, "train", inputs)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1 << 16)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--neighbors", type=int, default=64)
    parser.add_argument("--share", type=float, default=0.01, help="of the rows, appended")
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    keep_freed_memory()
    spent: dict[str, list[Spent]] = {"anew": [], "append": [], "remove": []}
    with tempfile.TemporaryDirectory() as folder:
        num_new = max(1, int(flags.rows * flags.share))
        case = Case(epath.Path(folder), flags.rows, num_new, flags.width, flags.neighbors)
        old = case.made("old", functools.partial(case.anew, case.old))
        for turn in range(flags.rounds):
            anew, append, remove = (
                functools.partial(case.anew, case.both),
                functools.partial(case.updated, case.old, case.both, old),
                functools.partial(case.updated, case.both, case.fewer),
            )
            found: dict[str, Artifact] = {}
            for name, build in (("anew", anew), ("append", append)):
                one, found[name] = spend(functools.partial(case.made, f"{name}-{turn}", build))
                spent[name].append(one)
            build = functools.partial(remove, found["append"])
            one, found["remove"] = spend(functools.partial(case.made, f"remove-{turn}", build))
            spent["remove"].append(one)
            rows, lists = StoredNeighbors(found["anew"]), StoredNeighbors(found["append"])
            expected, updated = (each.read(0, each.num_rows) for each in (rows, lists))
            np.testing.assert_array_equal(expected.row_QK, updated.row_QK)
            np.testing.assert_array_equal(expected.distance_QK, updated.distance_QK)
    for name in ("append", "remove"):
        print(f"{name} / anew: {ratio(spent[name], spent['anew'])}")
    print(f"anew: {statistics.median(one.wall for one in spent['anew']):.1f} s")


if __name__ == "__main__":
    main()
