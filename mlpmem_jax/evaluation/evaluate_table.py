"""Decoder, + kNN-LM and + memory compared: choices on validation, numbers on test.

Suffixes: N rows of a split, D documents, C clusters, R draws, M systems (the decoder and the kNN-LM
first) and then tokens.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlpmem_jax.evaluation.metrics import DocumentCounts, document_notes, score
from mlpmem_jax.retrieval.temperature import temperature_notes, weight_notes
from mlpmem_jax.stats.bootstrap import Draws, Number, PairedSums
from mlpmem_jax.stats.mixing import mixture_logprob, solve
from mlpmem_jax.stats.nested import choose, sum_nats

# The order of the table; the decoder is what the others are compared with.
SYSTEMS = {"decoder": "decoder", "knn": "+ kNN-LM", "memory": "+ memory"}
# A row of its own where decoder and memory were trained together.
JOINT_DECODER = "joint_decoder"
_CURVE = np.linspace(0.0, 1.0, 51)
_MOST_DOCUMENTS_DRAWN = 2000


@dataclasses.dataclass(frozen=True)
class SplitScores:
    """What each part gives the labels of a split.

    Attributes:
        counts: Documents and scored rows.
        decoder_N: log p_LM(label).
        knn_N: log p_kNN(label) over all K neighbours; -inf where none holds the label.
        memory_N: log p_MEM(label).
        beside_memory_N: log p_LM(label) of the decoder that was trained with the memory;
            None: it is the decoder.
        memory_weight: λ that the memory was trained with, of each row where it has a gate;
            None: λ is chosen on validation.
    """

    counts: DocumentCounts
    decoder_N: np.ndarray
    knn_N: np.ndarray
    memory_N: np.ndarray
    beside_memory_N: np.ndarray | None = None
    memory_weight: np.ndarray | float | None = None

    @property
    def systems(self) -> dict[str, str]:
        """Names and labels of the systems, in the order of the table."""
        if self.beside_memory_N is None:
            return SYSTEMS
        joint = {JOINT_DECODER: "decoder, trained jointly"}
        return {"decoder": SYSTEMS["decoder"], "knn": SYSTEMS["knn"]} | joint | SYSTEMS

    def alone(self, system: str) -> np.ndarray | None:
        """Returns log p(label) [N] of a system that mixes nothing; None: it mixes."""
        return {"decoder": self.decoder_N, JOINT_DECODER: self.beside_memory_N}.get(system)

    def parts(self, system: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the log-probabilities that a system mixes: what λ weighs, and the decoder's."""
        if system == "knn":
            return self.knn_N, self.decoder_N
        beside = self.decoder_N if self.beside_memory_N is None else self.beside_memory_N
        return self.memory_N, beside

    def trained_weight(self, system: str) -> np.ndarray | float | None:
        """Returns λ where a system brings its own."""
        return self.memory_weight if system == "memory" else None

    def nats_by_document(self, system: str, weight: float) -> np.ndarray:
        """Returns negative log-probabilities of a system summed by document, float64 [D].

        Args:
            system: Which.
            weight: λ, unless the system brings its own.
        """
        alone_N = self.alone(system)
        if alone_N is not None:
            return -self.counts.sum_by_document(alone_N)
        own = self.trained_weight(system)
        mixture_N = mixture_logprob(*self.parts(system), weight if own is None else own)
        return -self.counts.sum_by_document(mixture_N)

    def scored_parts(self, system: str) -> np.ndarray:
        """Returns the log-probabilities that a system mixes, of scored rows: [M, N], base first."""
        alone_N = self.alone(system)
        parts = self.parts(system)[::-1] if alone_N is None else (alone_N,)
        return np.stack(parts)[:, self.counts.scored_N]


def chosen_weight(scores: SplitScores, system: str) -> float:
    """Returns the λ that minimises a system's nats on a split, or the mean of its own."""
    scored_N = scores.counts.scored_N
    own = scores.trained_weight(system)
    if own is not None:
        return float(np.mean(np.broadcast_to(own, scored_N.shape)[scored_N], dtype=np.float64))
    added, base = scores.parts(system)
    return solve(added[scored_N], base[scored_N]).weight


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
        confidence: Level of the intervals.
        seed: Seed of the draws.

    Returns:
        What `evaluate.json` holds of scores: systems, curves, documents, notes.
    """
    mixing = ("knn", "memory")
    weights = {s: chosen_weight(valid, s) if s in mixing else 0.0 for s in valid.systems}
    valid_D = {s: valid.nats_by_document(s, w) for s, w in weights.items()}
    test_D = {s: test.nats_by_document(s, w) for s, w in weights.items()}
    values_DM = np.stack([*test_D.values(), test.counts.tokens_D], axis=1)
    num_clusters = test.counts.num_clusters
    tokens_C = test.counts.tokens_C
    drawn = [
        *(drawn_nats(valid, test, s, test_D[s], bootstrap_samples, seed) for s in weights),
        Draws(len(tokens_C), bootstrap_samples, seed).sums(tokens_C[:, None])[:, 0],
    ]
    total_M, drawn_RM = values_DM.sum(axis=0), np.stack(drawn, axis=1)
    sums = PairedSums(total_M, drawn_RM, confidence, has_interval=num_clusters > 1)
    notes = document_notes(test.counts, valid.counts)
    notes += temperature_notes(temperature, temperature_at_bound)
    for name in mixing:
        if valid.trained_weight(name) is None:
            notes += weight_notes(weights[name], name)
    if valid.counts.num_clusters > 1:
        notes.append("intervals include the choice of λ on validation; τ is held fixed")
    systems: dict[str, dict[str, Any]] = {}
    for place, (name, label) in enumerate(valid.systems.items()):
        metrics = score(test_D[name], test.counts)
        systems[name] = {
            "label": label,
            "test_nats": _finite(metrics.nats_per_token),
            "valid_nats": _finite(score(valid_D[name], valid.counts).nats_per_token),
            "token_perplexity": _finite(metrics.token_perplexity),
            "word_perplexity": _finite(metrics.word_perplexity),
            "bits_per_byte": _finite(metrics.bits_per_byte),
            "interpolation": weights[name] if name in mixing else None,
            "interpolation_source": _weight_source(valid, name),
            "temperature": temperature if name == "knn" else None,
        } | _against_decoder(sums, place)
    if systems["memory"]["gain_recovered"] is None:
        notes.append("the kNN-LM gains nothing on test: a share of its gain is not defined")
    elif num_clusters > 1:
        notes += _share_notes(drawn_RM, systems["memory"]["gain_recovered_low"] is not None)
    return {
        "valid": valid.counts.summary,
        "test": test.counts.summary,
        "confidence": confidence,
        "bootstrap_samples": bootstrap_samples,
        "seed": seed,
        "systems": systems,
        "curves": _curves(valid),
        "documents": _documents(test, test_D),
        "notes": notes,
    }


def _share_notes(drawn_RM: np.ndarray, has_interval: bool) -> list[str]:
    """Says in how many draws the share of the kNN-LM's gain is undefined, if in any."""
    # Not the opposite of a gain: a label without probability leaves no number.
    without = int(np.count_nonzero(~(drawn_RM[:, 0] - drawn_RM[:, 1] > 0)))
    if not without:
        return []
    gains_nothing = (
        f"the kNN-LM gains nothing in {without:,} of {len(drawn_RM):,} bootstrap draws, where the "
        "share recovered is undefined"
    )
    if has_interval:
        return [f"{gains_nothing}: its interval counts them at both ends"]
    return [f"{gains_nothing}: it has no interval"]


def drawn_nats(
    valid: SplitScores,
    test: SplitScores,
    system: str,
    test_D: np.ndarray,
    num_draws: int,
    seed: int,
) -> np.ndarray:
    """Returns the nats of a system over the drawn test clusters, float64 [R].

    Where λ is chosen on validation it is chosen anew in each draw, on drawn clusters.

    Args:
        valid: Validation split.
        test: Test split.
        system: Which.
        test_D: Its nats of test documents.
        num_draws: R.
        seed: Seed of the draws; the same seed draws the same clusters for all systems.
    """
    draws = Draws(test.counts.num_clusters, num_draws, seed)
    if valid.trained_weight(system) is not None:
        return draws.sums(test.counts.by_cluster(test_D)[:, None])[:, 0]
    valid_draws = Draws(valid.counts.num_clusters, num_draws, (seed, 1))
    weight_RM = choose(valid.scored_parts(system), valid.counts.scored_cluster_N, valid_draws)
    return sum_nats(test.scored_parts(system), test.counts.scored_cluster_N, weight_RM, draws)


def _weight_source(scores: SplitScores, system: str) -> str | None:
    """Returns where λ comes from."""
    if scores.alone(system) is not None:
        return None
    own = scores.trained_weight(system)
    if own is None:
        return "validation"
    return "gate" if isinstance(own, np.ndarray) else "training"


def _against_decoder(sums: PairedSums, place: int) -> dict[str, float | None]:
    """Returns difference to the decoder and share of the kNN-LM's gain, with intervals."""
    if place == 0:
        names = ("difference", "gain_recovered")
        bounds = [f"{name}_{end}" for name in names for end in ("low", "high")]
        return dict.fromkeys(("difference_nats", "gain_recovered", *bounds))

    def difference(sums: np.ndarray) -> np.ndarray:
        return (sums[..., place] - sums[..., 0]) / sums[..., -1]

    def share(sums: np.ndarray) -> np.ndarray:
        gain = sums[..., 0] - sums[..., 1]
        # Without a gain there is nothing to recover: undefined, not negative.
        return np.where(gain > 0, (sums[..., 0] - sums[..., place]) / gain, np.nan)

    # The kNN-LM's own share is 1 by definition.
    found = sums.number(difference), sums.number(share, bounded=place != 1)
    return _named("difference_nats", found[0]) | _named("gain_recovered", found[1])


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


def _named(name: str, found: Number) -> dict[str, float | None]:
    prefix = name.removesuffix("_nats")
    return {name: found["value"], f"{prefix}_low": found["low"], f"{prefix}_high": found["high"]}


def _curves(valid: SplitScores) -> dict[str, list[float | None]]:
    """Returns validation nats per token of both systems while λ goes from 0 to 1.

    None where they are infinite: at λ = 1 a label may have no probability left.
    """
    scored_N = valid.counts.scored_N
    curves: dict[str, list[float | None]] = {"interpolation": _CURVE.tolist()}
    for name in ("knn", "memory"):
        added, base = (part[scored_N] for part in valid.parts(name))
        nats = [float(-mixture_logprob(added, base, weight).mean()) for weight in _CURVE]
        curves[name] = [value if np.isfinite(value) else None for value in nats]
    return curves


def _documents(
    test: SplitScores, test_D: Mapping[str, np.ndarray]
) -> dict[str, list[float | None]]:
    """Returns tokens and nats of test documents, evenly chosen where there are very many."""
    with_tokens = np.flatnonzero(test.counts.tokens_D)
    if len(with_tokens) > _MOST_DOCUMENTS_DRAWN:
        places = np.linspace(0, len(with_tokens) - 1, _MOST_DOCUMENTS_DRAWN).astype(int)
        with_tokens = with_tokens[places]
    found = {"tokens": test.counts.tokens_D.astype(np.int64)} | dict(test_D)
    return {
        name: [_finite(value) for value in each[with_tokens].tolist()]
        for name, each in found.items()
    }
