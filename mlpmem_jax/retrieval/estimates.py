"""What `index` and `retrieve` will need of disk, memory and arithmetic, for `--dry-run`."""

from typing import Any

from mlpmem_jax.config.data import RetrievalConfig
from mlpmem_jax.config.schema import Config
from mlpmem_jax.corpus.row_estimates import UNKNOWN_ROWS, count_rows, rows_entry
from mlpmem_jax.retrieval import approximate
from mlpmem_jax.store.array_specs import Split, neighbors_arrays, targets_arrays


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


def estimate_index(config: Config) -> dict[str, Any]:
    """Returns disk and memory needed, as far as the number of rows is known."""
    counted, width = count_rows(config, "train"), config.decoder.width
    if counted is None:
        return {"rows": UNKNOWN_ROWS}
    num_rows = counted[0]
    largest = min(num_rows, config.retrieval.shard_rows)
    return {
        "index bytes on disk, at most": approximate.index_bytes(
            num_rows, width, config.retrieval.dims_per_block
        ),
        "index bytes of memory, at most": approximate.build_memory_bytes(
            largest, width, config.retrieval.training_rows
        ),
    }


def estimate_neighbors(config: Config, split: Split) -> dict[str, Any]:
    """Returns disk and work of keeping the neighbours of a split."""
    queries, keys = count_rows(config, split), count_rows(config, "train")
    if queries is None or keys is None:
        return {"rows": UNKNOWN_ROWS}
    num_rows, num_keys = queries[0], keys[0]
    specs = neighbors_arrays(config.datastore, config.retrieval.num_neighbors)
    return {
        **rows_entry(*queries),
        "bytes on disk": num_rows * sum(spec.row_bytes for spec in specs.values()),
        "bytes of all keys, all devices": exact_bytes(num_keys, config.decoder.width, 1),
        "flops": 2.0 * num_rows * num_keys * config.decoder.width,
    }


def estimate_targets(config: Config, split: Split) -> dict[str, Any]:
    """Returns disk of the targets of a split."""
    counted = count_rows(config, split)
    if counted is None:
        return {"rows": UNKNOWN_ROWS}
    num_rows = counted[0]
    specs = targets_arrays(config.datastore, config.targets, config.tokenizer.vocab_size)
    return {
        **rows_entry(*counted),
        "bytes on disk": num_rows * sum(spec.row_bytes for spec in specs.values()),
    }
