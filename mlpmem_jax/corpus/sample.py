"""The part of the training text that a tokenizer is trained on."""

from collections.abc import Iterator

from mlpmem_jax.corpus.stream import Corpus, Position, nothing_seen


def sample_texts(corpus: Corpus, num_bytes: int) -> Iterator[str]:
    """Yields training text: the beginning of every source, an equal share of each.

    Args:
        corpus: The text; validation and test documents are passed over.
        num_bytes: Bytes at most.

    Raises:
        UserError: Text that cannot be used; file and place are named.
    """
    trains = [part.split in (None, "train") for part in corpus.parts]
    share = -(-num_bytes // max(1, sum(trains)))
    left = [share * train for train in trains]
    position: Position | None = Position()
    seen = nothing_seen()
    while position is not None:
        begin, position = position, None
        for piece in corpus.pieces(begin, seen):
            part = piece.position.part
            if piece.split == "train" and left[part]:
                text = piece.text
                if piece.num_bytes > left[part]:
                    text = text.encode()[: left[part]].decode(errors="ignore")
                left[part] -= min(left[part], piece.num_bytes)
                yield text
            if not any(left[part:]):
                return
            if not left[part] and _may_jump(corpus, part):
                position = Position(part + 1, taken_bytes=piece.position.taken_bytes)
                break


def _may_jump(corpus: Corpus, part: int) -> bool:
    """Returns whether the rest of a source need not be read to know what follows.

    What explicit test and validation files hold must be known: it is left out of train.
    """
    return corpus.config.max_bytes is None and corpus.parts[part].split in (None, "train")
