"""Text into token ids, batch by batch in order; several processes share the work."""

import itertools
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from mlpmem_jax.corpus.stream import Piece
from mlpmem_jax.corpus.tokenizer import TextTokenizer
from mlpmem_jax.errors import RunFailed
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
        RunFailed: On every process: one of them reads other text.
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
    if process_count() > 1:
        _gathered_round([], [])  # The text must end in the same round for all.


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
    yield from zip(batches, _gathered_round(batches, own), strict=False)


def _gathered_round(
    batches: list[list[Piece]], own: list[np.ndarray]
) -> Iterator[list[np.ndarray]]:
    """Returns the ids of each process's pieces, after comparing the text that all have read.

    A process that sees other files would encode other text than the one that writes expects.
    """
    count = process_count()
    check_P = np.zeros(count, np.uint32)
    for place, pieces in enumerate(batches):
        for piece in pieces:
            check_P[place] = zlib.crc32(f"{piece.text}\0".encode(), int(check_P[place]))
    head = [*check_P.tolist(), len(own), *(len(ids) for ids in own)]
    sent = np.concatenate([np.array(head, np.uint32), *(ids.astype(np.uint32) for ids in own)])
    received = gathered_arrays(sent)
    for number, theirs in enumerate(received):
        if not np.array_equal(theirs[:count], received[0][:count]):
            raise RunFailed(
                f"tokenize: process {number} reads other text than process 0; all processes need "
                "the same files under the same names"
            )
    return (_pieces(theirs[count:]) for theirs in received)


def _pieces(sent: np.ndarray) -> list[np.ndarray]:
    """Undoes how a process sends its pieces: their number, their lengths, all ids."""
    number = int(sent[0])
    length_N, ids = sent[1 : 1 + number], sent[1 + number :]
    return np.split(ids, np.cumsum(length_N)[:-1]) if number else []
