"""RAG: passages of the training text, found by BM25, before a prompt.

Needs the package bm25s.
"""

import dataclasses
import itertools
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any

from mlpmem_jax.corpus.tokenizer import TextTokenizer
from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.errors import UserError

_READ_DOCUMENTS = 256
_BETWEEN = "\n\n"
_WORD = re.compile(r"\w+")


@dataclasses.dataclass(frozen=True)
class Passages:
    """Passages of the documents of a split, and an index of their words.

    Attributes:
        texts: Passages, in the order of the documents.
        index: Finds them, of bm25s.
        num_found: Passages to set before a prompt.
    """

    texts: Sequence[str]
    index: Any
    num_found: int

    @classmethod
    def of(
        cls, split: TokenSplit, tokenizer: TextTokenizer, num_tokens: int, num_found: int
    ) -> "Passages":
        """Cuts documents into passages of up to `num_tokens` tokens and indexes them."""
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)

        texts = [text for text in _cut(split, tokenizer, num_tokens) if _words(text)]
        if not texts:
            raise UserError(f"{split.artifact.path}: the training text has no words to search for")
        index = bm25s.BM25()
        index.index([_words(text) for text in texts], show_progress=False)
        return cls(texts, index, min(num_found, len(texts)))

    def find(self, query: str) -> list[str]:
        """Returns passages for a query, the best first; none where no word is known."""
        words = _words(query)
        if not words:
            return []
        found, scores = self.index.retrieve(
            [words], k=self.num_found, show_progress=False, backend_selection="numpy"
        )
        ranked = zip(found[0].tolist(), scores[0].tolist(), strict=True)
        return [self.texts[int(place)] for place, score in ranked if score > 0]

    def before(self, context: str, tokenizer: TextTokenizer, room: int) -> str:
        """Returns what to set before a prompt: passages, the best next to the prompt.

        Args:
            context: The prompt. What follows its last empty line is the query, which leaves out
                examples of other questions.
            tokenizer: Counts tokens.
            room: Tokens that the passages may have; the worst are left out first.
        """
        text = ""
        for passage in self.find(context.rstrip().rsplit(_BETWEEN, 1)[-1]):
            longer = passage.strip() + _BETWEEN + text
            if len(tokenizer.encode([longer])[0]) > room:
                break
            text = longer
        return text


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def _cut(split: TokenSplit, tokenizer: TextTokenizer, num_tokens: int) -> Iterator[str]:
    offsets = split.document_offset
    for first in range(0, split.num_documents, _READ_DOCUMENTS):
        bounds = offsets[first : first + _READ_DOCUMENTS + 1].tolist()
        token_T = split.read(bounds[0], bounds[-1])
        for start, stop in itertools.pairwise(bounds):
            own_T = token_T[start - bounds[0] + 1 : stop - bounds[0]]  # without its separator
            for place in range(0, len(own_T), num_tokens):
                yield tokenizer.decode(own_T[place : place + num_tokens])
