"""remove: documents of the training text, by id or by their text."""

import re
from collections.abc import Iterator, Sequence

import numpy as np

from mlpmem_jax.config.data import CorpusConfig
from mlpmem_jax.console import say
from mlpmem_jax.corpus.stream import Corpus
from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.corpus.train_documents import TrainDocuments, id_of
from mlpmem_jax.errors import UserError
from mlpmem_jax.pipeline.changed_stages import segment_corpus
from mlpmem_jax.pipeline.corpus_changes import apply, change, recorded, report, stages_of
from mlpmem_jax.pipeline.corpus_record import Change
from mlpmem_jax.pipeline.graph import Artifacts
from mlpmem_jax.pipeline.options import Options
from mlpmem_jax.store.array_specs import Split

_ID = re.compile(r"[0-9a-f]{16}")
_HELD_OUT: tuple[Split, ...] = ("valid", "test")
_SHOWN = 3


def main(run: Artifacts, options: Options) -> int:
    """Runs the command."""
    if not options.documents:
        raise UserError("remove: which documents? give --documents ID, or a file that holds them")

    def make(latest: Artifacts) -> None:
        asked = dict(_asked(latest.config.corpus, options.documents))
        _check(latest, asked)
        record = recorded(latest, Change("remove", documents=tuple(sorted(asked))))
        after = latest.with_corpus(record)
        if apply(latest, after, stages_of(after), options):
            say(f"remove: {len(asked):,} documents are out of rows, neighbours and targets")
            report("remove", after, 0)

    return change(run, options, make)


def _asked(corpus: CorpusConfig, documents: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields the ids of documents, each with how it was asked for.

    Raises:
        UserError: A file is missing or cannot be read.
    """
    for one in documents:
        if _ID.fullmatch(one):
            yield one, one
            continue
        try:
            for piece in Corpus(segment_corpus(corpus, (one,))).pieces():
                if piece.begins:
                    yield id_of(piece.digest), one
        except UserError as error:
            raise UserError(
                [line.replace("corpus.train.paths", "--documents") for line in error.messages]
            ) from None


def _check(run: Artifacts, asked: dict[str, str]) -> None:
    """Refuses documents that the training text does not hold, and all that it holds.

    Raises:
        UserError: One line; nothing was removed.
    """
    known = TrainDocuments.of(run.datastore("train"), run.tokens).digest
    missing = _not_among(asked, known)
    if missing:
        shown = ", ".join(
            one if asked[one] == one else f"{one} ({asked[one]})" for one in missing[:_SHOWN]
        )
        more = f" and {len(missing) - _SHOWN:,} more" if len(missing) > _SHOWN else ""
        held_out = [
            split
            for split in _HELD_OUT
            if len(_not_among(missing, TokenSplit.open(run.tokens, split).document_digest))
            < len(missing)
        ]
        where = f"; some are in {' and '.join(held_out)}, which keep theirs" if held_out else ""
        raise UserError(
            f"remove: not in the training text: {shown}{more}{where}; nothing was removed"
        )
    if len(asked) == len(known):
        raise UserError("remove: these are all documents of the training text; use another workdir")


def _not_among(ids: Sequence[str] | dict[str, str], digests: np.ndarray) -> list[str]:
    numbers = np.asarray([int(one, 16) for one in ids], np.uint64)
    return [one for one, found in zip(ids, np.isin(numbers, digests), strict=True) if not found]
