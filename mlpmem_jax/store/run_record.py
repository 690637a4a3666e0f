"""`run.json`: which artifacts a work directory uses, by role, and where they lie."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.store.checked_json import fingerprint_of, read_checked_json, write_checked_json
from mlpmem_jax.store.files import absolute
from mlpmem_jax.store.lock import only_writer
from mlpmem_jax.store.manifest import Artifact

FILE = "run.json"
ARTIFACTS = "artifacts"  # The store of a work directory that names no other.
RUNS = ".runs"  # In a store: the work directories that use it.


def store_of(workdir: str | epath.Path, store: str | None) -> epath.Path:
    """Returns the directory of the artifacts of a work directory."""
    return absolute(workdir) / ARTIFACTS if store is None else absolute(store)


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What `run.json` holds.

    Attributes:
        store: Another store than the work directory's own.
        roles: KIND/ID by role, for example "datastore/train".
        sources: What was read of texts and files, by the settings that name them.
    """

    workdir: epath.Path
    store: str | None = None
    roles: Mapping[str, str] = dataclasses.field(default_factory=dict)
    sources: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, workdir: str | epath.Path) -> "RunRecord":
        """Reads the record of a work directory; an empty one where there is none.

        Raises:
            ArtifactError: It is damaged.
        """
        folder = absolute(workdir)
        if not (folder / FILE).exists():
            return cls(folder)
        content = read_checked_json(folder / FILE, "delete it; the next command writes it again")
        return cls(folder, content["store"], content["roles"], content["sources"])

    @classmethod
    def registered(cls, file: epath.Path) -> "RunRecord | None":
        """Returns the record of a work directory that uses a store.

        Where the work directory cannot be seen from here, for example on another machine, its
        registration stands for it.

        Args:
            file: Its registration in the store.

        Returns:
            None: It is gone, and its own store with it.

        Raises:
            ArtifactError: A file is damaged.
        """
        copy = read_checked_json(file)
        if (absolute(copy["workdir"]) / FILE).exists():
            return cls.read(copy["workdir"])
        if copy["store"] is None:
            return None
        return cls(absolute(copy["workdir"]), copy["store"], copy["roles"])

    @classmethod
    def update(
        cls,
        workdir: str | epath.Path,
        store: str | None,
        roles: Mapping[str, str],
        sources: Mapping[str, Any],
        drop: Callable[[str], bool] = lambda role: False,
    ) -> None:
        """Adds roles and sources to a record; drops roles of another store than this.

        Registers the work directory with its store. Of several commands at once, none loses what
        another has written.

        Args:
            store: The key `store`.
            roles: Roles to add.
            sources: Digests to add.
            drop: Tells which known roles are dropped.

        Raises:
            ArtifactError: The record is damaged.
        """

        def updated() -> "RunRecord":
            known = cls.read(workdir)
            kept = known.roles if store == known.store else {}
            kept = {role: relative for role, relative in kept.items() if not drop(role)}
            return cls(known.workdir, store, {**kept, **roles}, {**known.sources, **sources})

        # A finished run may lie where nothing can be written, not even a lock.
        if updated()._differs():
            with only_writer(absolute(workdir) / FILE):
                updated()._write()

    @property
    def _content(self) -> dict[str, Any]:
        return {"store": self.store, "roles": dict(self.roles), "sources": dict(self.sources)}

    @property
    def _registration(self) -> tuple[epath.Path, dict[str, Any]]:
        store = store_of(self.workdir, self.store)
        content = {"workdir": str(self.workdir), "store": self.store, "roles": dict(self.roles)}
        return store / RUNS / f"{fingerprint_of(str(self.workdir))}.json", content

    def _differs(self) -> bool:
        # Registered again where it is known: its directory may have been moved or copied since.
        file, content = self._registration
        is_registered = file.exists() and read_checked_json(file) == content
        return self != RunRecord.read(self.workdir) or not is_registered

    def _write(self) -> None:
        write_checked_json(self.workdir / FILE, self._content)
        file, content = self._registration
        file.parent.mkdir(parents=True, exist_ok=True)
        write_checked_json(file, content)

    def artifact(self, role: str, asked: str) -> Artifact:
        """Returns the artifact that has a role in the work directory.

        Args:
            role: For example "targets/train".
            asked: The key and value that ask for it, for the message.

        Raises:
            ArtifactError: The work directory has none.
        """
        if role not in self.roles:
            raise ArtifactError(f"{asked}: {self.workdir / FILE} names no {role} artifact")
        relative = self.roles[role]
        root = store_of(self.workdir, self.store)
        return Artifact(root, relative, relative.split("/")[0], label=role)
