"""An index of cells: keys in the order of their cells, made in bounded memory.

First *runs*: ranges of rows, as many as memory for one allows, each written in the order of cells.
Then every shard of the result takes its part of each run. Both passes go on after a kill, a run or
a shard at a time. Suffixes: C centroids, R runs, N rows.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from mlpmem_jax.config.data import RetrievalConfig
from mlpmem_jax.config.networks import MeshConfig
from mlpmem_jax.console import say
from mlpmem_jax.parallel.agreement import of_first
from mlpmem_jax.parallel.hardware import check_host_memory
from mlpmem_jax.parallel.mesh import make_mesh
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
        "use a host with more memory",
    )
    missing = routed_index_bytes(keys.num_rows, width, keys.dtype.itemsize)
    check_free_space(path, missing + writer.missing_bytes(), "the index, with its runs")
    centroids = _centroids(path, keys, retrieval, seed, mesh)
    runs = _write_runs(path / _RUNS, keys, centroids, specs)
    count_RC = _counts(runs, len(centroids.centroid_CD))
    most = largest_cell(keys.num_rows, len(centroids.centroid_CD))
    centroid_of_C, start_C = balanced(count_RC.sum(axis=0), most)
    if is_writer():
        kept = dataclasses.replace(centroids, centroid_CD=centroids.centroid_CD[centroid_of_C])
        _write_centroids(path / CELLS, kept, start=start_C)
    say(f"index: {len(centroid_of_C):,} cells, the largest of {int(np.diff(start_C).max()):,} rows")
    _write_cells(writer, path / _RUNS, count_RC)
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
    arrays = {"centroid": centroids.centroid_CD, "group": centroids.group_GD}
    index_files.write_whole(folder, arrays | others)


def _read_centroids(files: Mapping[str, np.ndarray]) -> groups.Centroids:
    if "group" not in files:  # Of before there were groups.
        return groups.one_group(files["centroid"])
    return groups.Centroids(files["centroid"], files["group"])


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
    local = jax.local_devices()
    assign = groups.assigner(centroids, make_mesh(MeshConfig(data=len(local)), local))
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
    """Returns how many rows of each run each cell has, int64 [R, C]."""
    store = open_array(runs.path / "cell")
    count_RC = np.zeros((runs.num_shards, cells), np.int64)
    for run in range(runs.num_shards):
        rows = runs.rows_of(run)
        count_RC[run] = np.bincount(read_rows(store, rows.start, rows.stop), minlength=cells)
    return count_RC


def _write_cells(writer: ShardWriter, runs: epath.Path, count_RC: np.ndarray) -> None:
    """Writes the shards of the result that are missing; every process makes its own."""
    stores = {name: open_array(runs / name) for name in ("key", "row", "cell")}
    parts_of = _parts(count_RC, writer.shard_rows)
    for places in writer.own_rows():
        parts = [part for part in parts_of(places) if part.start < part.stop]
        # In the order of runs, and so of rows: a stable sort leaves a cell's rows ascending.
        read = {
            name: np.concatenate([read_rows(store, part.start, part.stop) for part in parts])
            for name, store in stores.items()
        }
        order_N = np.argsort(read.pop("cell"), kind="stable")
        writer.put(places.start, {name: values[order_N] for name, values in read.items()})
    writer.close()


def _parts(count_RC: np.ndarray, run_rows: int) -> Callable[[slice], list[slice]]:
    """Returns a function from places of the result to the rows of each run that lie there."""
    offset_C = np.append(0, np.cumsum(count_RC.sum(axis=0)))
    earlier_RC = np.cumsum(count_RC, axis=0) - count_RC  # Rows of a cell in earlier runs.
    inside_RC = np.cumsum(count_RC, axis=1) - count_RC  # Rows of a run in earlier cells.
    first_R = np.arange(len(count_RC)) * run_rows

    def before(place: int) -> np.ndarray:
        """Returns how many rows of each run lie before a place."""
        cell = int(np.searchsorted(offset_C, place, side="right")) - 1
        if cell == count_RC.shape[1]:
            return count_RC.sum(axis=1)
        own_R = place - offset_C[cell] - earlier_RC[:, cell]
        return inside_RC[:, cell] + np.clip(own_R, 0, count_RC[:, cell])

    def parts(places: slice) -> list[slice]:
        bounds = zip(first_R + before(places.start), first_R + before(places.stop), strict=True)
        return [slice(int(start), int(stop)) for start, stop in bounds]

    return parts


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
