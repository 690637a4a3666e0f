"""What the commands that report share: JSON, CSV and a picture under one name."""

from collections.abc import Callable
from typing import Any

from etils import epath

from mlpmem_jax.console import is_speaker, say
from mlpmem_jax.store.files import read_json, write_bytes, write_json
from mlpmem_jax.store.manifest import Artifact

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


def print_results(artifact: Artifact, name: str, as_text: Callable[[Any], str]) -> None:
    """Prints the tables of a finished report, and where its files lie.

    Raises:
        ArtifactError: It is not finished, or a file of it is damaged.
    """
    artifact.verify()
    say()
    say(as_text(read_json(artifact.path / f"{name}.json")))
    say()
    for ending in _ENDINGS:
        say(f"  {artifact.path / (name + ending)}")
    say()
