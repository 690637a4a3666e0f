"""The digests of the shards that are written, between their writers and the manifest."""

import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from etils import epath

from mlpmem_jax.store.checked_json import SHARDS, read_checked_json, write_checked_json

WRITTEN = "written"
_READERS = 16


def record_written(path: epath.Path, shard: int, digests: Mapping[str, str]) -> None:
    """Records that a shard of all arrays of an artifact is on disk.

    Args:
        shard: Its number.
        digests: By name of the array.
    """
    (path / WRITTEN).mkdir(parents=True, exist_ok=True)
    write_checked_json(_file(path, shard), digests)


def recorded_shards(path: epath.Path) -> frozenset[int]:
    """Returns the numbers of the shards that are recorded."""
    if not (path / WRITTEN).exists():
        return frozenset()
    names = (entry.name for entry in (path / WRITTEN).iterdir())
    found = (re.fullmatch(r"([0-9]+)\.json", name) for name in names)
    return frozenset(int(each[1]) for each in found if each)


def with_digests(path: epath.Path, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the recorded digests to the descriptions of arrays that have none yet.

    Raises:
        ArtifactError: A record is missing or damaged; it is named.
    """
    without = {name: about for name, about in arrays.items() if SHARDS not in about}
    counts = {-(-about["shape"][0] // about["shard_rows"]) for about in without.values()}
    files = [_file(path, shard) for shard in range(max(counts, default=0))]
    with ThreadPoolExecutor(_READERS) as pool:
        records = list(pool.map(read_checked_json, files))
    filled = {
        name: about | {SHARDS: [record[name] for record in records]}
        for name, about in without.items()
    }
    return {**arrays, **filled}


def forget_written(path: epath.Path) -> None:
    """Removes the records: the manifest has them."""
    if (path / WRITTEN).exists():
        (path / WRITTEN).rmtree()


def _file(path: epath.Path, shard: int) -> epath.Path:
    return path / WRITTEN / f"{shard:06d}.json"
