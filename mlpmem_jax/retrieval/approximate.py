"""Approximate search with ScaNN: a tree, asymmetric hashing, exact re-ordering.

Shards are ranges of rows, fixed by the configuration, so that an index does not depend on
how many processes built it. A shard is built in a temporary directory and renamed when it
is whole. ScaNN is imported only when it is used: it has wheels for Linux only.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from mlpmem_jax.config.data import RetrievalConfig
from mlpmem_jax.errors import ArtifactError, ConfigError, UserError
from mlpmem_jax.parallel.agreement import of_first
from mlpmem_jax.parallel.sharing import is_mine, process_count, share_of
from mlpmem_jax.retrieval.engine import EngineName, Keys, SomeKeys, read_all
from mlpmem_jax.retrieval.far_rows import FAR_ROW, FarRows, far_rows, write_far_rows
from mlpmem_jax.retrieval.index_files import LEAF_OF_ROW, SHARD, is_whole, shard_names, shard_path
from mlpmem_jax.retrieval.merge import (
    MISSING_ROW,
    Neighbors,
    merge,
    no_neighbors,
    of_processes,
    sortable,
    unpack,
)
from mlpmem_jax.store.checked_json import read_checked_json, write_checked_json
from mlpmem_jax.store.files import describe_file, is_foreign, is_local

SEARCH = "search.json"
_MIN_LEAVES_TO_SEARCH = 8
_GROWTH = 1.5  # Of a setting, until the recall suffices.
AH_MIN_ROWS = 1024  # Fewer rows than this are scored exactly inside the shard.
_TREE_ROWS_PER_LEAF = 50  # More make the tree no better, and its start quadratically slower.
_CODE_ROWS = 50_000  # The same for the 16 centres of each block of dimensions.
# Queries of a thread: few large tasks are faster, none should wait for the last.
_QUERIES_PER_TASK = range(256, 4096)


@dataclasses.dataclass(frozen=True)
class SearchSettings:
    """How thoroughly shards are searched.

    Attributes:
        num_leaves_to_search: Leaves of each shard's tree that a query visits.
        num_reorder: Candidates of each shard whose distance is computed exactly.
    """

    num_leaves_to_search: int
    num_reorder: int

    def raised(self, last: "SearchSettings") -> list["SearchSettings"]:
        """Returns settings with more leaves and with more candidates, at most those of `last`."""
        leaves = min(last.num_leaves_to_search, math.ceil(self.num_leaves_to_search * _GROWTH))
        candidates = min(last.num_reorder, math.ceil(self.num_reorder * _GROWTH))
        return [
            dataclasses.replace(self, num_leaves_to_search=leaves),
            dataclasses.replace(self, num_reorder=candidates),
        ]

    def lowest(self, config: RetrievalConfig) -> "SearchSettings":
        """Returns the least thorough search for K neighbours; what is given stays."""
        return SearchSettings(
            1 if config.num_leaves_to_search == "auto" else self.num_leaves_to_search,
            config.num_neighbors + 1 if config.num_reorder == "auto" else self.num_reorder,
        )

    @property
    def way_out(self) -> str:
        """The keys that bring more recall, with their values, and the engine that does."""
        return (
            f"retrieval.num_leaves_to_search (now {self.num_leaves_to_search}) or "
            f"retrieval.num_reorder (now {self.num_reorder}), or set retrieval.engine=routed"
        )


def shard_ranges(num_rows: int, shard_rows: int) -> list[range]:
    """Cuts rows into shards of nearly equal size, none larger than `shard_rows`."""
    num_shards = max(1, -(-num_rows // shard_rows))
    bounds = [num_rows * n // num_shards for n in range(num_shards + 1)]
    return [range(a, b) for a, b in itertools.pairwise(bounds)]


def num_leaves(config: RetrievalConfig, num_rows: int) -> int:
    """Returns the leaves of a shard's tree; auto: the square root of its rows."""
    wanted = math.isqrt(num_rows) if config.num_leaves == "auto" else config.num_leaves
    return max(1, min(wanted, num_rows))


def num_reorder(config: RetrievalConfig) -> int:
    """Returns the candidates that are scored exactly; auto: 2 (K + 1), to begin with.

    With only K the recall of large K is lost: 0.73 instead of 0.99 with 4 K at K = 1024.
    """
    if config.num_reorder == "auto":
        return 2 * (config.num_neighbors + 1)
    return max(config.num_reorder, config.num_neighbors + 1)


def first_leaves_to_search(config: RetrievalConfig, shard_rows: int) -> int:
    """Returns the leaves that are searched first, before any calibration."""
    leaves = num_leaves(config, shard_rows)
    if config.num_leaves_to_search != "auto":
        return min(config.num_leaves_to_search, leaves)
    # A query's K neighbours fill at least this many leaves.
    fill = math.ceil(2 * (config.num_neighbors + 1) * leaves / max(1, shard_rows))
    return min(leaves, max(_MIN_LEAVES_TO_SEARCH, fill))


def build_memory_bytes(shard_rows: int, width: int, training_rows: int) -> int:
    """Estimates the memory that building one shard takes."""
    # Measured: the float32 keys twice, codes and centres; the training sample once more.
    return 4 * width * (2 * shard_rows + 2 * min(training_rows, shard_rows)) + 8 * shard_rows


def index_bytes(num_rows: int, width: int, dims_per_block: int) -> int:
    """Estimates the size of an index on disk: keys, a byte a block, leaf numbers."""
    return num_rows * (4 * width + -(-width // dims_per_block) + 8) + (1 << 20)


def build_shards(
    keys: Keys, path: epath.Path, config: RetrievalConfig
) -> Iterator[tuple[int, int]]:
    """Builds the shards that are not there yet; each process of a run builds its own.

    Args:
        path: Directory of the index.

    Yields:
        After each shard of this process: its number, and the number of all shards.
    """
    shards = shard_ranges(keys.num_rows, config.shard_rows)
    for number in share_of(range(len(shards))):
        rows, target = shards[number], shard_path(path, number)
        if not is_whole(target):
            _build_shard(SomeKeys(keys, rows.start, len(rows)), rows, target, config)
        yield number, len(shards)


def _build_shard(keys: Keys, rows: range, target: epath.Path, config: RetrievalConfig) -> None:
    key_ND = read_all(keys)
    row_F = far_rows(key_ND) if len(key_ND) >= AH_MIN_ROWS else np.empty(0, np.int64)
    key_FD = key_ND[row_F]
    if len(row_F):
        key_ND = np.delete(key_ND, row_F, axis=0)
    scann = _import()
    builder = scann.scann_ops_pybind.builder(key_ND, config.num_neighbors + 1, "squared_l2")
    # No random start: the same keys give the same index, bit for bit, whatever the number
    # of threads (measured with 1, 2, 4 and 8).
    builder = builder.set_n_training_threads(os.cpu_count() or 1)
    if len(key_ND) >= AH_MIN_ROWS:
        leaves = num_leaves(config, len(key_ND))
        training_rows = min(config.training_rows, len(key_ND))
        builder = builder.tree(
            num_leaves=leaves,
            num_leaves_to_search=first_leaves_to_search(config, len(key_ND)),
            training_sample_size=min(training_rows, _TREE_ROWS_PER_LEAF * leaves),
            random_init=False,
        )
        builder = builder.score_ah(
            min(config.dims_per_block, keys.width),
            training_sample_size=min(training_rows, _CODE_ROWS),
        )
        builder = builder.reorder(num_reorder(config))
    else:
        builder = builder.score_brute_force()
    with _quiet():
        searcher = builder.build()
    parent = target.parent if is_local(target) else epath.Path(tempfile.gettempdir())
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="building-", dir=os.fspath(parent)) as temporary:
        whole = epath.Path(temporary) / "shard"
        whole.mkdir()
        searcher.serialize(os.fspath(whole), relative_path=True)
        write_far_rows(whole, row_F, key_FD)
        files = sorted(file.name for file in whole.iterdir() if not is_foreign(file.name))
        _check_written(whole, files, len(key_ND))
        about = {
            "first_row": rows.start,
            "num_rows": len(rows),
            "files": {name: describe_file(whole / name) for name in files},
        }
        write_checked_json(whole / SHARD, about)
        if is_local(target):
            if target.exists():
                target.rmtree()
            os.rename(whole, target)
        else:
            target.mkdir(parents=True, exist_ok=True)
            for name in [*files, SHARD]:  # The list of files last: it says that all are there.
                (whole / name).copy(target / name, overwrite=True)


def _check_written(path: epath.Path, files: Sequence[str], num_rows: int) -> None:
    # A full disk truncates files without an error from ScaNN. Mapping an array fails where its
    # file is shorter than its header says; other files are small, and the list of files, which
    # is written after them, would not find room either.
    try:
        lengths = {
            name: len(np.load(path / name, mmap_mode="r"))
            for name in files
            if name.endswith(".npy")
        }
    except (ValueError, FileNotFoundError, EOFError):
        lengths = {}
    if lengths.get("dataset.npy") != num_rows:
        raise UserError(
            f"{path.parent.parent}: the index could not be written whole; is the disk full?"
        )


class ApproximateEngine:
    """Searches finished shards, all of them for every query.

    Each of several processes holds its share of the shards, so that an index may be larger than
    the memory of a machine; what they find for the same queries is merged exactly.

    Args:
        path: Directory of the index.
        settings: How thoroughly; can be replaced between searches.
        alone: Hold all shards, whatever other processes there are, and search without them.
        shards: Search these alone; None: all.
    """

    name: EngineName = "scann"
    skips_rows = False

    def __init__(
        self,
        path: epath.Path,
        settings: SearchSettings,
        alone: bool = False,
        shards: range | None = None,
    ):
        self.settings = settings
        self.spans_processes = process_count() > 1 and not alone
        self.num_rows = first_row = 0
        self._shards: list[tuple[Any, int, FarRows]] = []
        leaves: list[np.ndarray] = []
        scann = _import()
        names = shard_names(path)
        # Whose a shard is must not depend on what a file system shows of a new directory.
        for number, name in enumerate(of_first(names) if self.spans_processes else names):
            if shards is not None and number not in shards:
                continue
            shard = path / name
            about = read_checked_json(shard / SHARD)
            if not self.num_rows:
                first_row = int(about["first_row"])
            files: Mapping[str, Any] = about["files"]
            is_held = is_mine(number) or not self.spans_processes
            # The order of queries needs the leaves of all rows: four bytes a row.
            wanted = {LEAF_OF_ROW, FAR_ROW}
            needed = {n: of for n, of in files.items() if is_held or n in wanted}
            with _on_local_disk(shard, needed) as local:
                far = FarRows(local, needed)
                if is_held:
                    searcher = scann.scann_ops_pybind.load_searcher(os.fspath(local))
                    self._shards.append((searcher, int(about["first_row"]), far))
                if LEAF_OF_ROW in files:
                    leaves.append(far.with_gaps(np.load(local / LEAF_OF_ROW)))
                else:
                    leaves.append(np.zeros(about["num_rows"], np.int32))
            self.num_rows += int(about["num_rows"])
        self._leaf_N = np.concatenate(leaves)
        self.rows = range(first_row, first_row + self.num_rows)

    def search(self, query_QD: np.ndarray, num_neighbors: int) -> Neighbors:
        """Returns neighbours as the protocol says; distances are exact, rows may be missed."""
        return self.search_later(query_QD, num_neighbors)()

    def visiting(self, num_rows: int) -> None:
        """Returns none: the leaves to search do not depend on what is asked for."""
        del num_rows

    def search_later(
        self, query_QD: np.ndarray, num_neighbors: int, skipped_Q2: np.ndarray | None = None
    ) -> Callable[[], Neighbors]:
        """Searches now, and merges what the processes have found when it is called for."""
        assert skipped_Q2 is None
        if not len(query_QD):
            return lambda: no_neighbors(0, num_neighbors)
        found = self._search_held(query_QD, num_neighbors)
        if not self.spans_processes:
            return lambda: found
        parts = of_processes(found)
        return lambda: merge(parts, num_neighbors)

    def _search_held(self, query_QD: np.ndarray, num_neighbors: int) -> Neighbors:
        queries = np.ascontiguousarray(query_QD, np.float32)
        share = -(-len(queries) // (os.cpu_count() or 1))
        per_task = min(max(share, _QUERIES_PER_TASK.start), _QUERIES_PER_TASK.stop)
        parts = []
        for searcher, first_row, far in self._shards:
            id_QK, distance_QK = searcher.search_batched_parallel(
                queries,
                final_num_neighbors=num_neighbors,
                pre_reorder_num_neighbors=max(num_neighbors, self.settings.num_reorder),
                leaves_to_search=self.settings.num_leaves_to_search,
                batch_size=per_task,
            )
            found = far.merged(_in_order(distance_QK, far.rows_of(id_QK)), queries)
            found.row_QK[found.row_QK != MISSING_ROW] += first_row
            parts.append(found)
        return merge(parts or [no_neighbors(len(queries), num_neighbors)], num_neighbors)

    def visiting_order(self, rows: slice) -> np.ndarray | None:
        """Returns an order of rows of the datastore in which neighbours share leaves."""
        return np.argsort(self._leaf_N[rows], kind="stable")


def _in_order(distance_QK: np.ndarray, row_QK: np.ndarray) -> Neighbors:
    """Orders a shard's answer by (distance, row), rows counted from the shard's first.

    Places that the visited leaves could not fill hold id 0 and distance NaN: missing.
    """
    distance_QK = np.where(np.isnan(distance_QK), np.float32(np.inf), np.maximum(distance_QK, 0))
    packed = sortable(distance_QK, row_QK)
    packed.sort(axis=1)
    distance_QK, row_QK = unpack(packed)
    return Neighbors(distance_QK, np.where(np.isinf(distance_QK), MISSING_ROW, row_QK))


@contextlib.contextmanager
def _on_local_disk(
    shard: epath.Path, files: Mapping[str, Mapping[str, Any]]
) -> Iterator[epath.Path]:
    """Yields a local directory with the files of a shard: ScaNN reads no other.

    Copies are compared with the checksums that the files had when they were written: those in
    the bucket may have been verified, but not this way here.

    Raises:
        ArtifactError: A file is missing or damaged; it is named.
    """
    if is_local(shard):
        yield shard
        return
    with tempfile.TemporaryDirectory(prefix="index-") as temporary:
        local = epath.Path(temporary)
        for name, expected in files.items():
            try:
                (shard / name).copy(local / name)
            except FileNotFoundError:
                raise ArtifactError(f"{shard / name}: missing, though {SHARD} lists it") from None
            found = describe_file(local / name)
            if found != expected:
                raise ArtifactError(
                    f"{shard / name}: damaged, checksum {found['crc32']} of {found['bytes']} bytes "
                    f"and not {expected['crc32']} of {expected['bytes']}"
                )
        yield local


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Holds back what ScaNN logs on standard error; says it if ScaNN fails."""
    sys.stderr.flush()
    original = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            os.dup2(original, 2)
            held.seek(0)
            sys.stderr.write(held.read().decode(errors="replace"))
            raise
        finally:
            os.dup2(original, 2)
            os.close(original)


def _import() -> Any:
    try:
        with _quiet():
            import scann
    except ImportError as error:
        raise ConfigError(
            f"retrieval.engine=scann: the package scann cannot be imported ({error}); "
            "retrieval.engine=routed needs no package"
        ) from None
    return scann
