"""Making and opening a routed search: cells, how many a query visits, and those in memory."""

import dataclasses
from collections.abc import Callable
from typing import Any

from etils import epath

from mlpmem_jax.config.data import RetrievalConfig
from mlpmem_jax.console import say
from mlpmem_jax.parallel.agreement import smallest_of_all
from mlpmem_jax.parallel.hardware import check_host_memory, host_memory
from mlpmem_jax.parallel.multihost import is_writer
from mlpmem_jax.retrieval import recall
from mlpmem_jax.retrieval.estimates import first_cells_to_search, routed_plan
from mlpmem_jax.retrieval.key_shards import KeyShards
from mlpmem_jax.retrieval.routed import Cells, CellSettings, RoutedEngine
from mlpmem_jax.retrieval.routed_index import described, stored_cells, unfinished_cells
from mlpmem_jax.store.files import describe_file, read_json, write_json
from mlpmem_jax.store.manifest import Artifact, Completion

SEARCH = "search.json"


def finish_routed(
    path: epath.Path,
    arrays: dict[str, Any],
    retrieval: RetrievalConfig,
    draw: Callable[[], recall.Sample],
) -> Completion:
    """Chooses how an index is searched whose cells are built.

    Args:
        arrays: What `build_cells` returned.
        draw: Draws the sample on which the number of cells to visit is chosen.
    """
    cells, measured = unfinished_cells(path), {}
    settings, calibrated = _choose_settings(path, cells, retrieval, draw)
    if calibrated is not None:
        measured["calibration_recall"] = calibrated
        recall.warn_of(calibrated, retrieval, settings)
    if is_writer():
        write_json(path / SEARCH, dataclasses.asdict(settings))
    files = described(path)
    if is_writer():
        files[SEARCH] = describe_file(path / SEARCH)
    count = len(cells.centroid_CD)
    say(f"index: {settings.cells_to_search} of {count} cells are searched")
    counts = {"shard_by": "cells", "cells": count, **dataclasses.asdict(settings)}
    return Completion(counts, arrays, files, measured)


def _choose_settings(
    path: epath.Path,
    cells: Cells,
    retrieval: RetrievalConfig,
    draw: Callable[[], recall.Sample],
) -> tuple[CellSettings, float | None]:
    """Chooses how many cells to visit: auto is raised until the recall suffices."""
    count = len(cells.centroid_CD)
    first = CellSettings(first_cells_to_search(retrieval, cells.num_rows, count))
    if retrieval.cells_to_search != "auto":
        return first, None
    sample = draw()  # Before the cells are loaded: keys need not fit in memory twice.
    engine = _open(path, cells, first, retrieval)

    def measure_with(settings: CellSettings) -> float:
        if isinstance(engine, RoutedEngine):
            engine.settings = settings
            return recall.measure(engine, sample)
        return recall.measure(_open(path, cells, settings, retrieval), sample)

    return recall.calibrate(measure_with, first, CellSettings(count), retrieval.min_recall)


def open_routed(
    artifact: Artifact, retrieval: RetrievalConfig, settings: CellSettings | None = None
) -> tuple[RoutedEngine | KeyShards, CellSettings]:
    """Opens the engine of a finished index whose files are verified, and how it searches.

    Args:
        settings: How thoroughly; None: as was chosen when it was built.

    Raises:
        ArtifactError: A file is missing or damaged.
        UserError: Memory does not hold a key shard.
    """
    if settings is None:
        settings = CellSettings(**read_json(artifact.path / SEARCH))
    return _open(artifact.path, stored_cells(artifact), settings, retrieval), settings


def _open(
    path: epath.Path, cells: Cells, settings: CellSettings, retrieval: RetrievalConfig
) -> RoutedEngine | KeyShards:
    """Opens cells: all of them, or some key shards at a time, in every process."""
    memory = smallest_of_all(host_memory())
    plan = routed_plan(cells.num_rows, cells.centroid_CD.shape[1], retrieval, memory)
    plan.check()
    check_host_memory(
        plan.held_bytes, f"{path}: cells of {plan.at_once} key shards at a time", plan.way_out
    )
    if plan.num_loads == 1:
        return RoutedEngine(cells, settings)

    starts = range(0, plan.num_shards, plan.at_once)
    held = [cells.shard(range(n, n + plan.at_once), plan.num_shards) for n in starts]
    capacity = max(cells.num_rows_of(some) for some in held)

    def load(shards: range) -> RoutedEngine:
        return RoutedEngine(cells, settings, cells.shard(shards, plan.num_shards), capacity)

    # Each process searches for its own rows in all cells.
    return KeyShards("routed", cells.num_rows, plan, load, spans_processes=False)
