"""`corpus.json`: how the training text of a work directory has changed since it was first read."""

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from etils import epath

from mlpmem_jax.store.checked_json import (
    as_json,
    fingerprint_of,
    read_checked_json,
    write_checked_json,
)
from mlpmem_jax.store.files import absolute
from mlpmem_jax.store.lock import only_maker
from mlpmem_jax.store.manifest import Artifact

FILE = "corpus.json"
_WAY_OUT = "it says which text was appended and removed; restore it, or use another workdir"


@dataclasses.dataclass(frozen=True)
class Change:
    """One change of the training text.

    Attributes:
        kind: What happened.
        paths: append: the files.
        text: append: settings and digest of the text, the recipe of its tokens.
        documents: remove: ids of the documents.
        memory: The run's last finished memory before the change; empty: it had none.
        num_held_out: Texts of `CorpusRecord.held_out` that its documents may not repeat.
    """

    kind: Literal["append", "remove"]
    paths: tuple[str, ...] = ()
    text: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    documents: tuple[str, ...] = ()
    memory: str = ""
    num_held_out: int = 0

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> "Change":
        """Returns a change as JSON holds it; earlier versions recorded no memory."""
        lists = {name: tuple(stored[name]) for name in ("paths", "documents")}
        return cls(**{**stored, **lists})


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """Text that was appended to be scored, never trained on.

    Attributes:
        name: For roles and tables.
        paths: The files.
        text: Settings and digest of the text, the recipe of its tokens.
        rows: The training rows before it came, whose documents are left out.
    """

    name: str
    paths: tuple[str, ...]
    text: Mapping[str, Any]
    rows: str

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> "HeldOut":
        """Returns a text as JSON holds it."""
        return cls(**{**stored, "paths": tuple(stored["paths"])})


@dataclasses.dataclass(frozen=True)
class CorpusRecord:
    """The changes of the training text of a work directory.

    Attributes:
        made_with: What all of it was made with, by name; empty: nothing has changed.
        start: Artifacts, by role, that `compact` made: the changes come behind them.
        changes: In their order.
        held_out: Appended text that is scored alone; `compact` leaves it as it is.
    """

    made_with: Mapping[str, str] = dataclasses.field(default_factory=dict)
    start: Mapping[str, str] = dataclasses.field(default_factory=dict)
    changes: tuple[Change, ...] = ()
    held_out: tuple[HeldOut, ...] = ()

    @classmethod
    def read(cls, workdir: str | epath.Path) -> "CorpusRecord":
        """Reads the record of a work directory; an empty one where there is none.

        Raises:
            ArtifactError: It is damaged.
        """
        file = absolute(workdir) / FILE
        if not file.exists():
            return cls()
        content = read_checked_json(file, _WAY_OUT)
        changes = tuple(Change.of(one) for one in content["changes"])
        held_out = tuple(HeldOut.of(one) for one in content.get("held_out", ()))
        return cls(content["made_with"], content["start"], changes, held_out)

    def write(self, workdir: str | epath.Path) -> None:
        """Writes the record, atomically."""
        write_checked_json(absolute(workdir) / FILE, dataclasses.asdict(self))

    def and_then(self, change: Change) -> "CorpusRecord":
        """Returns the record with one more change."""
        return dataclasses.replace(self, changes=(*self.changes, change))

    def is_same(self, other: "CorpusRecord") -> bool:
        """Whether both record the same changes, one of them perhaps read from a file."""
        one, two = (fingerprint_of(as_json(dataclasses.asdict(each))) for each in (self, other))
        return one == two

    @property
    def kept(self) -> dict[str, str]:
        """What nothing can make again, by role: what `compact` made (rows, and lists until a
        change), and the memory that `train` may continue.

        Whatever `run.json` says: it may have been deleted, or a `train` that began before may have
        written what it read.
        """
        kept = {
            f"{role} (compacted)": relative
            for role, relative in self.start.items()
            if not self.changes or relative.startswith("datastore/")
        }
        # Not where documents were removed: nothing that was trained on them is kept.
        if self.changes and all(one.kind == "append" for one in self.changes):
            kept["memory (before the last change)"] = self.changes[-1].memory
        return {role: relative for role, relative in kept.items() if relative}

    @property
    def before(self) -> "CorpusRecord":
        """The record without its last change."""
        return dataclasses.replace(self, changes=self.changes[:-1])


@contextlib.contextmanager
def changing(workdir: str | epath.Path) -> Iterator[None]:
    """Holds the corpus of a work directory while it is changed; a second one waits."""
    with only_maker(Artifact(workdir, "corpus", "tokens", label="the corpus")):
        yield
