"""Targets for several temperatures: the share of their time that goes into reading neighbours.

    .venv/bin/python -m benchmarks.temperatures [--rows N] [--neighbors K] [--tokens S]

One pass over neighbour lists for all temperatures would save this share of each target artifact
but the first. Distances and labels are drawn at random; lists and targets are stored as by a run,
on the disk of the temporary directory (its cache is warm). Printed are medians of the rounds.
"""

import argparse
import statistics
import tempfile

import numpy as np
from etils import epath

from benchmarks.exact_search import Spent, spend
from mlpmem_jax.config.data import DatastoreConfig, TargetsConfig
from mlpmem_jax.retrieval.distributions import SparseDistributions, sparse_distributions
from mlpmem_jax.retrieval.merge import Neighbors
from mlpmem_jax.retrieval.neighbors import StoredNeighbors
from mlpmem_jax.store.array_specs import neighbors_arrays, targets_arrays
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.shards import ShardWriter

STORE = DatastoreConfig()
VOCABULARY = 32_000
PARTS = ("read", "distributions", "write")


def stored_neighbors(folder: epath.Path, num_rows: int, num_neighbors: int) -> StoredNeighbors:
    """Returns lists of random neighbours, nearest first."""
    draw = np.random.default_rng(0)
    artifact = Artifact(folder, "neighbors/random", "neighbors")
    artifact.begin({})
    writer = ShardWriter(artifact.path, neighbors_arrays(STORE, num_neighbors), num_rows)
    for part in writer.own_rows():
        shape = (part.stop - part.start, num_neighbors)
        distance = np.sort(draw.gamma(2.0, 10.0, shape).astype(np.float32), axis=1)
        writer.put(
            part.start,
            {"row": draw.integers(0, num_rows, shape, np.int64), "distance": distance},
        )
    artifact.finish(counts={"rows": num_rows}, arrays=writer.close())
    return StoredNeighbors(artifact)


def make_targets(
    stored: StoredNeighbors, writer: ShardWriter, label_N: np.ndarray, num_tokens: int, tau: float
) -> dict[str, Spent]:
    """Makes targets of all rows, a shard at a time; returns what each part took."""
    total = dict.fromkeys(PARTS, Spent(0.0, 0.0))

    def add(name: str, spent: Spent) -> None:
        total[name] = Spent(total[name].wall + spent.wall, total[name].cpu + spent.cpu)

    for part in writer.own_rows():
        found: Neighbors
        made: SparseDistributions
        spent, found = spend(lambda rows=part: stored.read(rows.start, rows.stop))
        add("read", spent)
        label_QK = label_N[found.row_QK]
        spent, made = spend(
            lambda one=found, labels=label_QK: sparse_distributions(
                one.distance_QK, labels, tau, num_tokens
            )
        )
        add("distributions", spent)
        arrays = {
            "id": made.id_QS,
            "prob": made.prob_QS,
            "mass": made.mass_Q,
            "label": label_N[part].astype(np.int32),
        }
        add("write", spend(lambda rows=part, held=arrays: writer.put(rows.start, held))[0])
    writer.close()
    return total


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1 << 16)
    parser.add_argument("--neighbors", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    flags = parser.parse_args()
    label_N = np.random.default_rng(1).zipf(1.3, flags.rows) % VOCABULARY
    rounds: list[dict[str, Spent]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = epath.Path(name)
        stored = stored_neighbors(folder, flags.rows, flags.neighbors)
        for turn in range(flags.rounds):
            specs = targets_arrays(STORE, TargetsConfig(num_tokens=flags.tokens), VOCABULARY)
            writer = ShardWriter(folder / f"targets-{turn}", specs, flags.rows)
            rounds.append(make_targets(stored, writer, label_N, flags.tokens, 2.0 ** (turn + 2)))
    for clock in ("wall", "cpu"):
        seconds = {
            part: statistics.median(getattr(one[part], clock) for one in rounds) for part in PARTS
        }
        total = sum(seconds.values())
        shares = ", ".join(f"{part} {value / total:.1%}" for part, value in seconds.items())
        print(f"{clock}: {total:.2f} s = {shares}")


if __name__ == "__main__":
    main()
