"""What search holds in memory, and how many key shards that allows at a time."""

import dataclasses

from mlpmem_jax.config.data import RetrievalConfig
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.retrieval import approximate, cells
from mlpmem_jax.units import human_bytes

LIST_BYTES = 12  # of a neighbour in a running list: row and distance
# Running lists that lie on disk at a time; more queries are searched in several waves.
_SPILLED_BYTES = 64 << 30
# Keys that are put in the order of cells at a time, with 12 bytes a row of row and cell.
_RUN_BYTES = 256 << 20
_RUN_COPIES = 6
_CELL_ROW_BYTES = 12
_LEAST_CELLS_TO_SEARCH = 4


@dataclasses.dataclass(frozen=True)
class KeyShardPlan:
    """How keys are searched: in shards, some at a time.

    Attributes:
        num_shards: Key shards of the datastore.
        at_once: Key shards that are in memory together, at least one.
        held_bytes: What these take, on each device (exact) or in each process (ScaNN).
        given_bytes: `retrieval.memory_bytes`; None: auto.
        shard_key: The key, with its value, that decides how large key shards are.
        way_out: What to change where `held_bytes` do not fit.
    """

    num_shards: int
    at_once: int
    held_bytes: int
    given_bytes: int | None
    shard_key: str
    way_out: str

    @property
    def num_loads(self) -> int:
        """Times that shards are loaded to search a set of queries."""
        return -(-self.num_shards // self.at_once)

    def check(self) -> None:
        """Refuses a given budget that does not hold one key shard.

        Raises:
            ConfigError: Names the keys and both sizes.
        """
        if self.given_bytes is not None and self.held_bytes > self.given_bytes:
            raise ConfigError(
                f"retrieval.memory_bytes={self.given_bytes} holds no key shard, which takes "
                f"{human_bytes(self.held_bytes)} ({self.held_bytes} bytes): raise it, or lower "
                f"{self.shard_key}"
            )


def _budget(config: RetrievalConfig, memory_bytes: int | None) -> int | None:
    """Resolves `retrieval.memory_bytes`; auto: half of the memory, the rest is for buffers."""
    if config.memory_bytes != "auto":
        return config.memory_bytes
    return None if memory_bytes is None else memory_bytes // 2


def _plan(
    config: RetrievalConfig, num_shards: int, at_once: int, held_bytes: int, shard_key: str
) -> KeyShardPlan:
    given = None if config.memory_bytes == "auto" else config.memory_bytes
    way_out = f"lower {shard_key}" if given is None else f"lower retrieval.memory_bytes={given}"
    return KeyShardPlan(num_shards, at_once, held_bytes, given, shard_key, way_out)


def exact_bytes(num_rows: int, width: int, num_devices: int) -> int:
    """Returns what exact search holds on each device: float32 keys and their norms."""
    return -(-num_rows // num_devices) * (width + 1) * 4


def exact_plan(
    num_rows: int,
    width: int,
    shard_rows: int,
    config: RetrievalConfig,
    num_devices: int,
    memory_bytes: int | None,
) -> KeyShardPlan:
    """Returns how exact search goes through keys.

    Args:
        num_rows: N.
        width: D.
        shard_rows: Rows of a shard of the datastore, which is a key shard.
        num_devices: Devices that share the keys.
        memory_bytes: Memory of each device; None: not known.
    """
    budget_bytes = _budget(config, memory_bytes)
    num_shards = max(1, -(-num_rows // shard_rows))
    at_once = num_shards
    if budget_bytes is not None and exact_bytes(num_rows, width, num_devices) > budget_bytes:
        rows = budget_bytes // (4 * (width + 1)) * num_devices
        at_once = min(num_shards, max(1, rows // shard_rows))
    held = exact_bytes(min(num_rows, at_once * shard_rows), width, num_devices)
    return _plan(config, num_shards, at_once, held, f"datastore.shard_rows={shard_rows}")


def index_plan(
    num_rows: int,
    width: int,
    config: RetrievalConfig,
    num_processes: int,
    memory_bytes: int | None,
) -> KeyShardPlan:
    """Returns how ScaNN goes through the shards of an index, which are the key shards.

    Args:
        num_rows: N.
        width: D.
        num_processes: Processes that share the shards.
        memory_bytes: Memory of each process; None: not known.
    """
    budget_bytes = _budget(config, memory_bytes)
    sizes = [len(rows) for rows in approximate.shard_ranges(num_rows, config.shard_rows)]
    shard = index_shard_bytes(max(sizes), width, config)
    per_process = -(-len(sizes) // num_processes)
    if budget_bytes is not None:
        per_process = min(per_process, max(1, budget_bytes // shard))
    at_once = min(len(sizes), per_process * num_processes)
    key = f"retrieval.shard_rows={config.shard_rows} (another index)"
    return _plan(config, len(sizes), at_once, per_process * shard, key)


def index_shard_bytes(num_rows: int, width: int, config: RetrievalConfig) -> int:
    """Returns what a shard of an index holds in memory.

    Measured: 1.11 of the float32 keys at width 256, what the files hold; and the leaves of rows.
    """
    return approximate.index_bytes(num_rows, width, config.dims_per_block) + 4 * num_rows


def first_cells_to_search(config: RetrievalConfig, num_rows: int, num_cells: int) -> int:
    """Returns the cells that a query visits; auto: before any calibration."""
    if config.cells_to_search != "auto":
        return min(config.cells_to_search, num_cells)
    fill = -(-2 * (config.num_neighbors + 1) * num_cells // max(1, num_rows))
    return min(num_cells, max(_LEAST_CELLS_TO_SEARCH, fill))


def run_rows(width: int, itemsize: int) -> int:
    """Returns the rows that are put in the order of cells at a time, while cells are made."""
    return max(1, _RUN_BYTES // (width * itemsize + _CELL_ROW_BYTES))


def cells_memory_bytes(num_rows: int, width: int, itemsize: int, config: RetrievalConfig) -> int:
    """Returns what making cells holds: first the sample, then keys in runs.

    The sample is held twice. Of runs there are keys as read and in order, and those that are
    written.
    """
    count = cells.num_cells(config, num_rows, width)
    sample = 2 * 4 * width * cells.sample_rows(num_rows, width, count)
    return max(
        sample, _RUN_COPIES * run_rows(width, itemsize) * (width * itemsize + _CELL_ROW_BYTES)
    )


def routed_index_bytes(num_rows: int, width: int, itemsize: int) -> int:
    """Returns the size of an index of cells on disk; while it is made it takes as much again."""
    return num_rows * (width * itemsize + _CELL_ROW_BYTES) + (1 << 20)


def routed_plan(
    num_rows: int, width: int, config: RetrievalConfig, memory_bytes: int | None
) -> KeyShardPlan:
    """Returns how each process goes through cells: a key shard is some whole ones.

    Args:
        num_rows: N.
        width: D.
        memory_bytes: Memory of each process; None: not known.
    """
    budget_bytes = _budget(config, memory_bytes)
    num_shards = max(1, -(-num_rows // config.shard_rows))
    # They end where a cell does.
    count = cells.num_cells(config, num_rows, width)
    more = cells.largest_cell(num_rows, count)

    def held(shards: int) -> int:
        rows = min(num_rows, -(-num_rows * shards // num_shards) + more)
        return exact_bytes(rows, width, 1) + 8 * rows + 4 * count * width

    at_once = num_shards
    if budget_bytes is not None and held(num_shards) > budget_bytes:
        at_once = min(num_shards, max(1, budget_bytes // held(1)))
    key = f"retrieval.shard_rows={config.shard_rows} (another index)"
    return _plan(config, num_shards, at_once, held(at_once), key)


def spilled_rows(num_neighbors: int) -> int:
    """Returns the queries whose running lists lie on disk at a time, at most."""
    return max(1, _SPILLED_BYTES // (LIST_BYTES * num_neighbors))


def spilled_bytes(num_queries: int, num_neighbors: int, plan: KeyShardPlan) -> int:
    """Returns what running lists take on disk at a time; nothing where all keys fit.

    Args:
        num_neighbors: K.
    """
    if plan.num_loads == 1:
        return 0
    return min(num_queries, spilled_rows(num_neighbors)) * num_neighbors * LIST_BYTES
