"""What a search engine is, which one `retrieval.engine: auto` takes, and the keys they read."""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

import numpy as np

from mlpmem_jax.config.data import RetrievalConfig
from mlpmem_jax.errors import ArtifactError, ConfigError
from mlpmem_jax.retrieval.merge import Neighbors
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.stored_array import StoredArray

EngineName = Literal["scann", "exact", "routed"]

# Rows up to which `auto` scores every pair on CPU: it costs less than to build an index and
# search it, where every row is a query.
EXACT_ROWS_CPU = 60_000
# Rows above which `auto` routes. Accelerators score every pair up to it, some hundred times faster
# than CPUs. On a CPU it is ScaNN up to it: at equal recall as fast at a million rows, and half as
# fast at two (benchmarks.routing).
ROUTED_ROWS, ROUTED_ROWS_CPU = 4_000_000, 1_500_000
READ_ROWS = 65536
# Of a key's norm: the square of the distance of two keys is at most four times as large.
_LARGEST_SQUARE = float(np.finfo(np.float32).max) / 8


class Engine(Protocol):
    """Finds nearest rows."""

    @property
    def name(self) -> EngineName:
        """Its name in `retrieval.engine`."""
        ...

    @property
    def num_rows(self) -> int:
        """Rows that it searches."""
        ...

    @property
    def spans_processes(self) -> bool:
        """Whether all processes of the run search together, for the same queries."""
        ...

    @property
    def rows(self) -> range:
        """Rows that it searches lie in this range, which may be larger."""
        ...

    @property
    def skips_rows(self) -> bool:
        """Whether `search_later` leaves out a range of rows for each query."""
        ...

    def visiting(self, num_rows: int) -> "Engine | None":
        """Returns this engine, with visits to at least so many rows for each query.

        They no longer depend on how many neighbours are asked for. None: they never do.
        """
        ...

    def search(self, query_QD: np.ndarray, num_neighbors: int) -> Neighbors:
        """Returns neighbours ordered by (distance, row), filled up where there are fewer.

        Args:
            query_QD: float32 queries.
            num_neighbors: K.
        """
        ...

    def search_later(
        self, query_QD: np.ndarray, num_neighbors: int, skipped_Q2: np.ndarray | None = None
    ) -> Callable[[], Neighbors]:
        """Searches as `search` does; what it returns finishes the answer, in any thread.

        Processes that search together all take part, and only one of them needs the answer.

        Args:
            query_QD: float32 queries.
            num_neighbors: K.
            skipped_Q2: int64 rows [start, stop) that are no neighbours of each query; only if
                `skips_rows`.
        """
        ...

    def visiting_order(self, rows: slice) -> np.ndarray | None:
        """Returns in which order to search rows of the datastore itself; none: any.

        Queries that touch the same part of an index one after the other find it in the
        cache: int64 places within the range.
        """
        ...


class Keys(Protocol):
    """Keys of a datastore, read in ranges."""

    @property
    def num_rows(self) -> int:
        """N."""
        ...

    @property
    def width(self) -> int:
        """D."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """What holds every key without rounding."""
        ...

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns float32 keys [start, stop); every value is finite."""
        ...

    def take(self, row_Q: np.ndarray) -> np.ndarray:
        """Returns float32 keys of single rows (int64)."""
        ...


class StoredKeys:
    """Keys of a split of a datastore on disk."""

    def __init__(self, artifact: Artifact):
        self._artifact = artifact
        self._keys = StoredArray(artifact, "key")
        self.num_rows, self.width = self._keys.shape
        self.dtype = self._keys.dtype
        expected = artifact.load().counts["rows"]
        if self.num_rows != expected:
            raise ArtifactError(
                f"{self._keys.path}: {self.num_rows} rows, the manifest says {expected}"
            )

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns float32 keys [start, stop).

        Raises:
            ArtifactError: A shard is missing or damaged, or a key is not finite.
        """
        key_ND = self._keys.read(start, stop).astype(np.float32, copy=False)
        check_finite(key_ND, start, str(self._artifact.path / "key"))
        return key_ND

    def take(self, row_Q: np.ndarray) -> np.ndarray:
        """Returns float32 keys of single rows (int64)."""
        return self._keys.take(row_Q).astype(np.float32, copy=False)


class ArrayKeys:
    """Keys in memory."""

    def __init__(self, key_ND: np.ndarray, name: str = "keys"):
        self._key_ND = key_ND
        self._name = name
        self.num_rows, self.width = key_ND.shape
        self.dtype = key_ND.dtype

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns float32 keys [start, stop)."""
        key_ND = self._key_ND[start:stop].astype(np.float32, copy=False)
        check_finite(key_ND, start, self._name)
        return key_ND

    def take(self, row_Q: np.ndarray) -> np.ndarray:
        """Returns float32 keys of single rows (int64)."""
        return self._key_ND[row_Q].astype(np.float32, copy=False)


class SomeKeys:
    """The rows [first_row, first_row + num_rows) of other keys."""

    def __init__(self, keys: Keys, first_row: int, num_rows: int):
        self._keys = keys
        self._first_row = first_row
        self.num_rows, self.width, self.dtype = num_rows, keys.width, keys.dtype

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns float32 keys, rows counted from `first_row`."""
        return self._keys.read(self._first_row + start, self._first_row + stop)

    def take(self, row_Q: np.ndarray) -> np.ndarray:
        """Returns float32 keys of single rows, counted from `first_row`."""
        return self._keys.take(row_Q + self._first_row)


def read_all(keys: Keys) -> np.ndarray:
    """Returns all keys as float32 [N, D]."""
    key_ND = np.empty((keys.num_rows, keys.width), np.float32)
    for part in row_ranges(keys.num_rows, READ_ROWS):
        key_ND[part] = keys.read(part.start, part.stop)
    return key_ND


def row_ranges(num_rows: int, step: int, first: int = 0) -> Iterator[slice]:
    """Cuts rows [first, num_rows) into ranges of `step` rows."""
    for start in range(first, num_rows, step):
        yield slice(start, min(start + step, num_rows))


def check_finite(key_ND: np.ndarray, first_row: int, name: str) -> None:
    """Refuses NaN and infinite keys, which would abort an index build or poison distances.

    So would keys whose squared distances are infinite in float32.

    Raises:
        ArtifactError: Names the first such row.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        suspicious_N = ~(np.einsum("nd,nd->n", key_ND, key_ND) < _LARGEST_SQUARE)
    if suspicious_N.any():
        is_bad_N = ~np.isfinite(key_ND).all(axis=1)
        if not is_bad_N.any():
            raise ArtifactError(
                f"{name}: row {first_row + int(suspicious_N.argmax())} is too large: squared "
                "distances overflow float32; look at the decoder's loss, or choose another "
                "datastore.key"
            )
        row = first_row + int(is_bad_N.argmax())
        raise ArtifactError(
            f"{name}: row {row} is not finite ({int(is_bad_N.sum())} such rows in "
            f"[{first_row}, {first_row + len(key_ND)})); embed again with "
            "datastore.dtype=bfloat16 or float32"
        )


@dataclasses.dataclass(frozen=True)
class Choice:
    """The engine that is used, and why."""

    engine: EngineName
    why: str


def is_approximate_installed() -> bool:
    """Returns whether the approximate engine can be imported."""
    try:
        return importlib.util.find_spec("scann") is not None
    except (ImportError, ValueError):
        return False


def choose_engine(config: RetrievalConfig, num_rows: int, platform: str) -> Choice:
    """Resolves `retrieval.engine`.

    Args:
        platform: Kind of the devices, for example "cpu".

    Raises:
        ConfigError: ScaNN is asked for and not installed.
    """
    if config.engine in ("exact", "routed"):
        return Choice(config.engine, f"retrieval.engine={config.engine}")
    installed = is_approximate_installed()
    if config.engine == "scann":
        if not installed:
            raise ConfigError(
                "retrieval.engine=scann: the package scann is not installed (pip install scann; "
                "Linux only); retrieval.engine=routed needs no package"
            )
        return Choice("scann", "retrieval.engine=scann")
    most_rows = ROUTED_ROWS_CPU if platform == "cpu" else ROUTED_ROWS
    if num_rows > most_rows:
        return Choice("routed", f"auto: {num_rows:,} rows are more than {most_rows:,}")
    exact_rows = EXACT_ROWS_CPU if platform == "cpu" else ROUTED_ROWS
    if num_rows <= exact_rows:
        return Choice(
            "exact", f"auto: {num_rows:,} rows are at most {exact_rows:,}, where exact is faster"
        )
    if not installed:
        return Choice("routed", "auto: the package scann is not installed")
    return Choice("scann", f"auto: {num_rows:,} rows are more than {exact_rows:,}")
