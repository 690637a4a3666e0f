"""Making, checking and opening an index."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from mlpmem_jax.config.data import RetrievalConfig
from mlpmem_jax.config.networks import MeshConfig
from mlpmem_jax.console import say
from mlpmem_jax.errors import ArtifactError, UserError
from mlpmem_jax.parallel.hardware import check_host_memory, device_memory
from mlpmem_jax.parallel.multihost import barrier, first_alone, is_writer
from mlpmem_jax.parallel.sharing import process_count
from mlpmem_jax.retrieval import approximate, index_files, recall
from mlpmem_jax.retrieval.approximate import SEARCH, ApproximateEngine, SearchSettings
from mlpmem_jax.retrieval.engine import Engine, Keys, StoredKeys, choose_engine
from mlpmem_jax.retrieval.estimates import exact_bytes, held_index_bytes
from mlpmem_jax.retrieval.exact import ExactEngine
from mlpmem_jax.retrieval.neighbors import check_enough_rows
from mlpmem_jax.store.files import check_free_space, describe_file, read_json, write_json
from mlpmem_jax.store.manifest import Artifact, Completion
from mlpmem_jax.store.verification import verify_together
from mlpmem_jax.units import human_bytes

# Calibration and measurement draw different rows: the measurement stays unbiased.
CALIBRATION_SEED = 1
SHARD_BY = "rows"  # How keys are dealt to shards: by ranges of rows; cells of centroids may follow.
MEASUREMENT_SEED = 2
_MAX_REORDER_GROWTH = 8


def exact_engine(train: Artifact, mesh: jax.sharding.Mesh, key_chunk_rows: int) -> ExactEngine:
    """Opens the exact engine over the keys of the training rows."""
    keys = StoredKeys(train)
    _check_holds_keys(keys, mesh)
    return ExactEngine(keys, mesh, key_chunk_rows)


def build_index(
    artifact: Artifact,
    train: Artifact,
    retrieval: RetrievalConfig,
    seed: int,
    mesh: jax.sharding.Mesh,
) -> Completion:
    """Builds an index, or continues a build that was interrupted.

    Args:
        artifact: Where it goes.
        train: The datastore of the training rows, whose keys it holds.
        retrieval: The section.
        seed: Seed of the sample on which it is calibrated.
        mesh: Devices.

    Raises:
        UserError: There are too few rows, too little memory or disk, or ScaNN is missing.
    """
    keys = StoredKeys(train)
    check_enough_rows(retrieval.num_neighbors, keys.num_rows, str(train.path))
    choice = choose_engine(retrieval, keys.num_rows, mesh.devices.flat[0].platform)
    say(f"index: {choice.engine} engine ({choice.why})")
    counts: dict[str, Any] = {"engine": choice.engine, "rows": keys.num_rows}
    measured: dict[str, Any] = {"why": choice.why}
    if choice.engine == "exact":  # Nothing to build: it reads the datastore's keys.
        return Completion(counts, measured=measured)
    path = artifact.path
    with first_alone("index: directory"):
        if is_writer():
            index_files.remove_unfinished(path)
    largest = min(keys.num_rows, retrieval.shard_rows)
    check_host_memory(
        approximate.build_memory_bytes(largest, keys.width, retrieval.training_rows),
        "building an index shard",
        f"lower retrieval.shard_rows={retrieval.shard_rows}",
    )
    check_free_space(
        path,
        approximate.index_bytes(keys.num_rows, keys.width, retrieval.dims_per_block),
        "the index",
    )
    for number, of_shards in approximate.build_shards(keys, path, retrieval):
        say(f"index: shard {number + 1} of {of_shards} is built")
    barrier("index: shards")
    num_shards = len(approximate.shard_ranges(keys.num_rows, retrieval.shard_rows))
    files = index_files.shard_files(path, num_shards)
    exact = functools.partial(exact_engine, train, mesh, retrieval.key_chunk_rows)
    settings, calibrated = choose_settings(path, keys, exact, retrieval, seed)
    if calibrated is not None:
        measured["calibration_recall"] = calibrated
    if is_writer():
        write_json(path / SEARCH, dataclasses.asdict(settings))
        files[SEARCH] = describe_file(path / SEARCH)
    shard_rows = max(len(rows) for rows in approximate.shard_ranges(keys.num_rows, largest))
    counts |= {
        "shards": num_shards,
        "shard_by": SHARD_BY,
        "num_leaves": approximate.num_leaves(retrieval, shard_rows),
        **dataclasses.asdict(settings),
    }
    say(
        f"index: {settings.num_leaves_to_search} of {counts['num_leaves']} leaves are searched, "
        f"{settings.num_reorder} candidates scored exactly"
    )
    return Completion(counts, files=files, measured=measured)


def choose_settings(
    path: epath.Path,
    keys: Keys,
    exact: Callable[[], Engine],
    retrieval: RetrievalConfig,
    seed: int,
) -> tuple[SearchSettings, float | None]:
    """Chooses how thoroughly to search: what is auto is raised until the recall suffices.

    Args:
        path: Directory of the finished shards.
        keys: The keys that they hold.
        exact: Opens the exact engine over the same keys, where it is needed.
        retrieval: The section.
        seed: Seed of the sample.

    Returns:
        The settings, and their recall on the calibration sample (none: nothing was auto).
    """
    shard_rows = max(
        len(rows) for rows in approximate.shard_ranges(keys.num_rows, retrieval.shard_rows)
    )
    first = SearchSettings(
        approximate.first_leaves_to_search(retrieval, shard_rows),
        approximate.num_reorder(retrieval),
    )
    last = SearchSettings(
        approximate.num_leaves(retrieval, shard_rows)
        if retrieval.num_leaves_to_search == "auto"
        else first.num_leaves_to_search,
        min(shard_rows, _MAX_REORDER_GROWTH * first.num_reorder)
        if retrieval.num_reorder == "auto"
        else first.num_reorder,
    )
    if first == last:
        return first, None
    engine = ApproximateEngine(path, first)
    sample = recall.draw_sample(
        keys,
        exact().search,
        retrieval.recall_queries,
        retrieval.num_neighbors,
        (seed, CALIBRATION_SEED),
    )

    def measure_with(settings: SearchSettings) -> float:
        engine.settings = settings
        return recall.measure(engine, sample)

    return recall.calibrate(measure_with, first, last, retrieval.min_recall)


def open_index(
    artifact: Artifact, retrieval: RetrievalConfig, width: int, exact: Callable[[], Engine]
) -> tuple[Engine, SearchSettings | None]:
    """Opens the engine that an index names; its files are verified first.

    Args:
        artifact: The index.
        retrieval: The section.
        width: Of its keys.
        exact: Opens the exact engine, where that is the one.

    Returns:
        The engine, and how thoroughly it searches (none: exactly).

    Raises:
        ArtifactError: The index is missing or a file of it is damaged (named).
    """
    manifest = artifact.load()
    verify_together(artifact.path, manifest.files)
    if manifest.counts["engine"] == "exact":
        return exact(), None
    shard_by = manifest.counts.get("shard_by", SHARD_BY)
    if shard_by != SHARD_BY:
        raise ArtifactError(
            f"{artifact.path}: an index whose shards are cut by {shard_by}; this software reads "
            f"shards cut by {SHARD_BY}; make it again with --rebuild"
        )
    settings = SearchSettings(**read_json(artifact.path / SEARCH))
    num_rows = int(manifest.counts["rows"])
    check_host_memory(
        held_index_bytes(num_rows, width, retrieval, process_count()),
        f"{artifact.path}: ScaNN holds all its shards and",
        "use more hosts",
    )
    return ApproximateEngine(artifact.path, settings), settings


class ExactCache:
    """Opens the exact engine once and keeps it while it is needed: its keys fill memory.

    Args:
        train: The datastore of the training rows.
        key_chunk_rows: Keys scored at once.
        mesh: Devices, which are not touched before they are needed.
    """

    def __init__(self, train: Artifact, key_chunk_rows: int, mesh: MeshConfig):
        self._train, self._key_chunk_rows, self._mesh = train, key_chunk_rows, mesh
        self._engine: ExactEngine | None = None

    def __call__(self) -> ExactEngine:
        """Returns the engine."""
        if self._engine is None:
            from mlpmem_jax.parallel.mesh import make_mesh

            mesh = make_mesh(self._mesh)
            self._engine = exact_engine(self._train, mesh, self._key_chunk_rows)
        return self._engine

    def release(self) -> None:
        """Frees its memory; a later call opens it again."""
        self._engine = None


def _check_holds_keys(keys: Keys, mesh: jax.sharding.Mesh) -> None:
    """Refuses exact search over keys that the devices cannot hold.

    Raises:
        UserError: Names what is needed and what there is.
    """
    needed, device = exact_bytes(keys.num_rows, keys.width, mesh.size), jax.local_devices()[0]
    what, way_out = "exact search over all keys", "use more devices or fewer rows"
    if device.platform == "cpu":
        check_host_memory(needed * jax.local_device_count(), what, way_out)
    memory = device_memory(device)
    if memory is not None and needed > memory:
        raise UserError(
            f"{what} needs {human_bytes(needed)} on each of {mesh.size} devices "
            f"({device.device_kind}), which have {human_bytes(memory)}: {way_out}"
        )
