"""Continuations of prompts: through slots, or greedily with an explicit kNN-LM.

Suffixes: B rows, L tokens, D width, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mlpmem_jax.console import progress
from mlpmem_jax.corpus.tokenizer import TextTokenizer
from mlpmem_jax.generation.batching import Batcher, Completion, Piece
from mlpmem_jax.generation.engine import Engine, buckets
from mlpmem_jax.generation.interpolated import InterpolatedModel, ModelCache
from mlpmem_jax.generation.language_model import LanguageModel
from mlpmem_jax.generation.slots import Rule
from mlpmem_jax.generation.text_output import TextOutput
from mlpmem_jax.parallel.sharding import replicated
from mlpmem_jax.studies.tasks.scoring import KnnMixture


@dataclasses.dataclass(frozen=True)
class Ask:
    """A prompt to be continued.

    Attributes:
        tokens: The prompt, with the separator that begins it.
        max_new_tokens: Tokens at most.
        stops: Texts that end the continuation and are not part of it.
        rule: How its tokens are drawn.
        ignore_separator: Whether the separator does not end it.
    """

    tokens: Sequence[int]
    max_new_tokens: int
    stops: Sequence[str]
    rule: Rule
    ignore_separator: bool = False

    def ends(self, tokenizer: TextTokenizer) -> frozenset[int]:
        """Returns the tokens that end it."""
        return frozenset() if self.ignore_separator else frozenset([tokenizer.separator_id])


class SlotWriter:
    """Continues prompts in the slots of the engine that `serve` has too."""

    def __init__(self, model: LanguageModel, batch_size: int):
        """Takes a model; as many slots as `batch_size`."""
        self._tokenizer = model.tokenizer
        self._batcher = Batcher(Engine(model.interpolated, batch_size, num_top=1))

    def write(self, asks: Sequence[Ask]) -> list[str]:
        """Returns a continuation of each prompt."""
        texts = [""] * len(asks)
        with progress(len(asks), "prompt", "writing") as bar:

            def listen(number: int, piece: Piece) -> None:
                texts[number] += piece.text
                if piece.finish:
                    bar.update(1)

            completions = [
                self._completion(ask, functools.partial(listen, number))
                for number, ask in enumerate(asks)
            ]
            self._batcher.submit(completions)
            while self._batcher.advance():
                pass
        return texts

    def _completion(self, ask: Ask, listener: Callable[[Piece], None]) -> Completion:
        output = TextOutput(self._tokenizer, ask.stops)
        ends = ask.ends(self._tokenizer)
        return Completion(ask.tokens, ask.rule, ask.max_new_tokens, output, listener, ends)


@dataclasses.dataclass
class _Text:
    """A text that is being written, on the host.

    Attributes:
        ask: Its prompt.
        tokens: Prompt, and what was drawn.
        output: Where its text is put together.
        text: What is certain of it.
        in_cache: Tokens in its row of the cache; None before the prompt is read.
    """

    ask: Ask
    tokens: list[int]
    output: TextOutput
    text: str = ""
    in_cache: int | None = None
    finished: bool = False

    def take(self, token: int, ends: frozenset[int]) -> None:
        self.tokens.append(token)
        if token not in ends:
            self.text += self.output.push(token)
        drawn = len(self.tokens) - len(self.ask.tokens)
        self.finished = (
            token in ends or self.output.stopped or drawn == self.ask.max_new_tokens
        )  # fmt: skip
        if self.finished:
            self.text += self.output.close()


class KnnWriter:
    """Continues prompts greedily with the mixture of decoder and neighbours.

    Each token is a step of the decoder, a search on the host, and the mixture on the device. Rows
    that are full start again from the last half of the context, as elsewhere.
    """

    def __init__(
        self,
        model: InterpolatedModel,
        tokenizer: TextTokenizer,
        knn: KnnMixture,
        batch_size: int,
    ):
        """Takes the decoder, its tokenizer and the kNN-LM; `batch_size` prompts at once."""
        self._model, self._tokenizer, self._knn, self._batch = model, tokenizer, knn, batch_size
        places: Any = model.cache_shardings(batch_size)
        everywhere: Any = replicated(model.mesh)
        self._empty = jax.jit(lambda: model.empty_cache(batch_size), out_shardings=places)
        self._extend = jax.jit(
            self._extended, donate_argnums=1, out_shardings=(places, everywhere, everywhere)
        )
        self._drawn = jax.jit(lambda *found: jnp.argmax(knn.mix(*found), axis=-1))

    def write(self, asks: Sequence[Ask]) -> list[str]:
        """Returns a continuation of each prompt, tokens drawn greedily."""
        texts = [_Text(ask, list(ask.tokens), self._output(ask)) for ask in asks]
        order = sorted(range(len(asks)), key=lambda number: len(asks[number].tokens))
        with progress(len(asks), "prompt", "writing") as bar:
            for first in range(0, len(order), self._batch):
                batch = [texts[number] for number in order[first : first + self._batch]]
                self._write_batch(batch)
                bar.update(len(batch))
        return [text.text for text in texts]

    def _output(self, ask: Ask) -> TextOutput:
        return TextOutput(self._tokenizer, ask.stops)

    def _write_batch(self, texts: Sequence[_Text]) -> None:
        context = self._model.context_tokens
        with jax.set_mesh(self._model.mesh):
            cache = self._empty()
            while active := [text for text in texts if not text.finished]:
                new = [text for text in active if text.in_cache in (None, context)]
                windows = [self._window(text) if text in new else [] for text in texts]
                if not new:
                    windows = [[] if text.finished else text.tokens[-1:] for text in texts]
                cache, token_B = self._step(cache, windows, restarted=bool(new))
                for text, window, token in zip(texts, windows, token_B.tolist(), strict=False):
                    if window:
                        text.in_cache = len(window) if new else (text.in_cache or 0) + 1
                        text.take(token, text.ask.ends(self._tokenizer))

    def _window(self, text: _Text) -> list[int]:
        context = self._model.context_tokens
        kept = context if text.in_cache is None else max(1, context // 2)
        return text.tokens[-kept:]

    def _step(
        self, cache: ModelCache, windows: Sequence[Sequence[int]], *, restarted: bool
    ) -> tuple[ModelCache, np.ndarray]:
        """Reads windows, empty ones of rows that stay as they are, and draws a token for each."""
        longest, sizes = max(map(len, windows)), buckets(self._model.context_tokens)
        width = next(size for size in sizes if size >= longest) if restarted else 1
        token_BL = np.full((self._batch, width), self._model.separator, np.int32)
        length_B = np.zeros(self._batch, np.int32)
        for row, window in enumerate(windows):
            token_BL[row, : len(window)] = window
            length_B[row] = len(window)
        cache, logprob_BV, key_BD = self._extend(
            self._model.parameters, cache, token_BL, length_B, np.bool_(restarted)
        )
        shares = self._knn.search(np.asarray(key_BD))
        return cache, np.asarray(self._drawn(logprob_BV, *shares))

    def _extended(
        self,
        parameters: Any,
        cache: ModelCache,
        token_BL: jax.Array,
        length_B: jax.Array,
        restarted: jax.Array,
    ) -> tuple[ModelCache, jax.Array, jax.Array]:
        site, read_B = self._knn.site, length_B > 0
        before = cache.emptied(read_B & restarted, self._model.separator)
        prediction, states, after = self._model.predict(
            parameters, before, token_BL, length_B, (site,)
        )
        after = after.with_entries_of(cache, ~read_B)
        return after, prediction.mixture(), states[site].astype(jnp.float32)
