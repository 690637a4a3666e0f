"""Targets of the official code, taken over for the rows of this token stream.

Suffixes: N rows of the split, M rows of a batch of the files, S tokens of a target.
"""

from collections.abc import Iterator

import numpy as np

from mlpmem_jax.config.data import DatastoreConfig, TargetsConfig
from mlpmem_jax.console import progress
from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.errors import UserError
from mlpmem_jax.parallel.preemption import Preempted, stop_if_alone, stopping_where_asked
from mlpmem_jax.retrieval.arrow_files import ArrowBatch, ArrowFiles
from mlpmem_jax.retrieval.distributions import SparseDistributions
from mlpmem_jax.retrieval.target_sink import TargetSink, share_of_rows
from mlpmem_jax.store.array_specs import Split
from mlpmem_jax.store.manifest import Artifact, Completion


def make_arrow_targets(
    artifact: Artifact,
    split: Split,
    tokens: Artifact,
    config: TargetsConfig,
    chunking: DatastoreConfig,
    seed: int,
) -> Completion:
    """Makes the targets of a split of what the files say of each row.

    Args:
        artifact: Where they go.
        split: Whose rows.
        tokens: The token stream. The files are about its rows in order: all of them, or all
            whose label is not the separator.
        config: The section.
        chunking: How arrays are cut: as those of the datastore.
        seed: Of the share of training rows that have targets.

    Raises:
        UserError: The files are damaged, or about other tokens.
    """
    rows = TokenSplit.open(tokens, split)
    label_N = rows.read(1, rows.num_tokens)
    share = share_of_rows(config, tokens, label_N, seed) if split == "train" else None
    sink = TargetSink(artifact, split, tokens, config, chunking, label_N, share)
    path = config.arrow_of(split)
    assert path is not None
    files = ArrowFiles(path, f"targets.{split}_arrow")
    row_R = _rows(files, label_N != rows.separator_id, path, split)
    vocab_size = int(tokens.load().counts["vocab_size"])
    pieces = _pieces(files, vocab_size, label_N, row_R, sink.num_tokens)
    name = f"targets of {split}"
    with progress(sink.writer.num_rows, "row", name) as bar, stopping_where_asked():
        try:
            row_M, piece = next(pieces)
            for part in sink.writer.own_rows():
                made = _empty(part.stop - part.start, sink.num_tokens)
                while len(row_M) and row_M[0] < part.stop:
                    first, stop = np.searchsorted(row_M, (part.start, part.stop))
                    place = row_M[first:stop] - part.start
                    for whole, some in zip(vars(made).values(), vars(piece).values(), strict=True):
                        whole[place] = some[first:stop]
                    if stop < len(row_M):
                        break
                    row_M, piece = next(pieces, (row_M[:0], piece))
                sink.writer.put(part.start, sink.arrays(np.arange(part.start, part.stop), made))
                bar.update(part.stop - part.start)
                stop_if_alone(f"{name}: finished shards are kept")
        except Preempted:
            sink.writer.flush()
            raise
        for _ in pieces:  # The rows of other processes are checked too.
            pass
    sink.writer.close()
    return sink.finish({}, {})


def _rows(files: ArrowFiles, is_scored_N: np.ndarray, path: str, split: str) -> np.ndarray:
    """Returns which row of the split each row of the files is about.

    Raises:
        UserError: There are too few or too many.
    """
    found, scored = files.num_rows(), np.flatnonzero(is_scored_N)
    if found == len(is_scored_N):
        return np.arange(found)
    if found == len(scored):
        return scored
    raise UserError(
        f"targets.{split}_arrow={path} holds {found:,} rows; {split} has {len(is_scored_N):,}, and "
        f"{len(scored):,} whose label is not the separator: the files are cut off, or about "
        "other text"
    )


def _pieces(
    files: ArrowFiles, vocab_size: int, label_N: np.ndarray, row_R: np.ndarray, num_tokens: int
) -> Iterator[tuple[np.ndarray, SparseDistributions]]:
    """Yields rows of the split, ascending, with their distributions.

    Raises:
        UserError: A label is not that of the token stream.
    """
    first = 0
    for batch in files.batches(vocab_size):
        row_M = row_R[first : first + len(batch.label_M)]
        differs = np.flatnonzero(label_N[row_M] != batch.label_M)
        if differs.size:
            place = int(differs[0])
            raise files.mistake(
                f"row {first + place} has the label {batch.label_M[place]}, the token stream "
                f"{label_N[row_M[place]]}: other text, or another tokenizer"
            )
        first += len(row_M)
        if len(row_M):
            yield row_M, _cut(batch, num_tokens)


def _cut(batch: ArrowBatch, num_tokens: int) -> SparseDistributions:
    """Returns the most probable tokens; of equal ones the smallest ids first."""
    made = _empty(len(batch.count_M), num_tokens)
    row_E = np.repeat(np.arange(len(batch.count_M)), batch.count_M)
    order_E = np.lexsort((batch.id_E, -batch.prob_E, row_E))
    rank_E = np.arange(len(row_E)) - np.repeat(np.cumsum(batch.count_M), batch.count_M)
    rank_E += np.repeat(batch.count_M, batch.count_M)
    prob_E = batch.prob_E[order_E]
    kept_E = (rank_E < num_tokens) & (prob_E > 0)
    place = row_E[kept_E], rank_E[kept_E]
    made.id_QS[place], made.prob_QS[place] = batch.id_E[order_E][kept_E], prob_E[kept_E]
    np.sum(made.prob_QS, axis=1, dtype=np.float32, out=made.mass_Q)
    return made


def _empty(num_rows: int, num_tokens: int) -> SparseDistributions:
    return SparseDistributions(
        np.zeros((num_rows, num_tokens), np.int32),
        np.zeros((num_rows, num_tokens), np.float32),
        np.zeros(num_rows, np.float32),
    )
