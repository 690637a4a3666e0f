"""Artifacts: directories whose manifest is written last.

An artifact's id is a hash of its kind, its recipe and the ids of its inputs, so it is known
before the artifact is made, and other settings mean another artifact beside it. One is
*missing* (nothing there), *partial* (begun: `building.json` holds its recipe, so that the next
start continues) or *complete* (`manifest.json`). One whose inputs were rebuilt with other bits
is *stale* and refused with both fingerprints.
"""

import dataclasses
import enum
import importlib.metadata
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.store import nearest, replacement
from mlpmem_jax.store.checked_json import as_json as _as_json
from mlpmem_jax.store.checked_json import fingerprint_of, without_checksum, write_checked_json
from mlpmem_jax.store.contents import BUILDING, MANIFEST, holds_files
from mlpmem_jax.store.differences import differences
from mlpmem_jax.store.files import absolute, describe_file, read_json, verify_file
from mlpmem_jax.store.shard_records import forget_written, with_digests

SCHEMA_VERSION = 2
_SOFTWARE = ("mlpmem_jax", "jax", "flax", "orbax-checkpoint", "tensorstore", "scann", "tokenizers")


# The commands that make the kinds of artifacts which are not named like them.
_COMMANDS = {
    "tokenizer": "tokenize",
    "tokens": "tokenize",
    "decoder": "pretrain",
    "datastore": "embed",
    "neighbors": "retrieve",
    "targets": "retrieve",
    "memory": "train",
    "joint": "train",
    "results": "evaluate",
    "analysis": "analyze",
    "scores": "compare",
    "machine": "compare",
}


class Status(enum.Enum):
    """How far an artifact is."""

    MISSING = "missing"
    PARTIAL = "partial"
    COMPLETE = "complete"


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What an artifact is and what it was made from.

    Attributes:
        kind: What sort of artifact, for example "tokens".
        recipe: The settings that decide its content.
        made_from: Fingerprint of each input, by its path in the store.
        counts: Numbers of rows, tokens, steps and the like.
        arrays: Shape, dtype, chunking and the digests of the shards of each array, by path in the
            artifact.
        files: Bytes and CRC-32 of files whose format has no checksum, by path.
        measured: What was observed while making it (seconds, recall); not fingerprinted.
        fingerprint: Identifies kind, recipe, origin, counts, arrays and files (or `content`).
        software: Versions of what made it; not fingerprinted.
        created: Seconds since the epoch; not fingerprinted.
        run: Names the run that made it, restarts included, where it has a name; not fingerprinted.
        content: A digest of what `files` hold, where files of equal content differ.
    """

    kind: str
    recipe: Mapping[str, Any]
    made_from: Mapping[str, str]
    counts: Mapping[str, Any]
    arrays: Mapping[str, Any]
    files: Mapping[str, Any]
    measured: Mapping[str, Any]
    fingerprint: str
    software: Mapping[str, str]
    created: float
    run: str | None = None
    schema_version: int = SCHEMA_VERSION
    content: str | None = None


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a finished build reports for the manifest; see `Artifact.finish`."""

    counts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    arrays: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    files: Sequence[str] | Mapping[str, Any] = ()
    measured: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    content: str | None = None


def _content_fingerprint(manifest: Mapping[str, Any]) -> str:
    holds = "content" if "content" in manifest else "files"
    names = ("schema_version", "kind", "recipe", "made_from", "counts", "arrays", holds)
    return fingerprint_of({name: manifest[name] for name in names})


def software_versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that decide results."""
    versions = {"python": platform.python_version()}
    for name in _SOFTWARE:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


class Artifact:
    """One artifact of a store.

    Attributes:
        root: The store, or where reports go.
        relative: KIND/ID.
        kind: What sort of artifact.
        recipe: The settings that decide its content; None: those that its manifest records.
        inputs: The artifacts that it is made from.
        label: Its role in a run, for example "datastore/train".
    """

    def __init__(
        self,
        root: str | epath.Path,
        relative: str,
        kind: str,
        *,
        recipe: Mapping[str, Any] | None = None,
        inputs: "Sequence[Artifact]" = (),
        label: str | None = None,
    ):
        """Names an artifact that lies at a known place; `of` derives the place from the content."""
        self.root = absolute(root)
        self.relative = relative
        self.kind = kind
        self.path = self.root / relative
        self.recipe = recipe
        self.inputs = tuple(inputs)
        self.label = label or relative

    @classmethod
    def of(
        cls,
        root: str | epath.Path,
        kind: str,
        recipe: Mapping[str, Any],
        inputs: "Sequence[Artifact]" = (),
        label: str | None = None,
    ) -> "Artifact":
        """Returns the artifact with this recipe and these inputs, which may not be made yet."""
        content = {"version": SCHEMA_VERSION, "kind": kind, "recipe": _as_json(recipe)}
        number = fingerprint_of(content | {"inputs": [one.relative for one in inputs]})
        return cls(
            root, f"{kind}/{number}", kind, recipe=recipe, inputs=inputs, label=label or kind
        )

    def __repr__(self) -> str:
        return f"Artifact({str(self.path)!r}, kind={self.kind!r})"

    @property
    def title(self) -> str:
        """Role and beginning of the id, for people."""
        number = self.path.name.rsplit("-", 1)[-1]
        return f"{self.label} ({number[:8]})"

    def is_complete(self) -> bool:
        """Whether there is a manifest, of whatever settings."""
        return bool((self.path / MANIFEST).exists())

    def load(self) -> Manifest:
        """Reads the manifest.

        Raises:
            ArtifactError: The artifact is missing or incomplete, or its manifest is damaged.
        """
        file = self.path / MANIFEST
        if not file.exists():
            state = "is not finished" if (self.path / BUILDING).exists() else "does not exist"
            raise ArtifactError(
                f"{self.path}: {self.label} {state}; make it with the command `{self.command}`"
                + nearest.in_words(self)
            )
        raw = self._record(MANIFEST)
        version = raw.get("schema_version")
        if version != SCHEMA_VERSION and isinstance(version, int):
            raise ArtifactError(
                f"{file}: schema version {version}, this software reads {SCHEMA_VERSION}; "
                f"{self._way_out}"
            )
        manifest = Manifest(**without_checksum(file, raw, self._way_out))
        if manifest.kind != self.kind:
            raise ArtifactError(
                f"{file}: is of kind {manifest.kind}, not {self.kind}; {self._way_out}"
            )
        return manifest

    @property
    def _way_out(self) -> str:
        return f"rebuild it with `{self.command} --rebuild`"

    def _record(self, name: str) -> dict[str, Any]:
        """Reads the manifest, or what was recorded when the artifact was begun, unchecked.

        Raises:
            ArtifactError: The file is no JSON object; names it and the way out.
        """
        try:
            raw = read_json(self.path / name)
        except ArtifactError as error:
            raise ArtifactError(f"{error}; {self._way_out}") from None
        if not isinstance(raw, dict):
            raise ArtifactError(f"{self.path / name}: damaged, no JSON object; {self._way_out}")
        return raw

    def _begun(self) -> dict[str, Any]:
        """Reads what was recorded when the artifact was begun.

        Raises:
            ArtifactError: The file is damaged; names it and the way out.
        """
        return without_checksum(self.path / BUILDING, self._record(BUILDING), self._way_out)

    @property
    def command(self) -> str:
        """The command that makes this kind of artifact."""
        return _COMMANDS.get(self.kind, self.kind)

    def verify(self) -> Manifest:
        """Reads the manifest and compares the checksum of every file that it lists.

        Raises:
            ArtifactError: As `load`, or a file is missing, truncated or changed; it is named.
        """
        manifest = self.load()
        for name, expected in manifest.files.items():
            verify_file(self.path / name, expected)
        return manifest

    def status(self, made_from: Mapping[str, str]) -> Status:
        """Tells how far the artifact is.

        Args:
            made_from: Fingerprints of the inputs as they are now, by their paths in the store.

        Raises:
            ArtifactError: It was built, or begun, from inputs with other content.
        """
        if (self.path / MANIFEST).exists():
            manifest = self.load()
            self._refuse_stale("built", manifest.recipe, manifest.made_from, made_from)
            return Status.COMPLETE
        if (self.path / BUILDING).exists():
            try:
                begun = self._begun()
            except FileNotFoundError:  # Another run has just finished it.
                return self.status(made_from)
            if begun == replacement.REMOVING or not holds_files(self.path):
                return Status.MISSING  # Nothing to continue: removed, or refused at once.
            self._refuse_stale("begun", begun["recipe"], begun["made_from"], made_from)
            return Status.PARTIAL
        return Status.MISSING

    def _refuse_stale(
        self,
        verb: str,
        old_recipe: Mapping[str, Any],
        old_from: Mapping[str, str],
        made_from: Mapping[str, str],
    ) -> None:
        """Compares content with what is asked for; the recipes differ only where files were moved.

        Raises:
            ArtifactError: Names what differs.
        """
        lines = [] if self.recipe is None else differences(old_recipe, _as_json(self.recipe))
        lines += [f"from another {line}" for line in differences(old_from, _as_json(made_from))]
        if lines:
            more = f"; and {len(lines) - 4} more" if len(lines) > 4 else ""
            raise ArtifactError(
                f"{self.path}: {self.label} is stale, {verb} {'; '.join(lines[:4])}{more}; rebuild "
                f"it with `{self.command} --rebuild`"
            )

    def begin(self, made_from: Mapping[str, str], run: str | None = None) -> None:
        """Records what is about to be made, and by which run, so that it can be continued.

        Raises:
            ArtifactError: The directory is not ours.
        """
        replacement.refuse_foreign(self, removes=False)
        self.path.mkdir(parents=True, exist_ok=True)
        begun = _as_json({"recipe": self.recipe or {}, "made_from": made_from})
        seconds = 0.0
        if (self.path / BUILDING).exists():
            before = self._begun()
            if before == replacement.REMOVING:
                replacement.finish_removal(self.path)
            # An attempt from other inputs, which left nothing, is no part of this one.
            if {name: before.get(name) for name in begun} == begun:
                seconds = self.spent()
        write_checked_json(self.path / BUILDING, begun | {"run": run, "seconds": seconds})

    def spent(self) -> float:
        """Returns the seconds that earlier starts have spent on it, as far as they recorded it."""
        if not (self.path / BUILDING).exists():
            return 0.0
        return float(self._begun().get("seconds", 0.0))

    def record_spent(self, seconds: float) -> None:
        """Records the seconds spent so far, for the start after a kill."""
        write_checked_json(self.path / BUILDING, self._begun() | {"seconds": seconds})

    def is_of(self, run: str | None) -> bool:
        """Returns whether this run made or began it; a run without a name made nothing."""
        for name in (MANIFEST, BUILDING):
            if run is not None and (self.path / name).exists():
                try:
                    return bool(self._record(name).get("run") == run)
                except ArtifactError:
                    return False  # Damaged, so not to be kept.
        return False

    def finish(
        self,
        *,
        counts: Mapping[str, Any] | None = None,
        arrays: Mapping[str, Any] | None = None,
        files: Sequence[str] | Mapping[str, Any] = (),
        measured: Mapping[str, Any] | None = None,
        content: str | None = None,
        confirm: Callable[[], None] = lambda: None,
    ) -> Manifest:
        """Writes the manifest; from now on the artifact is complete.

        Args:
            counts: See `Manifest`.
            arrays: See `Manifest`; digests of shards are added from what their writers recorded.
            files: Paths in the artifact, or a mapping of them to bytes and CRC-32, where these are
                known: those files are not read again.
            measured: See `Manifest`.
            content: See `Manifest`.
            confirm: Called last before the manifest is written; see `lock.only_maker`.
        """
        begun = self._begun()
        about: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "recipe": begun["recipe"],
            "made_from": begun["made_from"],
            "counts": dict(counts or {}),
            "arrays": with_digests(self.path, arrays or {}),
            "files": dict(files)
            if isinstance(files, Mapping)
            else {name: describe_file(self.path / name) for name in files},
        }
        about = _as_json(about if content is None else about | {"content": content})
        about["fingerprint"] = _content_fingerprint(about)
        about |= {
            "measured": _as_json(dict(measured or {})),
            "software": software_versions(),
            "created": time.time(),
            "run": begun.get("run"),
        }
        confirm()
        write_checked_json(self.path / MANIFEST, about)
        forget_written(self.path)
        (self.path / BUILDING).unlink(missing_ok=True)
        return Manifest(**about)

    def remove(self) -> None:
        """Removes the artifact; a kill leaves nothing that looks like one.

        Raises:
            ArtifactError: It holds what is not ours.
        """
        replacement.remove(self)
