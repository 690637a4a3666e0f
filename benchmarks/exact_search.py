"""Exact search: queries a second and the share of a plain matrix product's rate, top-k included.

    .venv/bin/python -m benchmarks.exact_search [--rows N] [--width D] [--against TREE]

The product of two square matrices, a search for every K, and with --against the same search
by the code of another working tree (say, made by `git worktree add TREE main`) take turns in
one process. Where the machine is shared only ratios of one round are worth reading; on a CPU
those of processor time are the steadier ones. Answers of the two trees must be the same rows.
`--kernel device` times on a CPU what a mesh of accelerators runs. Printed are medians.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.program import run_main
from mlpmem_jax.errors import UserError
from mlpmem_jax.parallel.host import keep_freed_memory

PEAK_SIZE = 2048 if jax.default_backend() == "cpu" else 8192
PEAK_TIMES = 2
INNER_WIDTH, NOISE = 24, 0.3  # Keys of networks lie near a space of far fewer dimensions.
CHUNK_ROWS = 65536


@dataclasses.dataclass(frozen=True)
class Spent:
    """Seconds of one call, by the clock and of all processors."""

    wall: float
    cpu: float


def spend(call: Callable[[], Any]) -> tuple[Spent, Any]:
    """Calls, and returns what it took and returned."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = call()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu), result


def make_keys(generator: np.random.Generator, num_rows: int, width: int) -> np.ndarray:
    """Returns float16 keys with a few dominant directions."""
    normal = functools.partial(np.random.Generator.standard_normal, dtype=np.float32)
    directions = normal(np.random.default_rng(0), (INNER_WIDTH, width))
    key_ND = np.empty((num_rows, width), np.float16)

    def fill(part: tuple[int, np.random.Generator]) -> None:
        start, own = part
        rows = min(CHUNK_ROWS, num_rows - start)
        inner = normal(own, (rows, INNER_WIDTH))
        key_ND[start : start + rows] = inner @ directions + NOISE * normal(own, (rows, width))

    starts = range(0, num_rows, CHUNK_ROWS)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        list(pool.map(fill, zip(starts, generator.spawn(len(starts)), strict=True)))
    return key_ND


def make_search(key_ND: np.ndarray, kernel: str) -> Callable[[np.ndarray, int], Any]:
    """Returns `search` of the package that is found first now."""
    from mlpmem_jax.parallel.mesh import single_device_mesh
    from mlpmem_jax.retrieval import exact
    from mlpmem_jax.retrieval.engine import ArrayKeys

    keys, mesh = ArrayKeys(key_ND), single_device_mesh()
    if kernel == "device":
        return exact._MeshSearch(keys, mesh, CHUNK_ROWS, "cpu").search
    return exact.ExactEngine(keys, mesh, CHUNK_ROWS).search


@contextlib.contextmanager
def package_of(tree: str) -> Iterator[None]:
    """Has imports take the package of another working tree meanwhile."""

    def take_out() -> dict[str, Any]:
        names = [name for name in sys.modules if name.partition(".")[0] == "mlpmem_jax"]
        return {name: sys.modules.pop(name) for name in names}

    own = take_out()
    sys.path.insert(0, tree)
    try:
        yield
    finally:
        sys.path.remove(tree)
        take_out()
        sys.modules.update(own)


def peak(dtype: Any) -> Callable[[], Any]:
    """Returns a call that multiplies square matrices."""
    one = jax.random.normal(jax.random.key(0), (PEAK_SIZE, PEAK_SIZE)).astype(dtype)
    multiply = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    return lambda: [multiply(one, one).block_until_ready() for _ in range(PEAK_TIMES)]


Searches = dict[str, Callable[[np.ndarray, int], Any]]


def in_turns(
    searches: Searches, query_QD: np.ndarray, count: int, rounds: int, multiply: Callable[[], Any]
) -> dict[str, list[Spent]]:
    """Returns what each search and the product took in each round, the first left out."""
    spent: dict[str, list[Spent]] = {name: [] for name in (*searches, "product")}
    for turn in range(rounds + 1):
        seconds, rows = {"product": spend(multiply)[0]}, []
        for name, search in searches.items():
            seconds[name], found = spend(lambda search=search: search(query_QD, count))
            rows.append(found.row_QK)
        for other in rows[1:]:
            np.testing.assert_array_equal(rows[0], other)
        if turn:
            for name, one in seconds.items():
                spent[name].append(one)
    return spent


def ratio(above: list[Spent], below: list[Spent]) -> str:
    """Returns the median over rounds of a ratio of times."""
    pairs = list(zip(above, below, strict=True))
    wall = statistics.median(a.wall / b.wall for a, b in pairs)
    cpu = statistics.median(a.cpu / b.cpu for a, b in pairs)
    return f"{wall:.2f} by the clock, {cpu:.2f} of processors"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1 << 19)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--queries", type=int, nargs="+", default=[1, 16, 2048])
    parser.add_argument("--neighbors", type=int, nargs="+", default=[128, 256, 1024])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kernel", choices=("engine", "device"), default="engine")
    parser.add_argument("--against", help="another working tree")
    flags = parser.parse_args()
    if flags.against and not Path(flags.against, "mlpmem_jax").is_dir():
        raise UserError(f"--against {flags.against}: is no working tree of this project")
    keep_freed_memory()
    generator = np.random.default_rng(1)
    key_ND = make_keys(generator, flags.rows, flags.width)
    query_QD = make_keys(generator, max(flags.queries), flags.width).astype(np.float32)
    searches: Searches = {"here": make_search(key_ND, flags.kernel)}
    if flags.against:
        with package_of(flags.against):
            searches["there"] = make_search(key_ND, flags.kernel)
    on_cpu = jax.default_backend() == "cpu"
    multiply = peak(np.float32 if on_cpu else key_ND.dtype)
    peak_flops = 2 * PEAK_SIZE**3 * PEAK_TIMES
    for count in flags.neighbors:
        for num_queries in flags.queries:
            spent = in_turns(searches, query_QD[:num_queries], count, flags.rounds, multiply)
            flops = 2 * flags.width * flags.rows * num_queries
            seconds = statistics.median(one.wall for one in spent["here"])
            share = [
                Spent(*(flops / peak_flops * x for x in dataclasses.astuple(one)))
                for one in spent["product"]
            ]
            said = f"K {count:>5}, {num_queries:>5} queries: {num_queries / seconds:9,.1f} a second"
            said += f"; share of the product's rate {ratio(share, spent['here'])}"
            if flags.against:
                said += f"; there / here {ratio(spent['there'], spent['here'])}"
            print(said, flush=True)


if __name__ == "__main__":
    run_main(main)
