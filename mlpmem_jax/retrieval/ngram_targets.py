"""Targets of an n-gram teacher with contexts of any length (∞-gram, arXiv 2401.17377).

The target of a row is what follows the longest end of its context elsewhere in the training
split. Suffixes: T tokens, E occurrences, N intervals of contexts, Q rows, S tokens of a target.
"""

import numpy as np

from mlpmem_jax.config.data import DatastoreConfig, TargetsConfig
from mlpmem_jax.console import progress, say
from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.errors import ConfigError
from mlpmem_jax.parallel.preemption import (
    Preempted,
    preempted,
    stop_if_alone,
    stopping_where_asked,
)
from mlpmem_jax.parallel.sharing import most_shared, share_of
from mlpmem_jax.retrieval.contexts import Contexts
from mlpmem_jax.retrieval.distributions import SparseDistributions
from mlpmem_jax.retrieval.engine import row_ranges
from mlpmem_jax.retrieval.target_sink import TargetSink, share_of_rows
from mlpmem_jax.store.array_specs import Split
from mlpmem_jax.store.manifest import Artifact, Completion

_HALF = np.uint64(32)
_MOST_TOKENS = 2**31 - 1
_COUNTED_AT_ONCE = 1 << 22  # Occurrences.
_KEPT_SIZE = 1 << 12  # What follows so many occurrences is kept: other rows ask for it again.


def make_ngram_targets(
    artifact: Artifact,
    split: Split,
    tokens: Artifact,
    config: TargetsConfig,
    chunking: DatastoreConfig,
    seed: int,
) -> Completion:
    """Makes the targets of the rows of a split from the training tokens.

    Args:
        artifact: Where they go.
        split: Whose rows; a training row is no occurrence for itself.
        chunking: How arrays are cut: as those of the datastore.
        seed: Of the share of training rows that have targets.
    """
    rows = TokenSplit.open(tokens, split)
    label_N = rows.read(1, rows.num_tokens)
    share = share_of_rows(config, tokens, label_N, seed) if split == "train" else None
    sink = TargetSink(artifact, split, tokens, config, chunking, label_N, share)
    teacher = NgramTeacher(tokens, split, config) if sink.writer.own_rows() else None
    missing = sink.writer.missing_shards()
    done = sink.writer.num_rows - sink.writer.count_rows(missing)
    name = f"n-gram targets of {split}"
    mine = [sink.writer.rows_of(shard) for shard in share_of(missing)]
    with progress(sink.writer.num_rows, "row", name, initial=done) as bar, stopping_where_asked():
        try:
            for turn in range(most_shared(missing)):  # So often all processes ask whether to stop.
                for part in mine[turn : turn + 1]:
                    assert teacher is not None
                    row_N = np.arange(part.start, part.stop, dtype=np.int64)
                    is_wanted_N = np.ones(len(row_N), bool) if share is None else share.holds(row_N)
                    made = teacher.distributions(row_N, is_wanted_N)
                    sink.writer.put(part.start, sink.arrays(row_N, made))
                    bar.update(len(row_N))
                    stop_if_alone(f"{name}: finished shards are kept")
                if preempted():
                    raise Preempted(f"{name}: finished shards are kept")
        except Preempted:
            sink.writer.flush()
            raise
    sink.writer.close()
    return sink.finish({}, {})


class NgramTeacher:
    """Next-token distributions of rows by what follows their contexts elsewhere in training.

    Args:
        split: Whose rows are asked about.

    Raises:
        ConfigError: There are too many tokens.
    """

    def __init__(self, tokens: Artifact, split: Split, config: TargetsConfig):
        train = TokenSplit.open(tokens, "train")
        token_T, document_offset = train.read(0, train.num_tokens), train.document_offset
        label_E = token_T[1:]  # The last token is followed by none.
        self._first, self._is_own = 0, split == "train"
        if not self._is_own:
            other = TokenSplit.open(tokens, split)
            self._first = train.num_tokens
            token_T = np.concatenate([token_T, other.read(0, other.num_tokens)])
            moved = other.document_offset + train.num_tokens
            document_offset = np.concatenate([document_offset[:-1], moved])
        if len(token_T) > _MOST_TOKENS:
            raise ConfigError(
                f"targets.teacher=ngram sorts at most {_MOST_TOKENS:,} tokens, and there are "
                f"{len(token_T):,}: lower corpus.max_bytes, or use targets.teacher=knn"
            )
        say(f"targets: sorting the contexts of {len(token_T):,} tokens")
        self._contexts = Contexts(token_T, document_offset, len(label_E))
        self._following = Following(label_E[self._contexts.order_E], config.num_tokens)
        self._token_T, self._min_count = token_T, config.ngram_min_count

    def distributions(self, row_Q: np.ndarray, is_wanted_Q: np.ndarray) -> SparseDistributions:
        """Returns the distributions of rows (int64); those that are not wanted have none."""
        token_Q = row_Q[is_wanted_Q] + self._first
        first_Q, stop_Q = self._contexts.longest(token_Q, self._min_count)
        own_Q = self._token_T[token_Q + 1] if self._is_own else None
        made = self._following.distributions(first_Q, stop_Q, own_Q)
        shape = (len(row_Q), made.id_QS.shape[1])
        found = SparseDistributions(
            np.zeros(shape, np.int32), np.zeros(shape, np.float32), np.zeros(shape[0], np.float32)
        )
        found.id_QS[is_wanted_Q], found.prob_QS[is_wanted_Q] = made.id_QS, made.prob_QS
        found.mass_Q[is_wanted_Q] = made.mass_Q
        return found


class Following:
    """What follows occurrences that stand together.

    Args:
        label_E: The token behind each occurrence, in the order of their contexts.
        num_tokens: S.
    """

    def __init__(self, label_E: np.ndarray, num_tokens: int):
        self._label_E, self._num_tokens = label_E, num_tokens
        self._kept: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}

    def distributions(
        self, first_Q: np.ndarray, stop_Q: np.ndarray, own_Q: np.ndarray | None
    ) -> SparseDistributions:
        """Returns the shares of the most frequent tokens, the smallest id first of equal ones.

        Args:
            first_Q: First occurrence.
            stop_Q: The end of them.
            own_Q: A token of each query that is left out once; None: none is.
        """
        interval_N, number_Q = np.unique(
            np.stack([first_Q, stop_Q], axis=1), axis=0, return_inverse=True
        )
        id_NC, count_NC = self._most_frequent(interval_N)
        number_Q = number_Q.reshape(-1)
        id_QC, count_QC = id_NC[number_Q], count_NC[number_Q]
        total_Q = stop_Q - first_Q
        if own_Q is not None:
            # One candidate more than S: what is left out may fall behind one of them, not more.
            count_QC = count_QC - ((id_QC == own_Q[:, None]) & (count_QC > 0))
            total_Q = np.maximum(total_Q - 1, 0)
        ranked_QC = (~count_QC.astype(np.uint32)).astype(np.uint64) << _HALF
        ranked_QC |= id_QC.astype(np.uint64)
        ranked_QC.sort(axis=1)
        ranked_QS = ranked_QC[:, : self._num_tokens]
        count_QS = ~(ranked_QS >> _HALF).astype(np.uint32)
        prob_QS = (count_QS / np.maximum(total_Q, 1)[:, None]).astype(np.float32)
        id_QS = np.where(count_QS > 0, ranked_QS.astype(np.uint32), 0).astype(np.int32)
        return SparseDistributions(id_QS, prob_QS, prob_QS.sum(axis=1, dtype=np.float32))

    def _most_frequent(self, interval_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns the most frequent S + 1 tokens of intervals, and their counts: [N, S + 1]."""
        shape = (len(interval_N), self._num_tokens + 1)
        id_NC, count_NC = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        size_N = interval_N[:, 1] - interval_N[:, 0]
        is_large_N = size_N > _KEPT_SIZE
        for number in np.flatnonzero(is_large_N):
            key = (int(interval_N[number, 0]), int(interval_N[number, 1]))
            if key not in self._kept:
                ids, counts = self._counted(interval_N[number : number + 1])
                self._kept[key] = ids[0], counts[0]
            id_NC[number], count_NC[number] = self._kept[key]
        small = np.flatnonzero(~is_large_N)
        for part in row_ranges(len(small), _COUNTED_AT_ONCE // _KEPT_SIZE):
            id_NC[small[part]], count_NC[small[part]] = self._counted(interval_N[small[part]])
        return id_NC, count_NC

    def _counted(self, interval_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        size_N = interval_N[:, 1] - interval_N[:, 0]
        number_M = np.repeat(np.arange(len(interval_N)), size_N)
        place_M = np.arange(len(number_M)) + np.repeat(
            interval_N[:, 0] - (np.cumsum(size_N) - size_N), size_N
        )
        packed_M = number_M.astype(np.uint64) << _HALF
        packed_M |= self._label_E[place_M].astype(np.uint64)
        packed_M, count_M = np.unique(packed_M, return_counts=True)
        number_M = (packed_M >> _HALF).astype(np.int64)
        label_M = (packed_M & np.uint64(0xFFFFFFFF)).astype(np.int64)
        order = np.lexsort((label_M, -count_M, number_M))
        number_M, label_M, count_M = number_M[order], label_M[order], count_M[order]
        first_M = np.searchsorted(number_M, number_M, side="left")
        rank_M = np.arange(len(number_M)) - first_M
        kept = rank_M <= self._num_tokens
        shape = (len(interval_N), self._num_tokens + 1)
        id_NC, count_NC = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
        id_NC[number_M[kept], rank_M[kept]] = label_M[kept]
        count_NC[number_M[kept], rank_M[kept]] = count_M[kept]
        return id_NC, count_NC
