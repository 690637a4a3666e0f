"""What a run's decoder, kNN-LM and memory give the labels of validation and test.

Suffixes: N rows of a split.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from mlpmem_jax.config.stages import EvaluateConfig
from mlpmem_jax.evaluation.evaluate_table import SplitScores, compare
from mlpmem_jax.evaluation.labels import StoredSplit
from mlpmem_jax.evaluation.memory_lm import Remembered
from mlpmem_jax.evaluation.metrics import DocumentCounts
from mlpmem_jax.retrieval.knn_lm import KnnLm
from mlpmem_jax.retrieval.temperature import Tuned
from mlpmem_jax.stats.bootstrap import Number, PairedSums, bootstrap_sums
from mlpmem_jax.store.array_specs import Split

EVALUATED: tuple[Split, ...] = ("valid", "test")


@dataclasses.dataclass(frozen=True)
class RunScores:
    """Scores of both splits.

    Attributes:
        splits: What each part gives the labels.
        tuned: τ of the kNN-LM, as chosen on validation.
        against_targets: The memory against the kNN targets of validation, where they were read.
    """

    splits: Mapping[Split, SplitScores]
    tuned: Tuned
    against_targets: Mapping[str, float]

    def table(self, settings: EvaluateConfig, seed: int) -> dict[str, Any]:
        """Returns what `compare` returns."""
        return compare(
            self.splits["valid"],
            self.splits["test"],
            temperature=self.tuned.temperature,
            temperature_at_bound=self.tuned.at_bound,
            bootstrap_samples=settings.bootstrap_samples,
            confidence=settings.confidence,
            seed=seed,
        )

    def diagnostics(self) -> dict[str, Any]:
        """Returns numbers that explain the table, none of which is chosen by."""
        report: dict[str, Any] = {"valid_memory_against_targets": dict(self.against_targets)}
        for split, one in self.splits.items():
            scored_N = one.counts.scored_N
            knn, beside_N = one.knn_N[scored_N], one.beside_N
            report[split] = {
                "memory_alone_nats": float(-one.memory_N[scored_N].mean(dtype=np.float64)),
                "decoder_beside_memory_nats": float(-beside_N[scored_N].mean(dtype=np.float64)),
                "label_among_neighbors": float(np.isfinite(knn).mean()),
                "memory_better_than_decoder": float(
                    (one.memory_N[scored_N] > beside_N[scored_N]).mean()
                ),
            }
        return report


def difference_of_rows(
    counts: DocumentCounts,
    row_Q: np.ndarray,
    nats_Q: np.ndarray,
    settings: EvaluateConfig,
    seed: int,
) -> Number:
    """Returns the mean of a difference over some rows, with an interval over their files.

    Args:
        counts: Documents of the split.
        row_Q: Scored rows.
        nats_Q: The difference of each.
    """
    cluster_Q = counts.cluster_D[counts.document_N[row_Q]]
    of_clusters = np.unique(cluster_Q, return_inverse=True)[1]
    sums_CM = np.stack([np.bincount(of_clusters, nats_Q), np.bincount(of_clusters)], axis=1)
    drawn = bootstrap_sums(sums_CM, settings.bootstrap_samples, seed)
    sums = PairedSums(sums_CM.sum(axis=0), drawn, settings.confidence, len(sums_CM) > 1)
    return sums.number(lambda sums_M: sums_M[..., 0] / sums_M[..., 1])


def score_run(
    stored: Mapping[Split, StoredSplit],
    neighbors: Mapping[Split, KnnLm],
    remembered: Mapping[Split, Remembered],
    most_rows: int | None,
    seed: int,
) -> RunScores:
    """Puts the three systems together: τ of the kNN-LM is chosen on validation.

    Args:
        stored: Labels, and what the decoder gives them.
        remembered: What the memory gives the labels.
        most_rows: Rows of validation that τ is chosen on; None: all.
    """
    valid = stored["valid"]
    tuned = neighbors["valid"].tune(valid.counts.scored_N, valid.logprob_N, most_rows, seed)
    scores = {
        split: SplitScores(
            one.counts,
            decoder_N=one.logprob_N,
            knn_N=neighbors[split].logprob(one.counts.scored_N, tuned.temperature),
            memory_N=remembered[split].logprob_N,
            joint_decoder_N=remembered[split].decoder_N,
            memory_weight=remembered[split].weight,
        )
        for split, one in stored.items()
    }
    return RunScores(scores, tuned, remembered["valid"].diagnostics)
