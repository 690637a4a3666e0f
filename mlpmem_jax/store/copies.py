"""The first rows of an artifact as an artifact of their own."""

from collections.abc import Mapping
from typing import Any

from mlpmem_jax.store.array_specs import ArraySpec
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.shards import ShardWriter
from mlpmem_jax.store.stored_array import StoredArray


def copy_rows(
    source: Artifact, target: Artifact, specs: Mapping[str, ArraySpec], num_rows: int
) -> dict[str, Any]:
    """Copies the first rows of every array, shard by shard; finished shards are skipped.

    Args:
        source: A finished artifact of rows, joined or not.
        target: Where the copy goes.
        specs: Its arrays.

    Returns:
        The arrays as the manifest describes them.

    Raises:
        ArtifactError: A shard of the source is missing or damaged.
    """
    stored = {name: StoredArray(source, name) for name in specs}
    # What was refused when the source was written is not in it.
    writer = ShardWriter(target.path, specs, num_rows, refuse_non_finite=False)
    for part in writer.own_rows():
        rows = {name: one.read(part.start, part.stop) for name, one in stored.items()}
        writer.put(part.start, rows)
    return writer.close()
