"""Making, checking and opening an index."""

import dataclasses
import functools
from collections.abc import Callable

import jax
from etils import epath

from mlpmem_jax.config.data import RetrievalConfig
from mlpmem_jax.config.networks import MeshConfig
from mlpmem_jax.console import say
from mlpmem_jax.errors import ArtifactError, UserError
from mlpmem_jax.parallel.agreement import of_first, smallest_of_all
from mlpmem_jax.parallel.hardware import check_host_memory, device_memory, host_memory
from mlpmem_jax.parallel.multihost import barrier, first_alone, is_writer
from mlpmem_jax.parallel.sharing import process_count
from mlpmem_jax.retrieval import approximate, index_files, recall
from mlpmem_jax.retrieval.approximate import SEARCH, ApproximateEngine, SearchSettings
from mlpmem_jax.retrieval.engine import Choice, Engine, Keys, SomeKeys, StoredKeys, choose_engine
from mlpmem_jax.retrieval.estimates import exact_plan, index_plan
from mlpmem_jax.retrieval.exact import ExactEngine
from mlpmem_jax.retrieval.key_shards import KeyShards
from mlpmem_jax.retrieval.neighbors import check_enough_rows
from mlpmem_jax.retrieval.routed import CellSettings
from mlpmem_jax.retrieval.routed_builder import finish_routed, open_routed
from mlpmem_jax.retrieval.routed_index import build_cells
from mlpmem_jax.store.files import check_free_space, describe_file, read_json, write_json
from mlpmem_jax.store.manifest import Artifact, Completion
from mlpmem_jax.store.verification import verify_together
from mlpmem_jax.units import human_bytes

# Calibration and measurement draw different rows: the measurement stays unbiased.
CALIBRATION_SEED = 1
GIVEN_UP = "instead.json"  # Why ScaNN was given up for cells.
SHARD_BY = "rows"  # How ScaNN's shards are cut: by ranges of rows.
MEASUREMENT_SEED = 2
_MAX_REORDER_GROWTH = 8
Settings = SearchSettings | CellSettings


def exact_engine(
    train: Artifact, mesh: jax.sharding.Mesh, retrieval: RetrievalConfig
) -> ExactEngine | KeyShards:
    """Opens exact search over the keys of the training rows: all of them, or some at a time.

    Raises:
        UserError: The devices cannot hold what is searched at a time; names the key.
    """
    keys = StoredKeys(train)
    shard_rows = int(train.load().arrays["key"]["shard_rows"])
    device = jax.local_devices()[0]
    memory = device_memory(device)
    if device.platform == "cpu":
        host = host_memory()
        memory = None if host is None else host // jax.local_device_count()
    memory = smallest_of_all(memory)
    plan = exact_plan(keys.num_rows, keys.width, shard_rows, retrieval, mesh.size, memory)
    plan.check()
    if memory is not None and plan.held_bytes > memory:
        raise UserError(
            f"exact search over {plan.at_once} key shards at a time needs "
            f"{human_bytes(plan.held_bytes)} on each of {mesh.size} devices "
            f"({device.device_kind}), which have {human_bytes(memory)}: {plan.way_out}"
        )
    if plan.num_loads == 1:
        return ExactEngine(keys, mesh, retrieval.key_chunk_rows)

    def load(shards: range) -> ExactEngine:
        first, stop = (min(n * shard_rows, keys.num_rows) for n in (shards.start, shards.stop))
        some = SomeKeys(keys, first, stop - first)
        return ExactEngine(some, mesh, retrieval.key_chunk_rows, first_row=first)

    spans = len({each.process_index for each in mesh.devices.flat}) > 1
    return KeyShards("exact", keys.num_rows, plan, load, spans_processes=spans)


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
        seed: Seed of the sample on which it is calibrated.

    Raises:
        UserError: There are too few rows, too little memory or disk, or ScaNN is missing.
    """
    keys = StoredKeys(train)
    check_enough_rows(retrieval.num_neighbors, keys.num_rows, str(train.path))
    path = artifact.path
    choice = choose_engine(retrieval, keys.num_rows, mesh.devices.flat[0].platform)
    exact = functools.partial(exact_engine, train, mesh, retrieval)
    if choice.engine == "scann" and not _is_given_up(path):
        say(f"index: {choice.engine} engine ({choice.why})")
        made = _build_scann(path, keys, exact, retrieval, seed)
        if not _falls_short(made, retrieval):
            return _completed(made, choice, keys)
        _give_up(path, made.measured["calibration_recall"], retrieval)
    if choice.engine == "scann":
        choice = Choice("routed", read_json(path / GIVEN_UP)["why"])
    say(f"index: {choice.engine} engine ({choice.why})")
    if choice.engine == "exact":  # Nothing to build: it reads the datastore's keys.
        return _completed(Completion(), choice, keys)
    if is_writer():
        index_files.remove_shards(path)
    draw = functools.partial(_calibration_sample, keys, exact, retrieval, seed)
    chunk_rows = int(train.load().arrays["key"]["chunk_rows"])
    arrays = build_cells(path, keys, chunk_rows, retrieval, seed, mesh)
    return _completed(finish_routed(path, arrays, retrieval, draw), choice, keys)


def _completed(made: Completion, choice: Choice, keys: Keys) -> Completion:
    return dataclasses.replace(
        made,
        counts={"engine": choice.engine, "rows": keys.num_rows, **made.counts},
        measured={"why": choice.why, **made.measured},
    )


def _is_given_up(path: epath.Path) -> bool:
    return bool(of_first(is_writer() and (path / GIVEN_UP).exists()))


def _falls_short(made: Completion, retrieval: RetrievalConfig) -> bool:
    """Returns whether cells are to be searched instead; warns of a recall that stays low.

    Settings that are given are kept: they say what is wanted.
    """
    reached = made.measured.get("calibration_recall")
    if reached is None or reached >= retrieval.min_recall:
        return False
    free = retrieval.num_leaves_to_search, retrieval.num_reorder
    if retrieval.engine == "auto" and free == ("auto", "auto"):
        return True
    given = SearchSettings(made.counts["num_leaves_to_search"], made.counts["num_reorder"])
    recall.warn_of(reached, retrieval, given)
    return False


def _give_up(path: epath.Path, reached: float, retrieval: RetrievalConfig) -> None:
    """Writes why cells replace the shards of ScaNN: a killed build of cells goes on with them."""
    recall_of = f"recall@{retrieval.num_neighbors}={reached:.4f}"
    why = f"auto: ScaNN reaches {recall_of}, below retrieval.min_recall={retrieval.min_recall}"
    if is_writer():
        write_json(path / GIVEN_UP, {"why": why})
    barrier("index: ScaNN is given up")


def _build_scann(
    path: epath.Path,
    keys: Keys,
    exact: Callable[[], Engine],
    retrieval: RetrievalConfig,
    seed: int,
) -> Completion:
    """Builds the shards of a ScaNN index, and chooses how thoroughly they are searched."""
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
    settings, calibrated = choose_settings(path, keys, exact, retrieval, seed)
    measured = {} if calibrated is None else {"calibration_recall": calibrated}
    if is_writer():
        write_json(path / SEARCH, dataclasses.asdict(settings))
        files[SEARCH] = describe_file(path / SEARCH)
    shard_rows = max(len(rows) for rows in approximate.shard_ranges(keys.num_rows, largest))
    counts = {
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
    # Before the index is loaded: keys and index need not fit in memory together.
    sample = _calibration_sample(keys, exact, retrieval, seed)
    engine = _approximate(path, first, keys.num_rows, keys.width, retrieval)

    def measure_with(settings: SearchSettings) -> float:
        if isinstance(engine, ApproximateEngine):
            engine.settings = settings
            return recall.measure(engine, sample)
        changed = _approximate(path, settings, keys.num_rows, keys.width, retrieval)
        return recall.measure(changed, sample)

    return recall.calibrate(measure_with, first, last, retrieval.min_recall)


def _calibration_sample(
    keys: Keys, exact: Callable[[], Engine], retrieval: RetrievalConfig, seed: int
) -> recall.Sample:
    return recall.draw_sample(
        keys,
        exact().search,
        retrieval.recall_queries,
        retrieval.num_neighbors,
        (seed, CALIBRATION_SEED),
    )


def open_index(
    artifact: Artifact,
    retrieval: RetrievalConfig,
    width: int,
    exact: Callable[[], Engine],
) -> tuple[Engine, Settings | None]:
    """Opens the engine that an index names; its files are verified first.

    Args:
        width: Of its keys.
        exact: Opens the exact engine, where that is the one.

    Returns:
        The engine, and how thoroughly it searches (none: exactly).

    Raises:
        ArtifactError: The index is missing, made from another datastore than the one that is there
            now, or a file of it is damaged (named).
    """
    manifest = artifact.load()
    if artifact.inputs:
        artifact.status({one.relative: one.load().fingerprint for one in artifact.inputs})
    verify_together(artifact.path, manifest.files)
    if manifest.counts["engine"] == "exact":
        return exact(), None
    if manifest.counts["engine"] == "routed":
        return open_routed(artifact, retrieval)
    shard_by = manifest.counts.get("shard_by", SHARD_BY)
    if shard_by != SHARD_BY:
        raise ArtifactError(
            f"{artifact.path}: an index whose shards are cut by {shard_by}; this software reads "
            f"shards cut by {SHARD_BY}; make it again with --rebuild"
        )
    settings = SearchSettings(**read_json(artifact.path / SEARCH))
    return searching_with(settings, artifact, retrieval, width), settings


def searching_with(
    settings: Settings, artifact: Artifact, retrieval: RetrievalConfig, width: int
) -> Engine:
    """Opens the engine of an index that has been opened before, with other settings."""
    if isinstance(settings, CellSettings):
        return open_routed(artifact, retrieval, settings)[0]
    num_rows = int(artifact.load().counts["rows"])
    return _approximate(artifact.path, settings, num_rows, width, retrieval)


def _approximate(
    path: epath.Path,
    settings: SearchSettings,
    num_rows: int,
    width: int,
    retrieval: RetrievalConfig,
) -> ApproximateEngine | KeyShards:
    """Opens ScaNN over finished shards: all of them, or some at a time."""
    memory = smallest_of_all(host_memory())
    plan = index_plan(num_rows, width, retrieval, process_count(), memory)
    plan.check()
    check_host_memory(
        plan.held_bytes,
        f"{path}: ScaNN over {plan.at_once} shards at a time",
        plan.way_out,
    )
    if plan.num_loads == 1:
        return ApproximateEngine(path, settings)
    return KeyShards(
        "scann",
        num_rows,
        plan,
        lambda shards: ApproximateEngine(path, settings, shards=shards),
        spans_processes=process_count() > 1,
        order=index_files.leaf_order(path),
    )


class ExactCache:
    """Opens exact search once and keeps it while it is needed: its keys fill memory.

    Args:
        train: The datastore of the training rows.
        mesh: Devices, which are not touched before they are needed.
    """

    def __init__(self, train: Artifact, retrieval: RetrievalConfig, mesh: MeshConfig):
        self._train, self._retrieval, self._mesh = train, retrieval, mesh
        self._engine: ExactEngine | KeyShards | None = None

    def __call__(self) -> ExactEngine | KeyShards:
        """Returns the engine."""
        if self._engine is None:
            from mlpmem_jax.parallel.mesh import make_mesh

            mesh = make_mesh(self._mesh)
            self._engine = exact_engine(self._train, mesh, self._retrieval)
        return self._engine

    def release(self) -> None:
        """Frees its memory; a later call opens it again."""
        self._engine = None
