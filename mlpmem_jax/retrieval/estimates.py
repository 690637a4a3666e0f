"""What search holds in memory."""

from mlpmem_jax.config.data import RetrievalConfig
from mlpmem_jax.retrieval import approximate


def exact_bytes(num_rows: int, width: int, num_devices: int) -> int:
    """Returns what exact search holds on each device: float32 keys and their norms."""
    return -(-num_rows // num_devices) * (width + 1) * 4


def held_index_bytes(num_rows: int, width: int, config: RetrievalConfig, num_processes: int) -> int:
    """Returns what the shards of an index hold in the memory of the process with the most.

    Measured: 1.11 of the float32 keys at width 256, what the files hold.
    """
    mine = approximate.shard_ranges(num_rows, config.shard_rows)[::num_processes]
    held = approximate.index_bytes(sum(map(len, mine)), width, config.dims_per_block)
    return held + 4 * num_rows  # Every process knows the leaf of every row.
