"""The safetensors files of a Hugging Face directory, and the shapes in their headers."""

import json
from pathlib import Path

from mlpmem_jax.errors import UserError

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"


def is_gone(path: str) -> bool:
    """Whether a pretrained network is no longer where it was; a relative path may name the Hub."""
    where = Path(path).expanduser()
    return where.is_absolute() and not where.exists()


def weight_files(folder: Path) -> list[str]:
    """Returns the names of the files that hold a directory's tensors.

    Raises:
        UserError: There are none, one is missing, the index is damaged, or weights are pickled.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            named = set(json.loads(index.read_bytes())["weight_map"].values())
            # Names of files in this directory.
            inside = all(isinstance(one, str) and Path(one).name == one for one in named)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
            inside = False
        if not inside:
            raise UserError(f"{index}: damaged, it has no weight_map from tensors to files")
        missing = sorted(name for name in named if not (folder / name).is_file())
        if missing:
            raise UserError(f"{folder}: {', '.join(missing)} missing ({INDEX})")
        return sorted(named)
    if (folder / ONE_FILE).is_file():
        return [ONE_FILE]
    pickled = [p.name for p in folder.glob("*.bin")] if folder.is_dir() else []
    raise UserError(
        f"{folder}: has neither {ONE_FILE} nor {INDEX}"
        + (f"; {pickled[0]} is a pickle, which is never read" if pickled else "")
    )


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor of a directory by name; reads headers alone.

    Raises:
        UserError: As `weight_files`, or a file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for name in weight_files(folder):
        try:
            with safe_open(folder / name, framework="np") as handle:
                for tensor in handle.keys():  # noqa: SIM118 (no mapping)
                    shapes[tensor] = tuple(handle.get_slice(tensor).get_shape())
        except (OSError, SafetensorError) as error:
            raise UserError(f"{folder / name}: cannot be read as safetensors ({error})") from None
    return shapes
