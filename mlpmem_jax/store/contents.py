"""What the directory of an artifact may hold: everything else in it is somebody else's.

The one place that knows the names of all files that artifacts of a kind consist of, so that
nothing is removed or overwritten that this program did not write.
"""

import os
import re
from collections.abc import Iterator

from etils import epath

from mlpmem_jax.errors import UserError
from mlpmem_jax.store.files import TEMPORARY, is_local, read_json

MANIFEST = "manifest.json"
BUILDING = "building.json"
RUNNING = "running"  # Lists of a search that goes on.

_ARRAY = r"\w+/(zarr\.json|c(/\d+)+)(\.__lock)?"  # The suffix: what a killed write left.
_WRITTEN = r"written/\d{6}\.json"
_RUNNING = rf"{RUNNING}/\d+-\d+\.lists"
_NETWORK = (r"checkpoints/\d+(\.orbax-checkpoint-tmp[^/]*)?/.+", r"checksums/\d+\.json")
_SHARD = r"(shard-\d{5}|building-[^/]+)/.+"

_CELLS = (r"(centroids|cells)/(shard\.json|\w+\.npy)", rf"(runs/)?({_ARRAY}|{_WRITTEN})")


def _report(*names: str) -> tuple[str, ...]:
    return tuple(rf"{name}\.(json|csv|png)" for name in names)


# Regular expressions of the paths of files, by the kind of the artifact.
_FILES: dict[str, tuple[str, ...]] = {
    "tokenizer": (r"tokenizer\.json",),
    "tokens": (r"progress\.npz", rf"(train|valid|test)/{_ARRAY}"),
    "decoder": _NETWORK,
    "memory": _NETWORK,
    "joint": _NETWORK,
    "datastore": (_ARRAY, _WRITTEN, r"documents\.npz"),
    "neighbors": (_ARRAY, _WRITTEN, _RUNNING),
    "scores": (_ARRAY, _WRITTEN),
    "targets": (_ARRAY, _WRITTEN, _RUNNING, r"temperature\.json"),
    "index": (_SHARD, r"(search|instead)\.json", *_CELLS),
    "results": _report("evaluate", "measured"),
    "analysis": _report("analyze"),
    "cost": (*_report("cost"), r"(prepared|round-\d+)-\d+\.json", rf"index-\d+/{_SHARD}"),
    "search-quality": (*_report("search-quality"), r"setting-[^/]+\.json"),
    "evaluate-tasks": (*_report("evaluate-tasks"), r"samples\.jsonl"),
    "machine": (),
    "compare": _report("compare", "measured", "pairs", "documents"),
    "overfitting": _report("overfitting", "measured", "documents"),
    "ablate": _report("ablate", "measured", r"ablate-\d+-[^/]+"),
}
_RECORDS = (re.escape(MANIFEST), re.escape(BUILDING))
_TEMPORARY = f"({re.escape(TEMPORARY)}|\\.tmp)?"  # The second is what earlier versions left.
# What systems leave in any directory: no content of the user's, so that it may go with ours.
_LITTER = re.compile(r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini|\.nfs[0-9a-f]+|\.fuse_hidden\w+")


def holds_files(root: epath.Path) -> bool:
    """Returns whether a directory holds anything besides the records of an artifact."""
    records = re.compile(f"({'|'.join(_RECORDS)}){_TEMPORARY}")
    return any(not records.fullmatch(name) for name in _files_below(root))


def foreign_file(root: epath.Path, kind: str | None) -> str | None:
    """Returns a file that no artifact of this kind holds, by its path in it; None: there is none.

    Symbolic links are foreign: this program makes none.

    Args:
        kind: Of the artifact; None: it is none, and its records alone are known.
    """
    names = () if kind is None else (*_FILES.get(kind, ()), *_listed(root))
    known = re.compile(f"({'|'.join((*_RECORDS, *names))}){_TEMPORARY}")
    is_link = os.path.islink if is_local(root) else (lambda path: False)
    for name in _files_below(root):
        if not known.fullmatch(name) or is_link(root / name):
            return name
    return None


def _listed(root: epath.Path) -> list[str]:
    """Returns the files that the manifest lists, as far as it can be read."""
    try:
        return [re.escape(name) for name in read_json(root / MANIFEST)["files"]]
    except (OSError, UserError, KeyError, TypeError):
        return []


def _files_below(root: epath.Path) -> Iterator[str]:
    """Yields the paths of files, and of links to whatever, but not of the systems' litter."""
    folders = [""]
    while folders:
        folder = folders.pop()
        for name, is_folder in sorted(_entries(root / folder)):
            path = f"{folder}/{name}" if folder else name
            if is_folder:
                folders.append(path)
            elif not _LITTER.fullmatch(name):
                yield path


def _entries(folder: epath.Path) -> list[tuple[str, bool]]:
    if is_local(folder):
        with os.scandir(folder) as entries:
            return [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
    return [(entry.name, entry.is_dir()) for entry in folder.iterdir()]
