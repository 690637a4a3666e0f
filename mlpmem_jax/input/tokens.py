"""Windows of tokens with the kNN targets of their rows, for training that runs the decoder."""

import numpy as np

from mlpmem_jax.corpus.recent import read_recent
from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.corpus.windows import TokenWindows
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.input.rows import TargetReader, compare_labels
from mlpmem_jax.store.manifest import Artifact


class TokensWithTargets:
    """Windows of (token, label, target).

    Rows are positions of the corpus, so these windows need not be the embedding windows:
    targets are looked up by row. Batches hold token_BL and label_BL int32, weight_BL float32 (0
    where the label is the separator or padding), lm_weight_BL float32 (0 on padding only: the
    decoder learns separators too), target_id_BLS int32, target_prob_BLS float32, target_mass_BL
    float32 and, where they are asked for, recent_BLM and segment_BL int32.
    """

    def __init__(
        self,
        tokens: TokenSplit,
        targets: Artifact,
        length: int,
        num_recent: int = 0,
        *,
        segments: bool = False,
    ):
        self._tokens = tokens
        self._length = length
        self._windows = TokenWindows(tokens, length, segments=segments)
        self._separator_id = tokens.separator_id
        self._num_recent = num_recent
        self._targets = TargetReader(targets)
        self._names = f"{tokens.artifact.path}/{tokens.split} and {targets.path}"
        if tokens.num_rows != self._targets.num_rows:
            raise ArtifactError(
                f"{self._names}: {tokens.num_rows} and {self._targets.num_rows} rows: "
                "the targets were made from different tokens"
            )

    @property
    def num_windows(self) -> int:
        """Windows that cover every row."""
        return self._windows.num_windows

    def read(self, windows: np.ndarray) -> dict[str, np.ndarray]:
        """Reads windows (int64 [B]) with the targets of their rows."""
        starts = self._windows.starts(windows)
        pending = self._targets.start(starts, self._length)
        batch = self._windows.read(windows)
        targets = pending.result()
        # Padding behind a short split has no targets to compare with.
        exists = starts[:, None] + np.arange(self._length) < self._targets.num_rows
        label = np.where(exists, batch["label"], 0)
        compare_labels(label, targets["target_label"], starts, self._names)
        lm_weight = batch["weight"]
        scored = {
            "weight": np.where(batch["label"] == self._separator_id, np.float32(0), lm_weight),
            "lm_weight": lm_weight,
        }
        recent = {}
        if self._num_recent:
            recent["recent"] = read_recent(self._tokens, starts, self._length, self._num_recent)
        return batch | scored | recent | TargetReader.prepared(targets)
