"""What the command line says beside the configuration."""

from dataclasses import dataclass
from typing import Literal

Exported = Literal["decoder", "model", "memory"]


@dataclass(frozen=True)
class Options:
    """Flags of one command.

    Attributes:
        workdir: The run's directory, as in `config.workdir`.
        dry_run: Print the plan, make nothing.
        print_config: Print the resolved configuration, make nothing.
        rebuild: Rebuild what is stale, instead of refusing it.
        without_memory: `generate` and `serve`: the decoder alone.
        remove_unused: `artifacts` only: remove what no work directory uses.
        api_key_file: `serve` only: the file with the key that requests must bring.
        text: `append` only: files of the text.
        held_out: `append` only: files of text that is scored alone.
        documents: `remove` only: ids of documents, or files that hold their text.
        output: Where the report of `compile` goes as JSON, or what `export` writes.
        what: `export` only: which networks; None: both, the decoder alone without a memory.
    """

    workdir: str
    dry_run: bool = False
    print_config: bool = False
    rebuild: bool = False
    without_memory: bool = False
    remove_unused: bool = False
    api_key_file: str | None = None
    output: str | None = None
    what: Exported | None = None
    text: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    documents: tuple[str, ...] = ()

    def flags(self) -> dict[str, bool]:
        """Returns what all processes of a run must have been given alike."""
        return {"rebuild": self.rebuild, "without_memory": self.without_memory}
