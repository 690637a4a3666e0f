"""Rows of a datastore with their kNN targets, in windows."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from mlpmem_jax.corpus.recent import after_start, recent_tokens
from mlpmem_jax.corpus.windows import window_starts
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.store.array_specs import input_array
from mlpmem_jax.store.joined import stream_starts
from mlpmem_jax.store.manifest import Artifact
from mlpmem_jax.store.stored_array import PendingRead, StoredArray


class RowReader:
    """Reads the same ranges of rows of several arrays, all at once.

    Args:
        artifact: The artifact that holds the arrays.
        arrays: Name of a result to name of an array in the artifact.
    """

    def __init__(self, artifact: Artifact, arrays: Mapping[str, str]):
        self._stored = {name: StoredArray(artifact, array) for name, array in arrays.items()}
        self.num_rows = next(iter(self._stored.values())).num_rows

    def start(self, starts: np.ndarray, length: int) -> "PendingRows":
        """Begins to read rows [start, start + length) for each start (int64 [B])."""
        stops = np.minimum(starts + length, self.num_rows)
        return PendingRows(
            {
                name: (
                    stored,
                    [stored.start(int(a), int(b)) for a, b in zip(starts, stops, strict=True)],
                )
                for name, stored in self._stored.items()
            },
            length,
        )


class PendingRows:
    """Reads under way."""

    def __init__(self, reads: Mapping[str, tuple[StoredArray, list[PendingRead]]], length: int):
        self._reads = reads
        self._length = length

    def result(self) -> dict[str, np.ndarray]:
        """Waits; returns arrays [B, length, …], zero behind the last row.

        Raises:
            ArtifactError: A shard is missing or damaged.
        """
        return {name: self._stacked(*item) for name, item in self._reads.items()}

    def _stacked(self, stored: StoredArray, reads: list[PendingRead]) -> np.ndarray:
        shape = (len(reads), self._length, *stored.shape[1:])
        out = np.zeros(shape, stored.dtype)
        for place, read in zip(out, reads, strict=True):
            rows = read.result()
            place[: len(rows)] = rows
        return out


def compare_labels(stored: np.ndarray, targets: np.ndarray, starts: np.ndarray, names: str) -> None:
    """Refuses inputs and targets that do not speak of the same tokens.

    Args:
        stored: int [B, L] labels of one side.
        targets: int [B, L] labels of the other.
        starts: int64 [B] first row of each window.
        names: The two sides, for the message.

    Raises:
        ArtifactError: A label differs; the row is named.
    """
    differs = stored != targets
    if differs.any():
        window, place = (int(n) for n in np.argwhere(differs)[0])
        raise ArtifactError(
            f"{names}: labels differ at row {int(starts[window]) + place} "
            f"({int(stored[window, place])} and {int(targets[window, place])}): "
            "they were made from different tokens"
        )


class TargetReader:
    """Sparse kNN targets by row."""

    def __init__(self, artifact: Artifact):
        self.artifact = artifact
        arrays = {
            "target_id": "id",
            "target_prob": "prob",
            "target_mass": "mass",
            "target_label": "label",
        }
        self._reader = RowReader(self.artifact, arrays)
        self.num_rows = self._reader.num_rows

    def start(self, starts: np.ndarray, length: int) -> PendingRows:
        """Begins to read."""
        return self._reader.start(starts, length)

    @staticmethod
    def prepared(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Casts ids to int32 and probabilities to float32, as the loss reads them."""
        return {
            "target_id": rows["target_id"].astype(np.int32),
            "target_prob": rows["target_prob"].astype(np.float32),
            "target_mass": rows["target_mass"],
        }


class RecentReader:
    """Recent tokens by row: token n of the stream is the label of row n − 1."""

    def __init__(self, artifact: Artifact, num_recent: int, separator_id: int):
        """Opens the labels of a datastore split.

        Args:
            num_recent: M; 0: there is nothing to read.
        """
        self._labels = RowReader(artifact, {"label": "label"}) if num_recent else None
        # Where another stream begins, the label of the row before is not its first token.
        self._streams = np.asarray(stream_starts(artifact) if num_recent else (0,), np.int64)
        self._num_recent = num_recent
        self._separator_id = separator_id

    def start(self, starts: np.ndarray, length: int) -> "PendingRecent":
        """Begins to read the recent tokens of rows [start, start + length), int64 [B]."""
        first = np.asarray(starts, np.int64) - self._num_recent
        pending = None
        if self._labels is not None:
            pending = self._labels.start(np.maximum(first, 0), length + self._num_recent - 1)
        streams = self._streams
        return PendingRecent(pending, first, streams, self._num_recent, self._separator_id)


@dataclasses.dataclass(frozen=True)
class PendingRecent:
    """A read under way."""

    pending: PendingRows | None
    first: np.ndarray
    streams: np.ndarray
    num_recent: int
    separator_id: int

    def result(self) -> dict[str, np.ndarray]:
        """Waits; returns `recent`, int32 [B, L, M]; nothing where M is 0.

        Raises:
            ArtifactError: A shard is missing or damaged.
        """
        if self.pending is None:
            return {}
        token_BT = self.pending.result()["label"]
        # Before row 0 stands the separator of the first document.
        token_BT = after_start(token_BT, self.first, self.separator_id)
        row_BT = self.first[:, None] + 1 + np.arange(token_BT.shape[1])
        token_BT = np.where(np.isin(row_BT, self.streams), self.separator_id, token_BT)
        return {"recent": recent_tokens(token_BT, self.num_recent, self.separator_id)}


class StoredRows:
    """Windows of (input, label, target) of a datastore split.

    Batches hold input_BLD (storage dtype), label_BL int32, weight_BL float32 (0 where the label
    is the separator or padding), target_id_BLS int32, target_prob_BLS float32, target_mass_BL
    float32 and, where they are asked for, recent_BLM int32 and logprob_BL float32.

    Attributes:
        batch_size: Windows of a batch, where all rows are scored in order; else None.
        has_targets: Whether targets are read.
    """

    def __init__(
        self,
        datastore: Artifact,
        length: int,
        separator_id: int,
        num_recent: int = 0,
        *,
        targets: Artifact | None = None,
        batch_size: int | None = None,
        with_logprob: bool = False,
    ):
        """Opens the arrays.

        Args:
            length: Rows in a window, L.
            separator_id: Label that is not scored.
            num_recent: Recent tokens that the memory reads, M; 0: none.
            targets: The kNN targets of the same rows; None: they are not read.
            batch_size: None, for training: the last window shifts left, so that it is full. Else
                all rows come once and in order, in batches of this size; behind the last is zero.
            with_logprob: Whether to read the decoder's log-probabilities of the labels.

        Raises:
            ArtifactError: Rows and targets are of different tokens.
        """
        self._length = length
        self.batch_size = batch_size
        self.has_targets = targets is not None
        self._separator_id = separator_id
        self._datastore = datastore
        arrays = {"input": input_array(datastore.load().arrays), "label": "label"}
        if with_logprob:
            arrays["logprob"] = "logprob"
        self._rows = RowReader(datastore, arrays)
        self._recent = RecentReader(datastore, num_recent, separator_id)
        self.num_rows = self._rows.num_rows
        self._targets = None if targets is None else TargetReader(targets)
        if self._targets is not None and self.num_rows != self._targets.num_rows:
            raise ArtifactError(
                f"{datastore.path} has {self.num_rows} rows and "
                f"{self._targets.artifact.path} has {self._targets.num_rows}: "
                "they were made from different tokens"
            )

    @property
    def num_windows(self) -> int:
        """Windows that cover every row, in whole batches where there are any."""
        batch_size = self.batch_size or 1
        return -(-self.num_rows // (self._length * batch_size)) * batch_size

    def read(self, windows: np.ndarray) -> dict[str, np.ndarray]:
        """Reads windows (int64 [B]) of rows with their targets."""
        first = np.asarray(windows, np.int64) * self._length
        starts = np.minimum(first, self.num_rows)
        if self.batch_size is None:
            starts = window_starts(windows, self._length, self.num_rows)
        readers: list[RowReader | RecentReader | TargetReader] = [self._rows, self._recent]
        readers += [self._targets] if self._targets else []
        pending = [reader.start(starts, self._length) for reader in readers]
        rows, recent, *targets = (each.result() for each in pending)
        row = starts[:, None] + np.arange(self._length)
        # Rows that the last window, shifted left, shares with the one before count once.
        own = (row >= first[:, None]) & (row < self.num_rows)
        scored = own & (rows["label"] != self._separator_id)
        rows |= {"weight": scored.astype(np.float32), **recent}
        if self._targets is not None:
            names = f"{self._datastore.path} and {self._targets.artifact.path}"
            compare_labels(rows["label"], targets[0]["target_label"], starts, names)
            rows |= TargetReader.prepared(targets[0])
        return rows
