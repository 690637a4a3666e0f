"""Files of an index: a directory a shard, with `shard.json`, which lists the others."""

import io
import re
import shutil
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from mlpmem_jax.console import warn
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.retrieval.far_rows import FarRows
from mlpmem_jax.store.checked_json import read_checked_json, write_checked_json
from mlpmem_jax.store.files import describe_file, is_local, verify_file, write_bytes

SHARD = "shard.json"
LEAF_OF_ROW = "datapoint_to_token.npy"


def write_whole(folder: epath.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as files of a directory, and last the list of them."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in arrays.items():
        data = io.BytesIO()
        np.save(data, values, allow_pickle=False)
        write_bytes(folder / f"{name}.npy", data.getvalue())
    files = {f"{name}.npy": describe_file(folder / f"{name}.npy") for name in arrays}
    write_checked_json(folder / SHARD, {"files": files})


def read_whole(folder: epath.Path) -> dict[str, np.ndarray]:
    """Returns the arrays that `write_whole` wrote.

    Raises:
        ArtifactError: A file is missing or damaged; it is named.
    """
    _verify_shard(folder)
    names = read_checked_json(folder / SHARD)["files"]
    return {
        name.removesuffix(".npy"): np.load(
            io.BytesIO((folder / name).read_bytes()), allow_pickle=False
        )
        for name in names
    }


def is_whole(shard: epath.Path) -> bool:
    """Returns whether an earlier start has built a shard, and nothing has happened to it since."""
    if not (shard / SHARD).exists():
        return False
    try:
        _verify_shard(shard)
    except ArtifactError as error:
        warn(f"{error}; the shard is built again")
        return False
    return True


def verify_shards(path: epath.Path) -> None:
    """Compares the files of all finished shards with their checksums.

    Raises:
        ArtifactError: A file is missing or damaged; it is named.
    """
    for name in shard_names(path):
        _verify_shard(path / name)


def _verify_shard(shard: epath.Path) -> None:
    for name, expected in read_checked_json(shard / SHARD)["files"].items():
        verify_file(shard / name, expected)


def shard_names(path: epath.Path) -> list[str]:
    """Returns the directories of the shards, in order."""
    names = (entry.name for entry in path.iterdir())
    return sorted(name for name in names if re.fullmatch(r"shard-[0-9]{5,}", name))


def shard_files(path: epath.Path, num_shards: int) -> dict[str, Any]:
    """Returns bytes and CRC-32 of the files of finished shards, by path in the index."""
    files: dict[str, Any] = {}
    for number in range(num_shards):
        shard = shard_path(path, number)
        about = {**read_checked_json(shard / SHARD)["files"], SHARD: describe_file(shard / SHARD)}
        files |= {f"{shard.name}/{name}": each for name, each in about.items()}
    return files


def shard_path(path: epath.Path, number: int) -> epath.Path:
    """Returns the directory of a shard."""
    return path / f"shard-{number:05d}"


def leaf_order(path: epath.Path) -> Callable[[slice], np.ndarray | None]:
    """Returns `ApproximateEngine.visiting_order` of an index that is not held in memory.

    Leaf numbers are read from local disk as they are needed; for an index in a bucket there is no
    order.
    """
    if not is_local(path):
        return lambda rows: None
    firsts, leaves = [], []
    for name in shard_names(path):
        about, file = read_checked_json(path / name / SHARD), path / name / LEAF_OF_ROW
        firsts.append(int(about["first_row"]))
        if LEAF_OF_ROW in about["files"]:
            leaf_N = np.load(file, mmap_mode="r")
            leaves.append(FarRows(path / name, about["files"]).with_gaps(leaf_N))
        else:
            leaves.append(np.zeros(about["num_rows"], np.int32))

    def order(rows: slice) -> np.ndarray:
        parts = [
            np.asarray(leaf_N[max(0, rows.start - first) : max(0, rows.stop - first)])
            for first, leaf_N in zip(firsts, leaves, strict=True)
        ]
        return np.argsort(np.concatenate(parts), kind="stable")

    return order


def remove_shards(path: epath.Path) -> None:
    """Removes the shards of a build that is given up."""
    for name in shard_names(path) if path.exists() else ():
        (path / name).rmtree()


def remove_unfinished(path: epath.Path) -> None:
    """Removes what a killed build left."""
    if is_local(path):
        for left in path.iterdir() if path.exists() else ():
            if left.name.startswith("building-"):
                shutil.rmtree(left, ignore_errors=True)
