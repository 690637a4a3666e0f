"""A completion request from its body to its answer, whole or as a stream."""

import asyncio
import contextlib
import dataclasses
import secrets
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

from mlpmem_jax.config.serve import ServeConfig
from mlpmem_jax.corpus.tokenizer import TextTokenizer
from mlpmem_jax.generation.batching import Completion, Piece, QueueFull
from mlpmem_jax.generation.language_model import LanguageModel
from mlpmem_jax.generation.slots import Rule, text_keys
from mlpmem_jax.generation.stream import TokenBytes
from mlpmem_jax.generation.text_output import TextOutput
from mlpmem_jax.serving.choices import Choice
from mlpmem_jax.serving.metrics import Metrics
from mlpmem_jax.serving.requests import (
    CompletionBody,
    Prompt,
    RequestError,
    check_completion,
    read_prompts,
)
from mlpmem_jax.serving.worker import Worker

Answer = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Service:
    """What all requests share.

    Attributes:
        config: Limits.
        name: Of the model.
        model: Networks and tokenizer.
        worker: Continues texts.
    """

    config: ServeConfig
    name: str
    model: LanguageModel
    worker: Worker
    metrics: Metrics = dataclasses.field(default_factory=Metrics)

    @property
    def tokenizer(self) -> TextTokenizer:
        """Of the model."""
        return self.model.tokenizer


class Job:
    """One request to `/v1/completions`, with a completion for each choice."""

    def __init__(self, service: Service, body: CompletionBody):
        """Reads the prompts; heavy for long ones, so not in the thread of the event loop.

        Raises:
            RequestError: The request asks for what is not allowed.
        """
        check_completion(body, service.config, service.model.interpolated.has_memory)
        self._service, self._body = service, body
        self._started = time.monotonic()
        self._pieces: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        context = service.model.interpolated.context_tokens
        prompts = read_prompts(body.prompt, service.tokenizer, context)
        most = service.config.slots + service.config.max_queue
        if len(prompts) * body.n > most:
            raise RequestError(
                400, f"prompt: {len(prompts)} prompts with n={body.n} are more than {most} texts",
                "prompt",
            )  # fmt: skip
        texts = [service.tokenizer.decode(prompt.ids[1:]) for prompt in prompts]
        keys = text_keys(body.seed_or_random, [text for text in texts for _ in range(body.n)])
        token_bytes = TokenBytes(service.tokenizer.rust)
        self._num_read = sum(len(prompt.ids) - prompt.added for prompt in prompts)
        self._rules = [
            Rule(body.sampling, key, body.repetition_penalty, body.interpolation) for key in keys
        ]
        self._prompts = [prompt for prompt in prompts for _ in range(body.n)]
        self._choices = [
            Choice(
                index, prompt, service.tokenizer, token_bytes,
                num_logprobs=body.logprobs, echo=body.echo,
            )
            for index, prompt in enumerate(self._prompts)
        ]  # fmt: skip
        self._completions: list[Completion] = []
        self._about = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": service.name,
        }

    def submit(self) -> None:
        """Puts the completions into the queue.

        Raises:
            RequestError: It is full.
        """
        loop = asyncio.get_running_loop()
        self._completions = [
            self._completion(index, prompt, rule, loop)
            for index, (prompt, rule) in enumerate(zip(self._prompts, self._rules, strict=True))
        ]
        try:
            self._service.worker.submit(self._completions)
        except QueueFull:
            raise RequestError(
                429, f"the queue is full ({self._service.config.max_queue} texts); try again later"
            ) from None
        self._service.metrics.read(self._num_read)

    def cancel(self) -> None:
        """Ends what is not finished."""
        self._service.worker.cancel(self._completions)

    async def whole(self) -> Answer:
        """Returns the answer once all choices have ended.

        Raises:
            RequestError: It took too long, or the server stops.
        """
        collected: list[list[Piece]] = [[] for _ in self._choices]
        async for index, piece in self._arriving():
            collected[index].append(piece)
        parts = [
            choice.part(pieces) for choice, pieces in zip(self._choices, collected, strict=True)
        ]
        return self._about | {"choices": parts, "usage": self._usage()}

    async def stream(self) -> AsyncIterator[Answer]:
        """Yields the answer piece by piece.

        Raises:
            RequestError: It took too long, or the server stops.
        """
        async for index, piece in self._arriving():
            part = self._choices[index].part([piece])
            if part is not None:
                yield self._about | {"choices": [part]}
        options = self._body.stream_options
        if options and options.include_usage:
            yield self._about | {"choices": [], "usage": self._usage()}

    async def _arriving(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yields pieces as they come, until every choice has ended."""
        deadline = self._started + self._service.config.request_secs
        left = len(self._choices)
        begun = False
        while left:
            try:
                wait = max(0.0, deadline - time.monotonic())
                index, piece = await asyncio.wait_for(self._pieces.get(), wait)
            except TimeoutError:
                limit = self._service.config.request_secs
                raise RequestError(504, f"the request took more than {limit:g} s") from None
            if piece.finish == "error":
                raise RequestError(503, "the server stopped before the answer was complete")
            if not begun:
                begun = True
                self._service.metrics.first(time.monotonic() - self._started)
            left -= piece.finish is not None
            yield index, piece
        spent = time.monotonic() - self._started
        self._service.metrics.finished(self._num_drawn(), spent)

    def _completion(
        self, index: int, prompt: Prompt, rule: Rule, loop: asyncio.AbstractEventLoop
    ) -> Completion:
        body, tokenizer = self._body, self._service.tokenizer
        ends = {*body.stop_token_ids, *([] if body.ignore_eos else [tokenizer.separator_id])}

        def listen(piece: Piece) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server has ended
                loop.call_soon_threadsafe(self._pieces.put_nowait, (index, piece))

        return Completion(
            prompt.ids,
            rule,
            body.max_tokens,
            TextOutput(tokenizer, body.stops),
            listen,
            frozenset(ends),
            scored=body.logprobs is not None,
            prompt_scored=body.logprobs is not None and body.echo,
        )

    def _num_drawn(self) -> int:
        return sum(completion.num_drawn for completion in self._completions)

    def _usage(self) -> dict[str, int]:
        drawn = self._num_drawn()
        return {
            "prompt_tokens": self._num_read,
            "completion_tokens": drawn,
            "total_tokens": self._num_read + drawn,
        }


def models(service: Service) -> Answer:
    """Returns the answer of `/v1/models`."""
    about = {
        "id": service.name,
        "object": "model",
        "created": 0,
        "owned_by": "mlpmem_jax",
        "max_model_len": service.model.interpolated.context_tokens,
    }
    return {"object": "list", "data": [about]}


def check_model(service: Service, names: Iterable[str | None]) -> None:
    """Refuses another model than the one that is there.

    Raises:
        RequestError: Names it.
    """
    for name in names:
        if name is not None and name != service.name:
            raise RequestError(404, f"model: {name[:100]!r} is not {service.name!r}", "model")
