"""Prompts to tokens with a key/value cache and the memory in every step.

Each prompt starts with the separator, as documents do. A row of the cache holds the last
tokens of one prompt; when it is full, the row alone starts again from the last half of the
context, so a text may be longer than the context and what a prompt yields does not depend
on the others in its batch. A prompt longer than the context keeps its last tokens.

Suffixes: B prompts, L tokens, V vocabulary, R steps of one call.
"""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mlpmem_jax.generation.interpolated import InterpolatedModel, ModelCache
from mlpmem_jax.generation.sampling import Sampling, prompt_keys, sample, token_keys
from mlpmem_jax.parallel.sharding import replicated

# Steps of one call to the device: few enough to stream, enough to hide the call.
STEPS_PER_CALL = 8
_SHORTEST_PREFILL = 16
_NONE = -1  # no token was drawn


class Progress(NamedTuple):
    """What generation carries from token to token, on the device.

    Attributes:
        cache: What the model keeps of the tokens read so far.
        token_B: int32, the token drawn last, not yet in the cache.
        drawn_B: int32, tokens drawn so far; numbers the random keys.
    """

    cache: ModelCache
    token_B: jax.Array
    drawn_B: jax.Array


@dataclasses.dataclass
class Timing:
    """How long a generation took.

    Attributes:
        tokens: Tokens generated, over all prompts.
        compile_secs: Compiling, once for each shape.
        first_secs: From the prompts to the first token of each.
        total_secs: All of it without compiling.
    """

    tokens: int = 0
    compile_secs: float = 0.0
    first_secs: float = 0.0
    total_secs: float = 0.0

    def __str__(self) -> str:
        rate = self.tokens / self.total_secs if self.total_secs else 0.0
        return (
            f"{self.tokens} tokens in {self.total_secs:.2f} s ({rate:.0f} tokens/s), first after "
            f"{1000 * self.first_secs:.0f} ms; compiled in {self.compile_secs:.1f} s"
        )


class Generator:
    """Generates text for batches of prompts."""

    def __init__(self, model: InterpolatedModel, sampling: Sampling):
        """Prepares to generate.

        Args:
            model: Decoder and memory; its separator ends a text.
            sampling: How tokens are drawn.
        """
        self._model = model
        self._sampling = sampling
        self._separator = model.separator
        self._compiled: dict[tuple[int, int, int], Any] = {}
        self.timing = Timing()

    def stream(
        self,
        prompts: Sequence[str],
        prompt_ids: Sequence[Sequence[int]],
        max_new_tokens: int,
        seed: int,
    ) -> Iterator[tuple[int, int | None]]:
        """Yields tokens as they are drawn.

        Args:
            prompts: Texts, of which the random keys are made.
            prompt_ids: Their tokens, without a leading separator.
            max_new_tokens: Tokens of each prompt, at most.

        Yields:
            Number of a prompt and its next token, or None once the prompt is finished. The
            separator ends a prompt and is not yielded.
        """
        rows = [_Row([self._separator, *ids]) for ids in prompt_ids]
        key_B = prompt_keys(seed, prompts)
        longest = max((len(row.tokens) for row in rows), default=1)
        progress = self._empty(len(rows), longest)
        self.timing = Timing()
        while active := [row for row in rows if not row.finished]:
            started = time.perf_counter()
            compiled_before = self.timing.compile_secs
            context = self._model.context_tokens
            if any(row.in_cache in (None, context) for row in active):
                progress, drawn_RB = self._start_rows(progress, key_B, rows)
            else:
                room = context - max(row.in_cache or 0 for row in active)
                left = max_new_tokens - max(row.drawn for row in active)
                progress, drawn_RB = self._advance(
                    progress, key_B, min(STEPS_PER_CALL, room, left), rows
                )
            spent = time.perf_counter() - started
            spent -= self.timing.compile_secs - compiled_before
            if not self.timing.total_secs:
                self.timing.first_secs = spent
            self.timing.total_secs += spent
            yield from self._taken(rows, drawn_RB, max_new_tokens)

    def _taken(
        self, rows: "Sequence[_Row]", drawn_RB: np.ndarray, max_new_tokens: int
    ) -> Iterator[tuple[int, int | None]]:
        """Gives each row the tokens drawn for it and yields them."""
        for place, row in enumerate(rows):
            for token in drawn_RB[:, place].tolist():
                if row.finished or token < 0:
                    continue
                row.tokens.append(token)
                row.drawn += 1
                row.finished = token == self._separator or row.drawn == max_new_tokens
                if token != self._separator:
                    self.timing.tokens += 1
                    yield place, token
                if row.finished:
                    yield place, None

    def _empty(self, num_prompts: int, num_tokens: int) -> Progress:
        size = self._model.cache_tokens(num_tokens)

        def make() -> Progress:
            zero_B = jnp.zeros(num_prompts, jnp.int32)
            return Progress(self._model.empty_cache(num_prompts, size), zero_B, zero_B)

        with jax.set_mesh(self._model.mesh):
            # Jitted, since donated buffers must be distinct and lie where they belong.
            return jax.jit(make, out_shardings=self._shardings(num_prompts))()

    def _with_room(self, progress: Progress, num_tokens: int) -> tuple[Progress, int]:
        """Returns it with room for so many tokens a row, and how many there is room for."""
        has = progress.cache.decoder.key.shape[3]
        size = max(has, self._model.cache_tokens(num_tokens))
        if size > has:
            grown = jax.jit(
                lambda old: old._replace(cache=old.cache.grown(size)),
                out_shardings=self._shardings(len(progress.token_B)),
            )
            progress = grown(progress)
        return progress, size

    def _shardings(self, num_prompts: int) -> Progress:
        everywhere: Any = replicated(self._model.mesh)
        return Progress(self._model.cache_shardings(num_prompts), everywhere, everywhere)

    def _start_rows(
        self, progress: Progress, key_B: jax.Array, rows: "Sequence[_Row]"
    ) -> tuple[Progress, np.ndarray]:
        """Reads new rows, and full ones from their last half; draws a token for each."""
        context = self._model.context_tokens
        windows: list[list[int]] = []
        for row in rows:
            if row.finished or row.in_cache not in (None, context):
                windows.append([])
            elif row.in_cache is None:
                windows.append(row.tokens[-context:])
            else:
                windows.append(row.tokens[-max(1, context // 2) :])
        longest = max(map(len, windows))
        width = min(context, max(_SHORTEST_PREFILL, 1 << (longest - 1).bit_length()))
        token_BL = np.full((len(rows), width), self._separator, np.int32)
        for place, window in enumerate(windows):
            token_BL[place, : len(window)] = window
            if window:
                rows[place].in_cache = len(window)
        length_B = np.array([len(window) for window in windows], np.int32)
        progress, size = self._with_room(progress, width)
        arguments = (progress, key_B, token_BL, length_B)
        progress, drawn_RB = self._call((len(rows), width, size), self._start, arguments)
        return progress, np.asarray(drawn_RB)

    def _advance(
        self, progress: Progress, key_B: jax.Array, num_steps: int, rows: "Sequence[_Row]"
    ) -> tuple[Progress, np.ndarray]:
        """Draws `num_steps` further tokens for every row that is not finished."""
        active_B = np.array([not row.finished for row in rows])
        most = max(row.in_cache or 0 for row in rows if not row.finished)
        progress, size = self._with_room(progress, most + num_steps)
        arguments = (progress, key_B, active_B, np.int32(num_steps))
        progress, drawn_RB = self._call((len(rows), 1, size), self._steps, arguments)
        for row in rows:
            if not row.finished:
                row.in_cache = (row.in_cache or 0) + num_steps
        return progress, np.asarray(drawn_RB)[:num_steps]

    def _call(self, shape: tuple[int, int, int], function: Any, arguments: tuple[Any, ...]) -> Any:
        """Calls a function compiled for batch, tokens and cache; counts the time of compiling."""
        parameters = self._model.parameters
        with jax.set_mesh(self._model.mesh):
            if shape not in self._compiled:
                started = time.perf_counter()
                jitted = self._jitted(function, shape[0])
                self._compiled[shape] = jitted.lower(parameters, *arguments).compile()
                self.timing.compile_secs += time.perf_counter() - started
            return jax.block_until_ready(self._compiled[shape](parameters, *arguments))

    def _jitted(self, function: Any, batch: int) -> Any:
        where = (self._shardings(batch), replicated(self._model.mesh))
        return jax.jit(function, donate_argnums=1, out_shardings=where)

    def abstract_steps(self, num_prompts: int) -> tuple[Any, tuple[Any, ...]]:
        """Returns the function that draws tokens and shapes of its arguments, to lower it.

        Call it, and lower, with the model's mesh set.
        """
        everywhere: Any = replicated(self._model.mesh)

        def make() -> tuple[Progress, jax.Array, jax.Array, jax.Array]:
            zero_B = jnp.zeros(num_prompts, jnp.int32)
            progress = Progress(self._model.empty_cache(num_prompts), zero_B, zero_B)
            key_B = jax.random.split(jax.random.key(0), num_prompts)
            return progress, key_B, zero_B > 0, zero_B[0]

        arguments = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            jax.eval_shape(make),
            (self._shardings(num_prompts), everywhere, everywhere, everywhere),
        )
        return self._jitted(self._steps, num_prompts), (self._model.parameters, *arguments)

    def _start(
        self,
        parameters: Any,
        progress: Progress,
        key_B: jax.Array,
        token_BL: jax.Array,
        length_B: jax.Array,
    ) -> tuple[Progress, jax.Array]:
        """Reads windows into the rows whose length is not 0 and draws a token for each."""
        read_B = length_B > 0
        old = progress.cache
        cache = old.emptied(read_B, self._separator)
        logprob_BV, cache = self._model.extend(parameters, cache, token_BL, length_B)
        cache = cache.with_entries_of(old, ~read_B)
        after = self._drawn(progress, cache, logprob_BV, key_B, read_B)
        return after, jnp.where(read_B, after.token_B, _NONE)[None]

    def _steps(
        self,
        parameters: Any,
        progress: Progress,
        key_B: jax.Array,
        active_B: jax.Array,
        num_steps: jax.Array,
    ) -> tuple[Progress, jax.Array]:
        """Reads the token drawn last and draws the next, `num_steps` times."""

        def step(index: jax.Array, carry: tuple[Progress, jax.Array]) -> Any:
            before, drawn_RB = carry
            logprob_BV, cache = self._model.extend(
                parameters,
                before.cache,
                before.token_B[:, None],
                active_B.astype(jnp.int32),
            )
            after = self._drawn(before, cache, logprob_BV, key_B, active_B)
            return after, drawn_RB.at[index].set(after.token_B)

        drawn_RB = jnp.full((STEPS_PER_CALL, len(active_B)), _NONE, jnp.int32)
        return jax.lax.fori_loop(0, num_steps, step, (progress, drawn_RB))

    def _drawn(
        self,
        before: Progress,
        cache: ModelCache,
        logprob_BV: jax.Array,
        key_B: jax.Array,
        chosen_B: jax.Array,
    ) -> Progress:
        token_B = sample(logprob_BV, token_keys(key_B, before.drawn_B), self._sampling)
        return Progress(
            cache,
            jnp.where(chosen_B, token_B, before.token_B),
            before.drawn_B + chosen_B.astype(jnp.int32),
        )


@dataclasses.dataclass
class _Row:
    """One prompt on the host.

    Attributes:
        tokens: Separator, prompt and what was drawn.
        drawn: Tokens drawn.
        in_cache: Tokens in the cache's row; None before the prompt is read.
        finished: Whether nothing more is drawn.
    """

    tokens: list[int]
    drawn: int = 0
    in_cache: int | None = None
    finished: bool = False
