"""What the commands that report share: JSON, CSV and a picture under one name."""

from typing import Any

from etils import epath

from mlpmem_jax.console import is_speaker, say
from mlpmem_jax.store.files import write_bytes, write_json

_ENDINGS = (".json", ".csv", ".png")


def write_report(
    path: epath.Path, name: str, results: Any, table: str, picture: bytes
) -> list[str]:
    """Writes NAME.json, NAME.csv and NAME.png.

    Returns:
        The file that holds the results: the others are made from it.
    """
    if is_speaker():
        write_json(path / f"{name}.json", results)
        write_bytes(path / f"{name}.csv", table.encode())
        write_bytes(path / f"{name}.png", picture)
    return [f"{name}.json"]


def print_files(path: epath.Path, name: str) -> None:
    """Says where the files lie."""
    say()
    for ending in _ENDINGS:
        say(f"  {path / (name + ending)}")
    say()
