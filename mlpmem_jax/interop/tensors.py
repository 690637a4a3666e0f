"""Tensors of a Hugging Face directory: one or many safetensors files, read one at a time."""

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from mlpmem_jax.config.weight_files import weight_files
from mlpmem_jax.errors import UserError

_DTYPES = ("F16", "BF16", "F32", "F64")
_SAMPLES, _SAMPLE_BYTES = 64, 4096


class TensorFiles:
    """The tensors of a directory by name.

    Attributes:
        shapes: Shape of each.
    """

    def __init__(self, path: str):
        """Opens the files; reads their headers alone.

        Raises:
            UserError: There are none, one is missing or damaged, or weights are pickled.
        """
        self._folder = Path(path).expanduser()
        self._file_of: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name in self.files():
            with self._opened(name) as handle:
                for tensor in handle.keys():  # noqa: SIM118 (no mapping)
                    about = handle.get_slice(tensor)
                    if about.get_dtype() not in _DTYPES:
                        raise UserError(
                            f"{self._folder / name}: {tensor} has the dtype {about.get_dtype()}; "
                            f"supported are {', '.join(_DTYPES)}"
                        )
                    self._file_of[tensor] = name
                    self.shapes[tensor] = tuple(about.get_shape())

    def files(self) -> list[str]:
        """Returns the names of the files.

        Raises:
            UserError: There are none.
        """
        return weight_files(self._folder)

    def read(self, name: str) -> np.ndarray:
        """Returns a tensor in float32.

        Raises:
            UserError: It holds values that are not finite.
        """
        file = self._file_of[name]
        with self._opened(file) as handle:
            found = np.asarray(handle.get_tensor(name)).astype(np.float32)
        check_finite(found, f"{self._folder / file}: {name}")
        return found

    @contextlib.contextmanager
    def _opened(self, file: str) -> Iterator[Any]:
        """Opens a file for a moment: its pages count as memory as long as it is open."""
        try:
            with safe_open(self._folder / file, framework="np") as handle:
                yield handle
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{self._folder / file}: cannot be read as safetensors ({error})"
            ) from None

    def digest(self) -> str:
        """Returns a digest of names, shapes, sizes and samples of the bytes of each file."""
        return digest_of([self._folder / name for name in self.files()])


def digest_of(files: Sequence[Path]) -> str:
    """Returns a digest of names, sizes and samples of the bytes of each file."""
    found = hashlib.blake2b(digest_size=8)
    for file in files:
        size = os.path.getsize(file)
        found.update(f"{file.name} {size} ".encode())
        with contextlib.closing(open(file, "rb")) as opened:
            for sample in range(_SAMPLES):
                opened.seek(max(0, size - _SAMPLE_BYTES) * sample // (_SAMPLES - 1))
                found.update(opened.read(_SAMPLE_BYTES))
    return found.hexdigest()


def check_finite(tensor: np.ndarray, name: str) -> None:
    """Refuses values that are not finite.

    Raises:
        UserError: There are some.
    """
    if not np.isfinite(tensor).all():
        raise UserError(f"{name} has values that are not finite")


def check_names(
    found: Mapping[str, tuple[int, ...]],
    wanted: Mapping[str, tuple[int, ...]],
    source: str,
    asker: str = "config.json",
) -> None:
    """Refuses tensors that are missing, unexpected, or of another shape.

    Args:
        found: Shapes by name.
        wanted: The same of the network.
        source: The key that names the directory, and its value.
        asker: What decides the wanted shapes.

    Raises:
        UserError: Names all of them.
    """
    lines = []
    if missing := sorted(wanted.keys() - found.keys()):
        lines.append("missing: " + ", ".join(missing))
    if unexpected := sorted(found.keys() - wanted.keys()):
        lines.append("unexpected: " + ", ".join(unexpected))
    lines += [
        f"{name} has the shape {list(found[name])}, {asker} asks for {list(wanted[name])}"
        for name in sorted(wanted.keys() & found.keys())
        if tuple(found[name]) != tuple(wanted[name])
    ]
    if lines:
        raise UserError(f"{source}: " + "; ".join(lines))
