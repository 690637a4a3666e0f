"""Text into token ids, batch by batch in order; several processes share the work."""

import itertools
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from mlpmem_jax.corpus.stream import Piece
from mlpmem_jax.corpus.tokenizer import TextTokenizer
from mlpmem_jax.parallel.agreement import gathered_arrays
from mlpmem_jax.parallel.preemption import Preempted, preempted
from mlpmem_jax.parallel.sharing import process_count, process_index

Encoded = tuple[list[Piece], list[np.ndarray]]


def encoded(tokenizer: TextTokenizer, source: Iterator[list[Piece]]) -> Iterator[Encoded]:
    """Yields batches of pieces with their token ids, in order.

    While a batch is used, the next one is encoded. Of several processes, which must all come
    here with the same batches, each encodes every P-th batch and all get all of them.

    Args:
        tokenizer: The same on all processes.
        source: Batches of pieces.

    Raises:
        Preempted: The machine of one of several processes is about to go.
    """
    rounds = _rounds(source)
    with ThreadPoolExecutor(1) as encoder:
        waiting: tuple[list[list[Piece]], Future[list[np.ndarray]]] | None = None
        for batches in itertools.chain(rounds, (None,)):
            following = None
            if batches is not None:
                own = batches[process_index()] if process_index() < len(batches) else []
                texts = [piece.text for piece in own]
                following = batches, encoder.submit(tokenizer.encode, texts)
            if waiting:
                yield from _exchanged(waiting[0], waiting[1].result())
            waiting = following


def _rounds(source: Iterator[list[Piece]]) -> Iterator[list[list[Piece]]]:
    """Groups batches so that each process has one of a group; the last group may be short."""
    while group := list(itertools.islice(source, process_count())):
        yield group


def _exchanged(batches: list[list[Piece]], own: list[np.ndarray]) -> Iterator[Encoded]:
    if process_count() == 1:
        yield batches[0], own
        return
    if preempted():
        raise Preempted("tokenize: what is written is kept")
    length = np.array([len(ids) for ids in own], np.int32)
    joined = np.concatenate([*own, np.zeros(0, np.uint32)]).astype(np.uint32)
    every_length, every_joined = gathered_arrays(length), gathered_arrays(joined)
    for pieces, lengths, ids in zip(batches, every_length, every_joined, strict=False):
        yield pieces, np.split(ids, np.cumsum(lengths)[:-1])
