"""What a row of a table cost to make, from the manifests of everything it was made from.

Networks are charged model flops by formula; what has none (building an index, searching)
its seconds times the measured peak of the machine. Text and tokenizer are not charged, nor
is what serves evaluation alone.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

from etils import epath

from mlpmem_jax.store.checked_json import fingerprint_of
from mlpmem_jax.store.manifest import Artifact, Manifest

_FREE = ("tokenizer", "tokens")
_NETWORKS = ("decoder", "memory", "joint")
# What the cost of an artifact is called, by its kind.
PURPOSES = {
    "decoder": "pretrain",
    "datastore": "embed",
    "index": "index",
    "neighbors": "search",
    "targets": "search",
    "memory": "train",
    "joint": "train",
}
# Everything that was made for a decoder that is not part of the row, to make its targets.
TEACHER = "teacher"


@dataclasses.dataclass(frozen=True)
class Cost:
    """Training cost of a row.

    Attributes:
        flops: By purpose; `networks` of them are model flops, the rest seconds × peak.
        network_flops: Model flops alone.
        seconds: Wall time, by purpose.
    """

    flops: dict[str, float]
    network_flops: float
    seconds: dict[str, float]

    @property
    def total_flops(self) -> float:
        """All of it."""
        return sum(self.flops.values())

    @property
    def total_seconds(self) -> float:
        """Wall time of all stages."""
        return sum(self.seconds.values())

    def as_json(self) -> dict[str, Any]:
        """Returns what files hold."""
        return {
            "flops": self.total_flops,
            "network_flops": self.network_flops,
            "flops_by_purpose": self.flops,
            "seconds": self.total_seconds,
            "seconds_by_purpose": self.seconds,
        }


def _kind(relative: str) -> str:
    return relative.split("/")[0]


class Ledger:
    """Reads the manifests of one store, each once."""

    def __init__(self, store: epath.Path, peak_flops: float):
        """Prepares.

        Args:
            store: Where the artifacts lie.
            peak_flops: Flop/s that a second of search counts.
        """
        self._store = store
        self._peak_flops = peak_flops
        self._manifests: dict[str, Manifest] = {}

    def _manifest(self, relative: str) -> Manifest:
        if relative not in self._manifests:
            artifact = Artifact(self._store, relative, relative.split("/")[0])
            self._manifests[relative] = artifact.load()
        return self._manifests[relative]

    def closure(self, relatives: Iterable[str]) -> dict[str, None]:
        """Returns artifacts and everything that they were made from, text excluded."""
        found: dict[str, None] = {}
        todo = list(relatives)
        while todo:
            relative = todo.pop()
            if relative in found or _kind(relative) in _FREE:
                continue
            found[relative] = None
            todo += self._used(relative)
        return found

    def steps(self, relatives: Iterable[str]) -> dict[str, int]:
        """Returns the steps of every network among artifacts and what they were made from."""
        return {
            relative: int(self._manifest(relative).counts["steps"])
            for relative in self.closure(relatives)
            if _kind(relative) in _NETWORKS
        }

    def _used(self, relative: str) -> list[str]:
        """Returns what an artifact was made from, less targets that its loss does not use."""
        manifest = self._manifest(relative)
        train = manifest.recipe.get("train", {})
        unused = train.get("alpha") == 0 or train.get("memory_weight") == 0
        return [name for name in manifest.made_from if not (unused and _kind(name) == "targets")]

    def _once(self, relatives: Iterable[str]) -> list[str]:
        """Leaves out embeddings that differ in what the memory reads alone.

        One pass of the decoder makes keys and inputs; that a table shares the keys of another
        row, and so makes two passes, is no cost of the method.
        """
        found: dict[str, str] = {}
        for relative in sorted(relatives):
            content = relative
            if _kind(relative) == "datastore":
                manifest = self._manifest(relative)
                stored = {
                    key: value
                    for key, value in manifest.recipe.get("datastore", {}).items()
                    if key != "input"
                }
                recipe = {**manifest.recipe, "datastore": stored}
                content = fingerprint_of([recipe, manifest.made_from])
            found.setdefault(content, relative)
        return list(found.values())

    def _purpose(self, relative: str, decoders: set[str]) -> str:
        kind = _kind(relative)
        closure = self.closure([relative])
        # What joint training makes anew from its own decoder half-way is no teacher's.
        if kind in ("memory", "joint") or any(_kind(name) == "joint" for name in closure):
            return PURPOSES[kind]
        made_by = {name for name in closure if _kind(name) == "decoder"}
        return PURPOSES[kind] if made_by <= decoders else TEACHER

    def cost(self, relatives: Iterable[str], decoders: Iterable[str]) -> Cost:
        """Returns the cost of artifacts and of all that they were made from.

        Args:
            relatives: The trained parts of a row, by path in the store.
            decoders: Those of them that are decoders of the row; others are teachers.

        Raises:
            ArtifactError: Something of it is missing.
        """
        flops: dict[str, float] = {}
        seconds: dict[str, float] = {}
        network_flops = 0.0
        for relative in self._once(self.closure(relatives)):
            measured = self._manifest(relative).measured
            purpose = self._purpose(relative, set(decoders))
            spent = float(measured["seconds"])
            model = measured.get("model_flops")
            network_flops += model or 0.0
            charged = spent * self._peak_flops if model is None else float(model)
            flops[purpose] = flops.get(purpose, 0.0) + charged
            seconds[purpose] = seconds.get(purpose, 0.0) + spent
        return Cost(flops, network_flops, seconds)
