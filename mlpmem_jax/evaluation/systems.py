"""Systems that are compared: mixtures of parts whose weights are chosen on validation.

A part is anything that gives each label a probability: a decoder, the kNN distribution, a
memory. A system is a base and the parts mixed into it.

Suffixes: N rows of a split, D documents, M parts of a system.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from mlpmem_jax.evaluation.metrics import DocumentCounts
from mlpmem_jax.stats.mixing import mixture_of, solve_weights


@dataclasses.dataclass(frozen=True)
class System:
    """One system.

    Attributes:
        key: For files.
        label: For people.
        parts: Names of its parts, the base first; one part alone has no weights.
    """

    key: str
    label: str
    parts: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class SplitParts:
    """What each part gives the labels of a split.

    Attributes:
        counts: Documents and scored rows.
        logprob: By name of the part, log p(label) [N]; -inf where it has none.
        others: Of parts that were scored on other tokens of the same documents, their rows.
    """

    counts: DocumentCounts
    logprob: Mapping[str, np.ndarray]
    others: Mapping[str, DocumentCounts] = dataclasses.field(default_factory=dict)

    def counts_of(self, system: System) -> DocumentCounts:
        """Returns documents and scored rows of a system, all of whose parts share their tokens."""
        return self.others.get(system.parts[0], self.counts)

    def scored(self, system: System) -> np.ndarray:
        """Returns the log-probabilities of a system's parts, of scored rows: [M, N]."""
        scored_N = self.counts_of(system).scored_N
        return np.stack([self.logprob[name][scored_N] for name in system.parts])

    def tuned_weights(self, system: System) -> np.ndarray:
        """Returns the weights [M] that minimise a system's nats on this split."""
        return solve_weights(self.scored(system))

    def nats_by_document(self, system: System, weight_M: np.ndarray) -> np.ndarray:
        """Returns negative log-probabilities of a system summed by document, float64 [D]."""
        counts = self.counts_of(system)
        nats_N = np.zeros(len(counts.document_N))
        nats_N[counts.scored_N] = -mixture_of(self.scored(system), weight_M)
        return counts.sum_by_document(nats_N)


@dataclasses.dataclass(frozen=True)
class SeedScores:
    """One seed: the same parts on validation and on test."""

    valid: SplitParts
    test: SplitParts

    def of(self, split: str) -> SplitParts:
        """Returns the parts of a split."""
        return self.valid if split == "valid" else self.test
