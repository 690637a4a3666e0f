"""Measures rates that docs/scale.md multiplies: reading text, and merging lists of neighbours.

    .venv/bin/python -m benchmarks.scale_rates [--paths GLOB]

Text is cut into documents as `tokenize` does it, without encoding: the files of --paths, or 50 MB
of made-up words. Sixteen lists of 1,025 neighbours are merged, and sorted whole beside it. All on
one core.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.program import run_main
from mlpmem_jax.config.load import load_config
from mlpmem_jax.corpus.stream import Corpus, Position
from mlpmem_jax.corpus.writer import batches, seen_by_first
from mlpmem_jax.retrieval.merge import Neighbors, merge, sort_neighbors
from mlpmem_jax.store.array_specs import SPLITS

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "gpt2_small.yaml"
LISTS, QUERIES, NEIGHBORS = 16, 512, 1025


def read(paths: str) -> float:
    """Returns the bytes a second at which text becomes documents."""
    config = load_config(str(CONFIG), [f"corpus.paths=['{paths}']"])
    started = time.perf_counter()
    seen = seen_by_first({split: np.zeros(0, np.uint64) for split in SPLITS})
    read_in = batches(Corpus(config.corpus), Position(), seen)
    pieces = (piece for batch in read_in for piece in batch)
    num_bytes = sum(piece.num_bytes for piece in pieces)
    return num_bytes / (time.perf_counter() - started)


def made_up(folder: Path) -> str:
    """Writes 50 MB of words; returns a pattern of their files."""
    random = np.random.default_rng(0)
    words = ["".join(map(chr, random.integers(97, 123, n))) for n in random.integers(2, 9, 5000)]
    lines = [" ".join(random.choice(words, 15)) for _ in range(3000)]
    for number in range(200):
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return f"{folder}/*.txt"


def main() -> None:
    """Prints the rates."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--paths", metavar="GLOB", help="plain text")
    given = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {0})
    with tempfile.TemporaryDirectory() as folder:
        rate = read(given.paths or made_up(Path(folder)))
    print(f"text into documents: {rate / 1e6:.0f} MB/s")
    random = np.random.default_rng(0)
    shape = (QUERIES, NEIGHBORS)
    lists = [
        Neighbors(np.sort(random.random(shape, np.float32)), random.integers(0, 10**8, shape))
        for _ in range(LISTS)
    ]
    started = time.perf_counter()
    merge(lists, NEIGHBORS)
    merged = time.perf_counter() - started
    started = time.perf_counter()
    sort_neighbors(
        np.concatenate([each.distance_QK for each in lists], axis=1),
        np.concatenate([each.row_QK for each in lists], axis=1),
    )
    whole = time.perf_counter() - started
    print(f"merging {LISTS} lists of {NEIGHBORS}: {1e3 * merged / QUERIES:.2f} ms a query")
    print(f"sorting them whole: {1e3 * whole / QUERIES:.2f} ms a query")


if __name__ == "__main__":
    run_main(main)
