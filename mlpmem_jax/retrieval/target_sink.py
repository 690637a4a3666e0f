"""Distributions of rows, cut and written as targets, whoever teaches."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from mlpmem_jax.config.data import DatastoreConfig, TargetsConfig
from mlpmem_jax.console import say
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.parallel.agreement import of_all
from mlpmem_jax.parallel.sharing import share_of
from mlpmem_jax.retrieval.distributions import SparseDistributions, with_mass, without_targets
from mlpmem_jax.retrieval.queries import train_documents
from mlpmem_jax.retrieval.shares import Share
from mlpmem_jax.store.array_specs import Split, targets_arrays
from mlpmem_jax.store.arrays import open_array, read_rows
from mlpmem_jax.store.manifest import Artifact, Completion
from mlpmem_jax.store.shards import ShardWriter

# Why a row has no target, by the teacher.
_REASONS = {
    "knn": (
        "has a neighbour at a finite distance",
        "neighbour",
        "are the keys too large for float32?",
    ),
    "ngram": (
        "has a context that occurs often enough elsewhere",
        "such context",
        "is targets.ngram_min_count too large?",
    ),
    "arrow": ("has a distribution in the files", "distribution in the files", "which are they?"),
}


def share_of_rows(
    config: TargetsConfig, tokens: Artifact, label_N: np.ndarray, seed: int
) -> Share | None:
    """Returns which training rows have targets; None: all.

    Args:
        label_N: Labels of the training rows.

    Raises:
        ConfigError: It leaves no scored row.
    """
    if config.share == 1:
        return None
    by_document = config.share_by == "document"
    share = Share(config.share, seed, train_documents(tokens) if by_document else None)
    share.check(label_N != int(tokens.load().counts["separator_id"]))
    return share


class TargetSink:
    """Writes the targets of a split.

    Attributes:
        writer: Where they go.
        num_tokens: S.
    """

    def __init__(
        self,
        artifact: Artifact,
        split: Split,
        tokens: Artifact,
        config: TargetsConfig,
        chunking: DatastoreConfig,
        label_N: np.ndarray,
        share: Share | None = None,
    ):
        """Opens the arrays.

        Args:
            artifact: Where they go.
            split: Whose rows they are about.
            chunking: How arrays are cut: as those of the datastore.
            label_N: Labels of the rows.
            share: Rows that have targets; None: all.
        """
        counts = tokens.load().counts
        self._artifact, self._split, self._config = artifact, split, config
        self._label_N, self._share = label_N, share
        self._separator_id = int(counts["separator_id"])
        self.num_tokens = config.num_tokens
        self._specs = targets_arrays(chunking, config, int(counts["vocab_size"]))
        self.writer = ShardWriter(artifact.path, self._specs, len(label_N))

    def arrays(self, row_Q: np.ndarray, made: SparseDistributions) -> Mapping[str, np.ndarray]:
        """Returns the arrays of rows (int64); those that are never scored have no target."""
        label_Q = self._label_N[row_Q]
        is_wanted_Q = label_Q != self._separator_id
        if self._share is not None:
            is_wanted_Q &= self._share.holds(row_Q)
        if self._config.min_mass is not None:
            made = with_mass(made, self._config.min_mass)
        made = without_targets(made, is_wanted_Q)
        return {"id": made.id_QS, "prob": made.prob_QS, "mass": made.mass_Q, "label": label_Q}

    def finish(self, measured: Mapping[str, Any], counts: Mapping[str, Any]) -> Completion:
        """Returns what the manifest says; targets are counted in what was written.

        Args:
            measured: What was measured.
            counts: What else the targets are, for example their temperature.

        Raises:
            ArtifactError: No scored row has a target: there is nothing to train on.
        """
        arrays = self.writer.describe()
        is_scored_N = self._label_N != self._separator_id
        wanted = int(is_scored_N.sum())
        if self._share is not None:
            wanted = self._share.held(is_scored_N)
        with_target = self._counted("mass")
        what, reason, question = _REASONS[self._config.teacher]
        if wanted and not with_target:
            raise ArtifactError(
                f"{self._artifact.path}: none of {wanted:,} rows {what}, so there is no target; "
                f"{question}"
            )
        if with_target < wanted:
            say(
                f"warning: {wanted - with_target:,} of {wanted:,} rows of {self._split} have no "
                f"{reason} and so no target; the memory learns their labels alone"
            )
        found = {"rows": len(self._label_N), "rows_with_target": with_target}
        return Completion(
            {**found, **counts}, arrays, measured={**measured, **self._sizes(with_target)}
        )

    def _sizes(self, with_target: int) -> dict[str, float]:
        """Returns the mean number of tokens of a target and their bytes, where they are cut."""
        if self._config.min_mass is None:
            return {}
        tokens = self._counted("prob") / max(1, with_target)
        width = sum(np.dtype(self._specs[name].dtype).itemsize for name in ("id", "prob"))
        return {
            "tokens_per_target": round(tokens, 3),
            "bytes_per_target": round(tokens * width, 3),
            "stored_bytes_per_target": self.num_tokens * width,
        }

    def _counted(self, name: str) -> int:
        """Returns how many values of an array are above 0, over all processes."""
        store = open_array(self._artifact.path / name)
        own = map(self.writer.rows_of, share_of(range(self.writer.num_shards)))
        counted = (np.count_nonzero(read_rows(store, part.start, part.stop) > 0) for part in own)
        return sum(of_all(sum(map(int, counted))))
