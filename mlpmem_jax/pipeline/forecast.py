"""How long a list of artifacts will take, before it is begun.

Rates come from what this store already holds, artifacts of the same kind;
where there is none, from shares of the measured peak and from searches as measured on two
CPU cores. A forecast is an estimate and is called one.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from mlpmem_jax.pipeline.estimates import ROUTED_FLOPS
from mlpmem_jax.store.manifest import Artifact

# Share of the peak that small networks reach on CPU.
_SHARE_OF_PEAK = 0.2
# Rows a second, approximate engine.
_SEARCHED_ROWS = 4000.0
_INDEXED_ROWS = 20_000.0
# Share of the peak that exact search reaches.
_EXACT_SHARE = 0.3
# The same of a routed search, most of which is selection (benchmarks.routing: a tenth of the flop/s
# of exact search, or less).
_ROUTED_SHARE = 0.03
# To load libraries' code, compile and save, whatever the size.
_START_SECONDS = 4.0
_NETWORKS = ("decoder", "datastore", "memory", "joint")
_SEARCHES = ("index", "neighbors", "targets")


@dataclasses.dataclass(frozen=True)
class Forecast:
    """What is expected of artifacts that are not finished.

    Attributes:
        num_artifacts: How many there are in all.
        num_missing: How many of them are not finished.
        flops: Model flops of networks that are to run.
        seconds: Time, by kind of artifact.
        unknown: Kinds whose cost is not known before the tokens are.
    """

    num_artifacts: int
    num_missing: int
    flops: float
    seconds: Mapping[str, float]
    unknown: tuple[str, ...]

    @property
    def total_seconds(self) -> float:
        """Of all kinds together."""
        return sum(self.seconds.values())


@dataclasses.dataclass(frozen=True)
class Expected:
    """One artifact to come.

    Attributes:
        artifact: Where it will lie.
        estimate: What its stage says of it beforehand.
    """

    artifact: Artifact
    estimate: Mapping[str, Any]


class Forecaster:
    """Knows the machine, the size of the corpus, and what was measured so far."""

    def __init__(
        self,
        store: epath.Path,
        peak_flops: float,
        num_rows: Mapping[str, int] | None,
        width: int,
    ):
        """Prepares.

        Args:
            store: Where the artifacts lie.
            peak_flops: Flop/s.
            num_rows: Rows of each split; None before there are tokens.
            width: D, for exact search.
        """
        self._store = store
        self._peak = peak_flops
        self._num_rows = num_rows
        self._width = width

    def forecast(self, expected: Sequence[Expected], others: Iterable[str] = ()) -> Forecast:
        """Adds up what is missing.

        Args:
            expected: What is to be there in the end.
            others: Further artifacts, by path, whose rates tell something.
        """
        missing = [one for one in expected if not one.artifact.is_complete()]
        flops = 0.0
        seconds: dict[str, float] = {}
        unknown: dict[str, None] = {}
        for one, spent in zip(missing, self.seconds(expected, others), strict=True):
            kind = one.artifact.kind
            if kind not in (*_NETWORKS, *_SEARCHES):
                continue  # Scores and tables are seconds.
            if spent is None:
                unknown[kind] = None
                continue
            if kind in _NETWORKS:
                flops += float(one.estimate["model flops"])
            seconds[kind] = seconds.get(kind, 0.0) + spent
        return Forecast(len(expected), len(missing), flops, seconds, tuple(unknown))

    def seconds(
        self, expected: Sequence[Expected], others: Iterable[str] = ()
    ) -> list[float | None]:
        """Returns the time of each artifact that is missing; None: it is not known."""
        rates = self._rates({*others, *(one.artifact.relative for one in expected)})
        return [self._seconds(one, rates) for one in expected if not one.artifact.is_complete()]

    def _seconds(self, one: Expected, rates: Mapping[str, float]) -> float | None:
        kind, needed = one.artifact.kind, one.estimate.get("model flops")
        if kind in _NETWORKS and needed is not None:
            return _START_SECONDS + float(needed) / rates.get(kind, _SHARE_OF_PEAK * self._peak)
        if {"updates", "compacted"} & set(one.artifact.recipe or {}):
            return None  # Little is searched, and how much is not known yet.
        if kind in _SEARCHES and self._num_rows is not None:
            if ROUTED_FLOPS in one.estimate:
                flops = float(one.estimate[ROUTED_FLOPS])
                return _START_SECONDS + flops / (_ROUTED_SHARE * self._peak)
            return _START_SECONDS + self._search_seconds(one.artifact, self._num_rows)
        return None

    def _search_seconds(self, artifact: Artifact, num_rows: Mapping[str, int]) -> float:
        train = num_rows["train"]
        if artifact.kind == "index":
            return train / _INDEXED_ROWS
        recipe = artifact.recipe or {}
        split = recipe["split"]
        if artifact.kind == "targets":
            share = float(recipe["targets"].get("share", 1.0))
            return share * train / _SEARCHED_ROWS if split == "train" else 1.0
        if recipe.get("by_index"):
            return num_rows[split] / _SEARCHED_ROWS
        queries = min(num_rows[split], int(recipe.get("exact_rows", num_rows[split])))
        return 2.0 * queries * train * self._width / (_EXACT_SHARE * self._peak)

    def _rates(self, relatives: Iterable[str]) -> dict[str, float]:
        """Returns flop/s of the finished artifacts of each kind of network."""
        flops: dict[str, float] = {}
        seconds: dict[str, float] = {}
        for relative in relatives:
            kind = relative.split("/")[0]
            artifact = Artifact(self._store, relative, kind)
            if kind not in _NETWORKS or not artifact.is_complete():
                continue
            manifest = artifact.load()
            measured = manifest.measured
            if not measured.get("model_flops"):
                continue  # An imported network cost none.
            # A step's time where there are steps: starting up costs the same for any number.
            steps = int(measured.get("steps", manifest.counts.get("steps", 0)))
            spent = measured.get("secs_per_step", 0.0) * steps or measured["seconds"]
            flops[kind] = flops.get(kind, 0.0) + float(measured["model_flops"])
            seconds[kind] = seconds.get(kind, 0.0) + float(spent)
        return {kind: flops[kind] / max(seconds[kind], 1e-9) for kind in flops}


def duration(seconds: float) -> str:
    """Returns a time in words: 40 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60:02d} min"
