"""What `index` and `retrieve` will need of disk, memory and arithmetic, for `--dry-run`."""

from typing import Any

from mlpmem_jax.config.schema import Config
from mlpmem_jax.datastore.layout import Layout, Split
from mlpmem_jax.errors import UserError
from mlpmem_jax.retrieval import approximate


def estimate_index(config: Config) -> dict[str, Any]:
    """Returns disk and memory needed, as far as the number of rows is known."""
    num_rows, width = _rows(config, "train"), config.decoder.width
    if num_rows is None:
        return {"index": "known once the datastore exists"}
    largest = min(num_rows, config.retrieval.shard_rows)
    return {
        "index bytes on disk, at most": approximate.index_bytes(
            num_rows, width, config.retrieval.dims_per_block
        ),
        "index bytes of memory, at most": approximate.build_memory_bytes(
            largest, width, config.retrieval.training_rows
        ),
    }


def _rows(config: Config, split: Split) -> int | None:
    try:
        return int(Layout(config).datastore(split).load().counts["rows"])
    except UserError:
        return None


def estimate_neighbors(config: Config, split: Split) -> dict[str, Any]:
    """Returns disk and work of keeping the neighbours of a split."""
    num_rows, num_keys = _rows(config, split), _rows(config, "train")
    if num_rows is None or num_keys is None:
        return {"neighbours": "known once the datastore exists"}
    specs = Layout(config).neighbors_arrays()
    return {
        "rows": num_rows,
        "bytes on disk": num_rows * sum(spec.row_bytes for spec in specs.values()),
        "bytes of memory": num_keys * (config.decoder.width + 1) * 4,
        "flops": 2.0 * num_rows * num_keys * config.decoder.width,
    }


def estimate_targets(config: Config, split: Split) -> dict[str, Any]:
    """Returns disk of the targets of a split."""
    num_rows = _rows(config, split)
    if num_rows is None:
        return {"targets": "known once the datastore exists"}
    specs = Layout(config).targets_arrays(config.tokenizer.vocab_size)
    return {
        "rows": num_rows,
        "bytes on disk": num_rows * sum(spec.row_bytes for spec in specs.values()),
    }
