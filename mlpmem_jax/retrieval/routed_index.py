"""An index of cells: keys in the order of their cells, made in bounded memory.

First *runs*: ranges of rows, as many as memory for one allows, each written in the order of cells.
Then every shard of the result takes its part of each run. Both passes go on after a kill, a run or
a shard at a time. Suffixes: C centroids, R runs, N rows, P places.
"""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh

from mlpmem_jax.config.data import RetrievalConfig
from mlpmem_jax.console import say
from mlpmem_jax.parallel.agreement import of_first
from mlpmem_jax.parallel.hardware import check_host_memory
from mlpmem_jax.parallel.multihost import barrier, is_writer
from mlpmem_jax.retrieval import groups, index_files
from mlpmem_jax.retrieval.cells import (
    balanced,
    draw_sample,
    largest_cell,
    num_cells,
)
from mlpmem_jax.retrieval.engine import READ_ROWS, Keys, check_finite, row_ranges
from mlpmem_jax.retrieval.estimates import cells_memory_bytes, routed_index_bytes, run_rows
from mlpmem_jax.retrieval.routed import Cells
from mlpmem_jax.store.array_specs import ArraySpec
from mlpmem_jax.store.arrays import open_array, read_rows
from mlpmem_jax.store.files import check_free_space, describe_file
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.shards import ShardWriter
from mlpmem_jax.store.stored_array import StoredArray

CELLS = "cells"
_CENTROIDS, _RUNS = "centroids", "runs"
_BOUNDS_BYTES = 256 << 20  # Of where shards of the result begin and end in runs.
_RUN_CHUNK_ROWS = 64  # A shard of the result takes few rows of each of many runs.


def build_cells(
    path: epath.Path,
    keys: Keys,
    chunk_rows: int,
    retrieval: RetrievalConfig,
    seed: int,
    mesh: Mesh,
) -> dict[str, Any]:
    """Writes keys in the order of cells, or continues where an interrupted start stopped.

    Args:
        path: Directory of the index.
        chunk_rows: Rows of the smallest readable piece.
        seed: Seed of the sample on which centroids are trained.
        mesh: Devices, for k-means.

    Returns:
        The arrays as the manifest describes them.

    Raises:
        UserError: There is too little disk or memory.
    """
    rows, width, itemsize = run_rows(keys.width, keys.dtype.itemsize), keys.width, keys.dtype
    rows = max(chunk_rows, rows - rows % chunk_rows)
    specs = {
        "key": ArraySpec((width,), itemsize, rows, chunk_rows),
        "row": ArraySpec((), np.int64, rows, chunk_rows),
    }
    writer = ShardWriter(path, specs, keys.num_rows)
    if not (writer.missing_shards() or _is_absent(path / CELLS)):
        _remove_intermediate(path)
        return writer.describe()
    check_host_memory(
        cells_memory_bytes(keys.num_rows, width, keys.dtype.itemsize, retrieval),
        "putting keys in the order of cells",
        "lower retrieval.cells, or use a host with more memory",
    )
    missing = routed_index_bytes(keys.num_rows, width, keys.dtype.itemsize)
    check_free_space(path, missing + writer.missing_bytes(), "the index, with its runs")
    centroids = _centroids(path, keys, retrieval, seed, mesh)
    runs = _write_runs(path / _RUNS, keys, centroids, specs)
    count_C = _counts(runs, len(centroids.centroid_CD))
    most = largest_cell(keys.num_rows, len(centroids.centroid_CD))
    centroid_of_C, start_C = balanced(count_C, most)
    if is_writer():
        kept = groups.Centroids.of(centroids.centroid_CD[centroid_of_C], centroids.group_GD)
        _write_centroids(path / CELLS, kept, start=start_C)
    say(f"index: {len(centroid_of_C):,} cells, the largest of {int(np.diff(start_C).max()):,} rows")
    _write_cells(writer, runs, count_C)
    barrier("index: cells")
    _remove_intermediate(path)
    return writer.describe()


def _is_absent(folder: epath.Path) -> bool:
    """Returns whether what every process needs is not there, as process 0 sees it."""
    return bool(of_first(is_writer() and not index_files.is_whole(folder)))


def _centroids(
    path: epath.Path, keys: Keys, retrieval: RetrievalConfig, seed: int, mesh: Mesh
) -> groups.Centroids:
    """Returns trained centroids; those of an interrupted start are kept, or trained again."""
    if _is_absent(path / _CENTROIDS):
        cells = num_cells(retrieval, keys.num_rows, keys.width)
        sample_SD = draw_sample(keys, cells, seed)
        say(f"index: k-means of {cells:,} cells on {len(sample_SD):,} rows")
        centroids = groups.train(sample_SD, cells, mesh)
        if is_writer():
            _write_centroids(path / _CENTROIDS, centroids)
        barrier("index: centroids")
    return _read_centroids(index_files.read_whole(path / _CENTROIDS))


def _write_centroids(folder: epath.Path, centroids: groups.Centroids, **others: np.ndarray) -> None:
    arrays = {
        "centroid": centroids.centroid_CD,
        "group": centroids.group_GD,
        "around": centroids.around_GM,
    }
    index_files.write_whole(folder, arrays | others)


def _read_centroids(files: Mapping[str, np.ndarray]) -> groups.Centroids:
    if "group" not in files:  # The index is from before there were groups.
        return groups.one_group(files["centroid"])
    return groups.Centroids(*(files[name] for name in ("centroid", "group", "around")))


def _write_runs(
    path: epath.Path, keys: Keys, centroids: groups.Centroids, specs: dict[str, ArraySpec]
) -> ShardWriter:
    """Writes ranges of rows, each in the order of cells; every process makes its own."""
    rows, chunk_rows = specs["key"].shard_rows, specs["key"].chunk_rows
    chunk_rows = _RUN_CHUNK_ROWS if chunk_rows % _RUN_CHUNK_ROWS == 0 else chunk_rows
    kept = {name: (spec.tail, spec.dtype) for name, spec in specs.items()}
    kept["cell"] = ((), np.int32)
    run_specs = {name: ArraySpec(*about, rows, chunk_rows) for name, about in kept.items()}
    runs = ShardWriter(path, run_specs, keys.num_rows)
    assign = groups.assigner(centroids, groups.local_mesh())
    for run in runs.own_rows():
        count = run.stop - run.start
        key_ND, cell_N = np.empty((count, keys.width), keys.dtype), np.empty(count, np.int32)
        for part in row_ranges(count, READ_ROWS):
            key_BD = keys.read(run.start + part.start, run.start + part.stop)
            key_ND[part], cell_N[part] = key_BD, assign(key_BD)
        order_N = np.argsort(cell_N, kind="stable")
        key_ND = key_ND[order_N]
        row_N = run.start + order_N.astype(np.int64)
        runs.put(run.start, {"key": key_ND, "row": row_N, "cell": cell_N[order_N]})
        say(f"index: rows {run.start:,} to {run.stop:,} are in the order of cells")
    runs.close()
    barrier("index: runs")
    return runs


def _counts(runs: ShardWriter, cells: int) -> np.ndarray:
    """Returns how many rows each cell has, int64 [C]."""
    count_C = np.zeros(cells, np.int64)
    for cell_N in _cells_of_runs(runs):
        count_C += np.bincount(cell_N, minlength=cells)
    return count_C


def _cells_of_runs(runs: ShardWriter) -> Iterator[np.ndarray]:
    """Yields the cell of each row of every run, ascending: int32."""
    store = open_array(runs.path / "cell")
    for run in range(runs.num_shards):
        rows = runs.rows_of(run)
        yield read_rows(store, rows.start, rows.stop)


def _write_cells(writer: ShardWriter, runs: ShardWriter, count_C: np.ndarray) -> None:
    """Writes the shards of the result that are missing; every process makes its own."""
    stores = {name: open_array(runs.path / name) for name in ("key", "row", "cell")}
    missing = writer.own_rows()
    at_once = max(1, _BOUNDS_BYTES // (16 * runs.num_shards))
    for some in row_ranges(len(missing), at_once):
        _write_some(writer, missing[some], runs, count_C, stores)
    writer.close()


def _write_some(
    writer: ShardWriter,
    missing: Sequence[slice],
    runs: ShardWriter,
    count_C: np.ndarray,
    stores: Mapping[str, Any],
) -> None:
    """Writes some shards of the result, each from its part of every run."""
    bounds = np.array([(places.start, places.stop) for places in missing], np.int64)
    before_RP = _rows_before(runs, count_C, bounds.ravel()).reshape(runs.num_shards, -1, 2)
    for number, places in enumerate(missing):
        start_R, stop_R = before_RP[:, number, 0], before_RP[:, number, 1]
        parts = [slice(*part) for part in zip(start_R.tolist(), stop_R.tolist(), strict=True)]
        parts = [part for part in parts if part.start < part.stop]
        # In the order of runs, and so of rows: a stable sort leaves a cell's rows ascending.
        read = {
            name: np.concatenate([read_rows(store, part.start, part.stop) for part in parts])
            for name, store in stores.items()
        }
        order_N = np.argsort(read.pop("cell"), kind="stable")
        writer.put(places.start, {name: values[order_N] for name, values in read.items()})


def _rows_before(runs: ShardWriter, count_C: np.ndarray, place_P: np.ndarray) -> np.ndarray:
    """Returns where the rows of each run end that lie before some places of the result: [R, P]."""
    offset_C = np.append(0, np.cumsum(count_C))
    cell_P = np.searchsorted(offset_C, place_P, side="right") - 1
    own_P = place_P - offset_C[cell_P]  # Rows of the cell at a place that lie before it.
    before_RP = np.empty((runs.num_shards, len(place_P)), np.int64)
    for run, cell_N in enumerate(_cells_of_runs(runs)):
        first_P, stop_P = (np.searchsorted(cell_N, cell_P, side) for side in ("left", "right"))
        taken_P = np.clip(own_P, 0, stop_P - first_P)
        before_RP[run] = runs.rows_of(run).start + first_P + taken_P
        own_P = own_P - taken_P
    return before_RP


def _remove_intermediate(path: epath.Path) -> None:
    if is_writer():
        for name in (_RUNS, _CENTROIDS):
            if (path / name).exists():
                (path / name).rmtree()


def described(path: epath.Path) -> dict[str, Any]:
    """Returns bytes and CRC-32 of the files of an index of cells, by path in it."""
    names = sorted(file.name for file in (path / CELLS).iterdir())
    return {f"{CELLS}/{name}": describe_file(path / CELLS / name) for name in names}


def unfinished_cells(path: epath.Path) -> Cells:
    """Opens cells whose index has no manifest yet."""
    stores = {name: open_array(path / name) for name in ("key", "row")}
    reads = {name: functools.partial(read_rows, store) for name, store in stores.items()}
    return _cells(path, reads["key"], reads["row"])


def stored_cells(artifact: Artifact) -> Cells:
    """Opens the cells of a finished index; shards are compared with the manifest when read."""
    key, row = StoredArray(artifact, "key"), StoredArray(artifact, "row")
    return _cells(artifact.path, key.read, row.read)


def _cells(
    path: epath.Path,
    read_keys: Callable[[int, int], np.ndarray],
    read_rows_of: Callable[[int, int], np.ndarray],
) -> Cells:
    def finite(start: int, stop: int) -> np.ndarray:
        key_ND = read_keys(start, stop).astype(np.float32, copy=False)
        check_finite(key_ND, start, str(path / "key"))
        return key_ND

    files = index_files.read_whole(path / CELLS)
    return Cells(_read_centroids(files), files["start"], finite, read_rows_of)
