"""What a corpus must hold, found out before anything is written where that is cheap."""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from mlpmem_jax.config.data import CorpusConfig, TokenizerConfig
from mlpmem_jax.console import warn
from mlpmem_jax.corpus.sample import sample_texts
from mlpmem_jax.corpus.stream import Corpus
from mlpmem_jax.corpus.tokenizer import TextTokenizer, train_tokenizer
from mlpmem_jax.errors import UserError
from mlpmem_jax.store.array_specs import SPLITS

# A scan reads hundreds of megabytes a second: what is small is looked at as a whole.
_SCAN_BYTES = 64 << 20
# So many bytes of text in a window are surely more tokens than the window has.
_BYTES_PER_TOKEN = 64


@dataclasses.dataclass(frozen=True)
class Scan:
    """What the beginning of a corpus holds, by split.

    Attributes:
        complete: Whether this is all of the corpus.
        duplicates: Documents that were left out, because an equal one was seen.
        stopped_at: Bytes of the next document of each split, beyond corpus.max_bytes.
    """

    documents: Mapping[str, int]
    num_bytes: Mapping[str, int]
    complete: bool
    duplicates: int
    stopped_at: Mapping[str, int]


class Window(NamedTuple):
    """How many tokens a window of pretraining has, and the key that says so."""

    tokens: int
    key: str


def scan_corpus(corpus: Corpus) -> Scan:
    """Reads the corpus, or the beginning of a large one; a remote dataset is not touched.

    Raises:
        UserError: Text that cannot be used; file and place are named.
    """
    documents: Counter[str] = Counter()
    num_bytes: Counter[str] = Counter()
    complete = not any(part.is_dataset for part in corpus.parts)
    for piece in corpus.pieces() if complete else ():
        documents[piece.split] += piece.begins
        num_bytes[piece.split] += piece.num_bytes
        if num_bytes.total() > _SCAN_BYTES:
            complete = False
            break
    duplicates = corpus.position.left_out.get("duplicate_documents", 0)
    return Scan(documents, num_bytes, complete, duplicates, corpus.stopped_at)


def check_before(
    corpus: Corpus, settings: TokenizerConfig, given: TextTokenizer | None, window: Window
) -> Scan:
    """Refuses a corpus that cannot do, as far as a scan shows it.

    Args:
        settings: How a tokenizer is trained.
        given: The tokenizer, unless it is to be trained.
        window: What the training split must fill.

    Raises:
        UserError: An empty split, less than a window to train on, or text that is none.
    """
    scan = scan_corpus(corpus)
    if not scan.complete:
        return scan
    for note in corpus.notes():
        warn(note)
    check_splits(scan.documents, corpus.config, scan.duplicates)
    if scan.num_bytes["train"] <= _BYTES_PER_TOKEN * (window.tokens + 1):
        tokenizer = given or tokenizer_for(corpus, settings)
        pieces = [piece for piece in corpus.pieces() if piece.split == "train"]
        tokens = tokenizer.encode([piece.text for piece in pieces])
        check_window(scan.documents["train"] + sum(map(len, tokens)), window)
    return scan


def tokenizer_for(
    corpus: Corpus, settings: TokenizerConfig, on_progress: Callable[[int], object] = abs
) -> TextTokenizer:
    """Trains a tokenizer.

    Args:
        settings: Size of the vocabulary, separator, and how much is read.
        on_progress: Called with the number of characters of each text that is read.
    """

    def texts() -> Iterator[str]:
        for text in sample_texts(corpus, settings.train_bytes):
            on_progress(len(text))
            yield text

    return train_tokenizer(texts(), settings.vocab_size, settings.separator)


def check_splits(documents: Mapping[str, int], corpus: CorpusConfig, duplicates: int) -> None:
    """Refuses empty splits.

    Raises:
        UserError: One line for each, with the sizes of all and the keys to change.
    """
    sizes = ", ".join(f"{split} {documents.get(split, 0)}" for split in SPLITS)
    sizes += f"; {duplicates} duplicates left out" * bool(duplicates)
    mistakes = []
    for split in SPLITS:
        if documents.get(split, 0):
            continue
        if corpus.train.paths:
            way_out = f"corpus.{split}.paths={list(getattr(corpus, split).paths)} hold no text"
        elif split == "train":
            way_out = (
                f"give more text, or lower corpus.valid_fraction={corpus.valid_fraction} and "
                f"corpus.test_fraction={corpus.test_fraction}"
            )
        else:
            name = f"corpus.{split}_fraction"
            way_out = (
                f"raise {name}={getattr(corpus, f'{split}_fraction')}, give more documents, cut "
                "them with corpus.document_regex, or name the files of each split in "
                "corpus.train.paths, corpus.valid.paths and corpus.test.paths"
            )
        if corpus.max_bytes is not None:
            way_out += f" (corpus.max_bytes={corpus.max_bytes})"
        mistakes.append(f"corpus: the {split} split is empty (documents: {sizes}): {way_out}")
    if mistakes:
        raise UserError(mistakes)


def check_window(num_tokens: int, window: Window) -> None:
    """Refuses a training split that does not fill one window and its labels.

    Raises:
        UserError: Both numbers and the keys to change.
    """
    size, key = window
    if num_tokens <= size:
        raise UserError(
            f"corpus: the train split has {num_tokens} tokens and one window takes {size + 1} "
            f"({key}={size} and the last label): give more text or lower {key}"
        )
