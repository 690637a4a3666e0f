"""The table of one run: decoder, + kNN-LM and + memory, three rows and one seed.

Suffixes: N rows of a split, D documents.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlpmem_jax.evaluation.draws import DrawnSums, Settings
from mlpmem_jax.evaluation.lines import NOTHING, interval_columns
from mlpmem_jax.evaluation.metrics import (
    QUALITY,
    DocumentCounts,
    choice_notes,
    document_notes,
    finite,
)
from mlpmem_jax.evaluation.statistics import Table
from mlpmem_jax.evaluation.systems import SeedScores, SplitParts, System
from mlpmem_jax.retrieval.temperature import temperature_notes, weight_notes
from mlpmem_jax.stats.mixing import mixture_logprob

# The order of the table; the decoder is what the others are compared with.
SYSTEMS = {"decoder": "decoder", "knn": "+ kNN-LM", "memory": "+ memory"}
# A row of its own where decoder and memory were trained together.
JOINT_DECODER = "joint_decoder"
_MIXING = ("knn", "memory")
_CURVE = np.linspace(0.0, 1.0, 51)
_MOST_DOCUMENTS_DRAWN = 2000


@dataclasses.dataclass(frozen=True)
class SplitScores:
    """What each network gives the labels of a split.

    Attributes:
        counts: Documents and scored rows.
        decoder_N: log p_LM(label).
        knn_N: log p_kNN(label) over all K neighbours; -inf where none holds the label.
        memory_N: log p_MEM(label).
        joint_decoder_N: log p_LM(label) of the decoder that was trained with the memory;
            None: it is the decoder.
        memory_weight: λ that the memory was trained with, of each row where it has a gate;
            None: λ is chosen on validation.
    """

    counts: DocumentCounts
    decoder_N: np.ndarray
    knn_N: np.ndarray
    memory_N: np.ndarray
    joint_decoder_N: np.ndarray | None = None
    memory_weight: np.ndarray | float | None = None

    @property
    def beside_N(self) -> np.ndarray:
        """Log p_LM(label) of the decoder that the memory is mixed with."""
        return self.decoder_N if self.joint_decoder_N is None else self.joint_decoder_N

    @property
    def systems(self) -> dict[str, System]:
        """The rows of the table, by key."""
        parts = {"decoder": ("decoder",), "knn": ("decoder", "knn")}
        labels = dict(SYSTEMS)
        if self.joint_decoder_N is not None:
            parts[JOINT_DECODER], labels[JOINT_DECODER] = ("beside",), "decoder, trained jointly"
        parts["memory"] = ("mixture",) if self.memory_weight is not None else ("beside", "memory")
        return {key: System(key, labels[key], names) for key, names in parts.items()}

    @functools.cached_property
    def parts(self) -> SplitParts:
        """What the systems are mixed from."""
        logprob = {
            "decoder": self.decoder_N,
            "knn": self.knn_N,
            "beside": self.beside_N,
            "memory": self.memory_N,
        }
        if self.memory_weight is not None:
            logprob["mixture"] = mixture_logprob(self.memory_N, self.beside_N, self.memory_weight)
        return SplitParts(self.counts, logprob)

    def weight(self, key: str, weight_M: np.ndarray) -> float | None:
        """Returns λ of a system (the mean over tokens of its own λ); None: it has none."""
        if key == "memory" and self.memory_weight is not None:
            scored_N = self.counts.scored_N
            weight_N = np.broadcast_to(self.memory_weight, scored_N.shape)
            return float(np.mean(weight_N[scored_N], dtype=np.float64))
        return float(weight_M[1]) if key in _MIXING else None


def compare(
    valid: SplitScores,
    test: SplitScores,
    *,
    temperature: float,
    temperature_at_bound: str | None = None,
    bootstrap_samples: int,
    confidence: float,
    seed: int,
) -> dict[str, Any]:
    """Chooses λ on validation and reports on test.

    Args:
        valid: Validation split, for the choices.
        test: Test split, for the report.
        temperature: τ of the kNN distribution, as chosen on validation.
        temperature_at_bound: Which end of its range it reached; None: neither.
        bootstrap_samples: Draws of clusters, of validation for λ and of test.

    Returns:
        What `evaluate.json` holds of scores: systems, curves, documents, notes.
    """
    settings = Settings(bootstrap_samples, confidence, seed, "decoder", "knn")
    scores = {seed: SeedScores(valid.parts, test.parts)}
    table = Table(list(valid.systems.values()), scores, settings, bounds_valid=False)
    weight_M = table.choices.weights[seed]
    systems: dict[str, dict[str, Any]] = {}
    for key, system in valid.systems.items():
        found = table.numbers(key, [seed])
        systems[key] = {
            "label": system.label,
            "test_nats": found["test_nats"]["value"],
            "valid_nats": found["valid_nats"]["value"],
            **{name: found[name] for name in QUALITY},
            "interpolation": valid.weight(key, weight_M[key]),
            "interpolation_source": _weight_source(valid, key),
            "temperature": temperature if key == "knn" else None,
            **interval_columns("difference_nats", found.get("difference", NOTHING), "difference"),
            **interval_columns("gain_recovered", found.get("gain_recovered", NOTHING)),
        }
    notes = document_notes(test.counts, valid.counts)
    notes += temperature_notes(temperature, temperature_at_bound)
    for key in _MIXING:
        if systems[key]["interpolation_source"] == "validation":
            notes += weight_notes(systems[key]["interpolation"], key)
    notes += choice_notes(valid.counts) + _share_notes(table.test, systems["memory"])
    return {
        "valid": valid.counts.summary,
        "test": test.counts.summary,
        "confidence": confidence,
        "bootstrap_samples": bootstrap_samples,
        "seed": seed,
        "systems": systems,
        "curves": _curves(valid),
        "documents": _documents(test.counts, table.choices.nats["test"][seed]),
        "notes": notes,
    }


def rows_of(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the systems of `evaluate.json` in the shape of the rows of `statistics.Table`."""

    def bounded(system: Mapping[str, Any], name: str, ends: str) -> dict[str, Any]:
        low, high = (system[f"{ends}_{end}"] for end in ("low", "high"))
        return {"value": system[name], "low": low, "high": high}

    return [
        {
            **system,
            "key": key,
            "test_nats": {"value": system["test_nats"]},
            "difference": None
            if key == "decoder"
            else bounded(system, "difference_nats", "difference"),
            "gain_recovered": bounded(system, "gain_recovered", "gain_recovered"),
            "by_seed": {},
        }
        for key, system in results["systems"].items()
    ]


def _weight_source(scores: SplitScores, key: str) -> str | None:
    """Returns where λ comes from."""
    if key not in _MIXING:
        return None
    if key == "knn" or scores.memory_weight is None:
        return "validation"
    return "gate" if isinstance(scores.memory_weight, np.ndarray) else "training"


def _share_notes(sums: DrawnSums, memory: Mapping[str, Any]) -> list[str]:
    """Says where the share of the kNN-LM's gain is undefined, if anywhere."""
    if memory["gain_recovered"] is None:
        return ["the kNN-LM gains nothing on test: a share of its gain is not defined"]
    without = sums.draws_without_gain("decoder", "knn")
    if not without:
        return []
    gains_nothing = (
        f"the kNN-LM gains nothing in {without:,} of {sums.settings.bootstrap_samples:,} bootstrap "
        "draws, where the share recovered is undefined"
    )
    if memory["gain_recovered_low"] is not None:
        return [f"{gains_nothing}: its interval counts them at both ends"]
    return [f"{gains_nothing}: it has no interval"]


def _curves(valid: SplitScores) -> dict[str, list[float | None]]:
    """Returns validation nats per token of both systems while λ goes from 0 to 1.

    None where they are infinite: at λ = 1 a label may have no probability left.
    """
    scored_N = valid.counts.scored_N
    curves: dict[str, list[float | None]] = {"interpolation": _CURVE.tolist()}
    for key, added_N, base_N in (
        ("knn", valid.knn_N, valid.decoder_N),
        ("memory", valid.memory_N, valid.beside_N),
    ):
        added, base = added_N[scored_N], base_N[scored_N]
        nats = [float(-mixture_logprob(added, base, weight).mean()) for weight in _CURVE]
        curves[key] = [finite(value) for value in nats]
    return curves


def _documents(
    counts: DocumentCounts, nats: Mapping[str, np.ndarray]
) -> dict[str, list[float | None]]:
    """Returns tokens and nats of test documents, evenly chosen where there are very many."""
    with_tokens = np.flatnonzero(counts.tokens_D)
    if len(with_tokens) > _MOST_DOCUMENTS_DRAWN:
        places = np.linspace(0, len(with_tokens) - 1, _MOST_DOCUMENTS_DRAWN).astype(int)
        with_tokens = with_tokens[places]
    found = {"tokens": counts.tokens_D.astype(np.int64)} | dict(nats)
    return {
        name: [finite(value) for value in each[with_tokens].tolist()]
        for name, each in found.items()
    }
