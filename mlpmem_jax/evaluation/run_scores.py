"""What a run's decoder, kNN-LM and memory give the labels of validation and test.

Suffixes: N rows of a split.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax

from mlpmem_jax.config.schema import Config
from mlpmem_jax.evaluation.evaluate_table import SplitScores, compare
from mlpmem_jax.evaluation.labels import StoredSplit
from mlpmem_jax.evaluation.memory_scores import remember
from mlpmem_jax.models.decoder import Decoder
from mlpmem_jax.models.memory import Memory
from mlpmem_jax.retrieval.knn_lm import StoredKnn, read_labels
from mlpmem_jax.retrieval.temperature import Tuned
from mlpmem_jax.store.array_specs import Split
from mlpmem_jax.store.layout import Layout

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

    def table(self, config: Config) -> dict[str, Any]:
        """Returns what `compare` returns."""
        return compare(
            self.splits["valid"],
            self.splits["test"],
            temperature=self.tuned.temperature,
            temperature_at_bound=self.tuned.at_bound,
            bootstrap_samples=config.evaluate.bootstrap_samples,
            confidence=config.evaluate.confidence,
            seed=config.seed,
        )


def score_run(
    config: Config, decoder: Decoder, memory: Memory, mesh: jax.sharding.Mesh
) -> RunScores:
    """Scores the three systems, the kNN-LM with exact neighbours.

    Raises:
        ArtifactError: Something is missing, damaged, or speaks of other tokens.
    """
    layout = Layout(config)
    stored = {split: StoredSplit.open(layout, split) for split in EVALUATED}
    train_label = read_labels(layout.datastore("train"))
    neighbors = {
        split: StoredKnn(layout.neighbors(split), one.label_N, train_label)
        for split, one in stored.items()
    }
    valid, most = stored["valid"], config.evaluate.knn_valid_rows
    tuned = neighbors["valid"].tune(valid.counts.scored_N, valid.logprob_N, most, config.seed)
    remembered = {split: remember(config, split, decoder, memory, mesh) for split in EVALUATED}
    scores = {
        split: SplitScores(
            one.counts,
            decoder_N=one.logprob_N,
            knn_N=neighbors[split].logprob(one.counts.scored_N, tuned.temperature),
            memory_N=remembered[split].logprob_N,
            beside_memory_N=remembered[split].decoder_N,
            memory_weight=remembered[split].weight,
        )
        for split, one in stored.items()
    }
    return RunScores(scores, tuned, remembered["valid"].diagnostics)
