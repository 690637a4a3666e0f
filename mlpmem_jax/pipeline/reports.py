"""What the commands that report share: results as JSON, and the files that are made from them."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from etils import epath

from mlpmem_jax.console import is_speaker, say
from mlpmem_jax.store.files import read_json, write_bytes, write_json
from mlpmem_jax.store.manifest import Artifact


def write_files(path: epath.Path, files: Mapping[str, Any]) -> None:
    """Writes files of a report by name: text, bytes, or what a .json file holds."""
    for name, content in files.items() if is_speaker() else ():
        if name.endswith(".json"):
            write_json(path / name, content)
        else:
            write_bytes(path / name, content if isinstance(content, bytes) else content.encode())


def print_files(artifact: Artifact, names: Iterable[str], as_text: Callable[[Any], str]) -> None:
    """Prints the tables of a finished report, and where its files lie.

    Args:
        names: Its files, the results first.
        as_text: Makes the tables from the results.

    Raises:
        ArtifactError: It is not finished, or a file of it is damaged.
    """
    artifact.verify()
    files = [artifact.path / name for name in names]
    say()
    say(as_text(read_json(files[0])))
    say()
    for file in files:
        say(f"  {file}")
    say()


def write_report(
    path: epath.Path, name: str, results: Any, table: str, picture: bytes
) -> list[str]:
    """Writes NAME.json, NAME.csv and NAME.png.

    Returns:
        The file that holds the results: the others are made from it.
    """
    write_files(path, dict(zip(_names(name), (results, table, picture), strict=True)))
    return [f"{name}.json"]


def print_results(artifact: Artifact, name: str, as_text: Callable[[Any], str]) -> None:
    """Prints what `write_report` wrote, as `print_files` does."""
    print_files(artifact, _names(name), as_text)


def _names(name: str) -> list[str]:
    return [name + ending for ending in (".json", ".csv", ".png")]
