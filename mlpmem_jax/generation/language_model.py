"""Decoder and memory with their tokenizer: texts in, texts and log-probabilities out.

Suffixes: T tokens of a text, L tokens of a window.
"""

import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mlpmem_jax.corpus.tokenizer import TextTokenizer
from mlpmem_jax.generation.decode import Generator, Timing
from mlpmem_jax.generation.interpolated import InterpolatedModel
from mlpmem_jax.generation.sampling import Sampling
from mlpmem_jax.generation.stream import TextStream


@dataclasses.dataclass(frozen=True)
class Scores:
    """Log-probabilities of the tokens of a text.

    Attributes:
        token_T: int32 ids.
        logprob_T: float32 log p of each token after those before it, nats.
    """

    token_T: np.ndarray
    logprob_T: np.ndarray

    @property
    def nats(self) -> float:
        """-log p of the whole text."""
        return float(-self.logprob_T.sum(dtype=np.float64)) + 0.0


class LanguageModel:
    """A model that continues and scores texts."""

    def __init__(self, model: InterpolatedModel, tokenizer: TextTokenizer):
        """Takes a model and the tokenizer that it was trained with."""
        self.interpolated = model
        self.tokenizer = tokenizer
        self._score = jax.jit(model.score)
        self._generators: dict[Sampling, Generator] = {}

    def stream(
        self, prompts: Sequence[str], max_new_tokens: int, sampling: Sampling, seed: int
    ) -> Iterator[tuple[int, str | None]]:
        """Yields pieces of text as they are drawn.

        Args:
            max_new_tokens: Tokens of each continuation, at most.
            sampling: How tokens are drawn.

        Yields:
            Number of a prompt and what is new of its continuation (never a part of a character);
            None once it is finished.
        """
        ids = [list(map(int, each)) for each in self.tokenizer.encode(list(prompts))]
        skip = [self.tokenizer.separator_id]
        streams = [TextStream(self.tokenizer.rust, skip=skip) for _ in prompts]
        generator = self._generator(sampling)
        for place, token in generator.stream(prompts, ids, max_new_tokens, seed):
            if token is None:
                yield place, streams[place].close()
                yield place, None
            else:
                yield place, streams[place].push(token)

    def generate(
        self,
        prompts: Sequence[str],
        max_new_tokens: int = 64,
        *,
        sampling: Sampling | None = None,
        seed: int = 0,
    ) -> list[str]:
        """Returns a continuation of each prompt, without the prompt.

        Args:
            prompts: Texts to continue; a separator is set before each.
            max_new_tokens: Tokens of each continuation, at most.
            sampling: How tokens are drawn; not set: from the whole distribution.
            seed: Seed of the draws; a prompt's do not depend on the other prompts.

        Raises:
            ValueError: `prompts` is a text and no list of texts, or no token is wanted.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts must be a list of texts, not a text")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if not prompts:
            return []
        texts = [""] * len(prompts)
        for place, piece in self.stream(prompts, max_new_tokens, sampling or Sampling(), seed):
            texts[place] += piece or ""
        return texts

    def timing(self, sampling: Sampling) -> Timing:
        """Returns how long the last generation with this sampling took."""
        return self._generator(sampling).timing

    def _generator(self, sampling: Sampling) -> Generator:
        if sampling not in self._generators:
            self._generators[sampling] = Generator(self.interpolated, sampling)
        return self._generators[sampling]

    def score(self, text: str) -> Scores:
        """Returns log-probabilities of the tokens of a text, read as a document of its own.

        A text longer than the context is read in windows that overlap by half: each token but
        those of the first window is predicted from at least half of the context.
        """
        token_T = np.asarray(self.tokenizer.encode([text])[0], np.int32)
        stream = np.concatenate([[self.tokenizer.separator_id], token_T]).astype(np.int32)
        context = self.interpolated.context_tokens
        logprob_T = np.zeros(len(token_T), np.float32)
        for start, first in _windows(len(token_T), context):
            part = stream[start : start + context + 1]
            padded = np.full(context + 1, self.tokenizer.separator_id, np.int32)
            padded[: len(part)] = part
            with jax.set_mesh(self.interpolated.mesh):
                found_1L = self._score(
                    self.interpolated.parameters,
                    jnp.asarray(padded[None, :-1]),
                    jnp.asarray(padded[None, 1:]),
                )
            logprob_T[first : start + len(part) - 1] = np.asarray(found_1L)[
                0, first - start : len(part) - 1
            ]
        return Scores(token_T, logprob_T)


def _windows(num_labels: int, context: int) -> Iterator[tuple[int, int]]:
    """Yields the first row of each window, and the first row that it scores."""
    start = first = 0
    while first < num_labels:
        yield start, first
        first = start + context
        start += max(1, context // 2)
