"""Search for the targets of all rows: routed against exact and ScaNN, as rows grow.

    .venv/bin/python -m benchmarks.routing [--rows 125000 500000] [--width 64] [--neighbors 128]
        [--queries 16384] [--exact-queries 2048] [--min-recall 0.9] [--rounds 2]
        [--datastore runs/…/artifacts/datastore/ID]

Makes up clustered keys, or takes the first of a datastore, builds the index of each engine, chooses
how thoroughly it searches for the recall, and measures the rate on training rows, engines in turns;
seconds of all rows follow from the faster round. Rows are searched in the order of the engine,
batches of those that `retrieve` reads at once. Prints the exponents of time in rows that the sizes
give.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from etils import epath

from mlpmem_jax.config.data import RetrievalConfig
from mlpmem_jax.console import quiet_libraries, say
from mlpmem_jax.parallel.host import keep_freed_memory
from mlpmem_jax.parallel.mesh import single_device_mesh
from mlpmem_jax.retrieval import approximate, recall
from mlpmem_jax.retrieval.engine import ArrayKeys, Engine, is_approximate_installed
from mlpmem_jax.retrieval.exact import ExactEngine
from mlpmem_jax.retrieval.index_builder import choose_settings
from mlpmem_jax.retrieval.merge import drop_own_row
from mlpmem_jax.retrieval.neighbors import rows_at_once
from mlpmem_jax.retrieval.routed import CellSettings, RoutedEngine
from mlpmem_jax.retrieval.routed_builder import finish_routed
from mlpmem_jax.retrieval.routed_index import build_cells, unfinished_cells
from mlpmem_jax.store.arrays import open_array, read_rows

_CENTRES = 500
_BATCH = 8192


class Built(NamedTuple):
    """An engine with its index.

    Attributes:
        engine: To search with.
        build_secs: Of its index, the choice of its settings included.
        about: Its settings, in words.
        num_queries: To measure its rate on.
    """

    engine: Engine
    build_secs: float
    about: str
    num_queries: int


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[125_000, 500_000])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--neighbors", type=int, default=128)
    parser.add_argument("--queries", type=int, default=16_384)
    parser.add_argument("--exact-queries", type=int, default=2048)
    parser.add_argument("--min-recall", type=float, default=0.9)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--datastore", type=epath.Path)
    return parser.parse_args()


def _keys(num_rows: int, width: int, datastore: epath.Path | None) -> np.ndarray:
    """Returns states, or keys around centres with variances that fall as those of states do."""
    if datastore is not None:
        stored = open_array(datastore / "key")
        return read_rows(stored, 0, min(num_rows, stored.shape[0])).astype(np.float32)
    generator = np.random.default_rng(0)
    scale_D = (1 + np.arange(width)) ** -0.5
    centre_CD = generator.normal(size=(_CENTRES, width)) * scale_D
    key_ND = np.empty((num_rows, width), np.float32)
    for start in range(0, num_rows, 1 << 16):
        part = key_ND[start : start + (1 << 16)]
        noise = generator.normal(size=part.shape) * scale_D
        part[:] = centre_CD[generator.integers(0, _CENTRES, len(part))] + 0.7 * noise
    return key_ND


def _engines(flags: argparse.Namespace, keys: ArrayKeys, root: epath.Path) -> dict[str, Built]:
    """Builds every engine, on the same sample of truth; exact search has no index."""
    config = RetrievalConfig(num_neighbors=flags.neighbors, min_recall=flags.min_recall)
    mesh, rows = single_device_mesh(), keys.num_rows
    exact = ExactEngine(keys, mesh, config.key_chunk_rows)
    truth = recall.draw_sample(keys, exact.search, config.recall_queries, flags.neighbors, (0, 1))
    built = {"exact": Built(exact, 0.0, "", min(rows, flags.exact_queries))}
    queries, started = min(rows, flags.queries), time.monotonic()
    arrays = build_cells(root / "cells", keys, 512, config, 0, mesh)
    made = finish_routed(root / "cells", arrays, config, lambda: truth)
    settings = CellSettings(int(made.counts["cells_to_search"]))
    engine = RoutedEngine(unfinished_cells(root / "cells"), settings)
    seconds, count = time.monotonic() - started, made.counts["cells"]
    about = f"{settings.cells_to_search} of {count} cells"
    built["routed"] = Built(engine, seconds, about, queries)
    if is_approximate_installed():
        started = time.monotonic()
        list(approximate.build_shards(keys, root / "scann", config))
        chosen, _ = choose_settings(root / "scann", keys, lambda: exact, config, 0)
        found = approximate.ApproximateEngine(root / "scann", chosen)
        about = f"{chosen.num_leaves_to_search} leaves, {chosen.num_reorder} candidates"
        built["scann"] = Built(found, time.monotonic() - started, about, queries)
    return built


def _rate(one: Built, keys: ArrayKeys, num_neighbors: int) -> float:
    """Returns queries per second, on batches from all over the rows that are read at once."""
    started = time.monotonic()
    block = min(keys.num_rows, rows_at_once(_BATCH, keys.width, num_neighbors))
    order_N = one.engine.visiting_order(slice(0, block))
    order_N = np.arange(block) if order_N is None else order_N
    sorting = (time.monotonic() - started) * one.num_queries / block  # Its share.
    started = time.monotonic()
    size = min(_BATCH, one.num_queries)
    for start in np.linspace(0, block - size, one.num_queries // size, dtype=int):
        row_Q = order_N[start : start + size]
        drop_own_row(one.engine.search(keys.take(row_Q), num_neighbors + 1), row_Q)
    num_searched = one.num_queries // size * size
    return num_searched / (time.monotonic() - started + sorting)


def _measured(
    flags: argparse.Namespace, num_rows: int
) -> tuple[int, dict[str, tuple[float, float]]]:
    """Prints a size; returns rows, and seconds of search, and of index and search, by engine."""
    keys = ArrayKeys(_keys(num_rows, flags.width, flags.datastore))
    num_rows = keys.num_rows
    seconds = {}
    with tempfile.TemporaryDirectory(prefix="routing-") as root:
        built = _engines(flags, keys, epath.Path(root))
        exact = built["exact"].engine
        sample = recall.draw_sample(keys, exact.search, 1024, flags.neighbors, (0, 2))
        found = {name: recall.measure(one.engine, sample) for name, one in built.items()}
        rates = dict.fromkeys(built, 0.0)
        for _ in range(flags.rounds):
            for name, one in built.items():
                rates[name] = max(rates[name], _rate(one, keys, flags.neighbors))
    for name, one in built.items():
        search = num_rows / rates[name]
        seconds[name] = search, one.build_secs + search
        say(
            f"{num_rows:>9,} rows {name:<7} {rates[name]:>9,.0f} queries/s "
            f"({rates[name] / rates['exact']:.1f} x exact), all rows {search:,.1f} s, index "
            f"{one.build_secs:,.1f} s, recall {found[name]:.4f} {one.about}"
        )
    return num_rows, seconds


def _exponent(sizes: Sequence[int], seconds: list[float]) -> float:
    """Returns x of the N^x that fits the times of all sizes."""
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def main() -> None:
    flags = _parsed()
    quiet_libraries()
    keep_freed_memory()
    sizes, measured = zip(*(_measured(flags, rows) for rows in flags.rows), strict=True)
    if len(flags.rows) > 1:
        for place, what in enumerate(("search", "index and search")):
            secs = {name: [one[name][place] for one in measured] for name in measured[0]}
            shown = ", ".join(f"{n} N^{_exponent(sizes, s):.2f}" for n, s in secs.items())
            say(f"time of {what}: {shown}")


if __name__ == "__main__":
    main()
