"""Continuous batching: texts enter a slot as soon as one is free, and leave when they end."""

import collections
import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

from mlpmem_jax.generation.engine import Engine
from mlpmem_jax.generation.slots import Drawn, Rule
from mlpmem_jax.generation.text_output import TextOutput

Finish = Literal["stop", "length", "error"]


class Piece(NamedTuple):
    """What a completion's listener receives.

    Attributes:
        text: Text that is new.
        drawn: The token that was drawn; None if none was asked for.
        offset: Characters of the completion before this token.
        prompt: The prompt's tokens but the first, with log-probabilities, if they are wanted;
            in the first piece only.
        finish: Why the completion ended; None: it goes on.
    """

    text: str
    drawn: Drawn | None
    offset: int
    prompt: Sequence[Drawn]
    finish: Finish | None


@dataclasses.dataclass(eq=False)
class Completion:
    """One text to be continued.

    Attributes:
        token_ids: Its prompt, with the separator that begins it.
        rule: How its tokens are drawn.
        max_new_tokens: Tokens at most; 0: only the prompt is read.
        output: Where its text is put together.
        listener: Called with each piece, by the thread that advances the batch.
        stop_token_ids: Tokens that end it and give no text; usually the separator is one of them.
        scored: Whether log-probabilities of drawn tokens are wanted.
        prompt_scored: Whether those of the prompt are wanted.
        cancelled: Whether nobody listens any more.
        num_drawn: Tokens drawn.
    """

    token_ids: Sequence[int]
    rule: Rule
    max_new_tokens: int
    output: TextOutput
    listener: Callable[[Piece], None]
    stop_token_ids: frozenset[int]
    scored: bool = False
    prompt_scored: bool = False
    cancelled: bool = False
    num_drawn: int = 0


class QueueFull(Exception):
    """More texts wait than may."""


class Batcher:
    """Gives slots to completions, in the order in which they came.

    One thread calls `advance`; any thread may call the other functions.
    """

    def __init__(self, engine: Engine, max_queue: int | None = None):
        """Takes an engine without texts.

        Args:
            engine: The slots.
            max_queue: Texts that may wait; None: any number.
        """
        self._engine = engine
        self._max_queue = max_queue
        self._lock = threading.Lock()
        self._waiting: collections.deque[Completion] = collections.deque()
        self._active: dict[int, Completion] = {}

    @property
    def num_waiting(self) -> int:
        """Texts that wait for a slot."""
        return len(self._waiting)

    @property
    def num_active(self) -> int:
        """Texts that have a slot."""
        return len(self._active)

    def submit(self, completions: Sequence[Completion]) -> None:
        """Puts completions at the end of the queue, all or none.

        Raises:
            QueueFull: So many may not wait.
        """
        with self._lock:
            free = self._engine.num_slots - len(self._active)
            most = None if self._max_queue is None else self._max_queue + free
            if most is not None and len(self._waiting) + len(completions) > most:
                raise QueueFull
            self._waiting.extend(completions)

    def cancel(self, completions: Sequence[Completion]) -> None:
        """Ends completions without a further piece; slots are free after the next step."""
        with self._lock:
            for completion in completions:
                completion.cancelled = True
            kept = [completion for completion in self._waiting if not completion.cancelled]
            self._waiting = collections.deque(kept)

    def advance(self) -> bool:
        """Reads at most one prompt and draws a token for every text; returns whether any is left.

        One prompt at a time: texts that are being written wait for no more than one.
        """
        for slot in [slot for slot, one in self._active.items() if one.cancelled]:
            self._leave(slot)
        self._admit()
        if self._active:
            scored = any(completion.scored for completion in self._active.values())
            for slot, drawn in self._engine.step(scored=scored).items():
                self._give(slot, drawn)
        return bool(self._active or self._waiting)

    def fail(self) -> None:
        """Tells every completion that nothing more comes."""
        with self._lock:
            lost = [*self._active.values(), *self._waiting]
            self._waiting.clear()
        self._active.clear()
        for completion in lost:
            completion.listener(Piece("", None, 0, (), "error"))

    def _admit(self) -> None:
        free = self._engine.free_slots()
        with self._lock:
            if not free or not self._waiting:
                return
            completion = self._waiting.popleft()
            self._active[free[0]] = completion
        drawn, prompt = self._engine.insert(
            free[0], completion.token_ids, completion.rule, scored=completion.prompt_scored
        )
        self._give(free[0], drawn, prompt)

    def _leave(self, slot: int) -> None:
        self._engine.evict(slot)
        with self._lock:
            del self._active[slot]

    def _give(self, slot: int, drawn: Drawn, prompt: Sequence[Drawn] = ()) -> None:
        """Hands a token to the text in a slot, and ends it where it ends."""
        completion = self._active[slot]
        piece = _piece(completion, drawn, prompt)
        if not completion.cancelled:
            completion.listener(piece)
        if piece.finish:
            self._leave(slot)


def _piece(completion: Completion, drawn: Drawn, prompt: Sequence[Drawn]) -> Piece:
    output = completion.output
    if completion.max_new_tokens == 0:
        return Piece("", None, 0, prompt, "length")
    completion.num_drawn += 1
    offset, finish = output.length, None
    if drawn.token in completion.stop_token_ids:
        finish, text = "stop", output.close()
    else:
        text = output.push(drawn.token)
        if not output.stopped and completion.num_drawn == completion.max_new_tokens:
            finish, text = "length", text + output.close()
        if output.stopped:
            finish = "stop"
    return Piece(text, drawn, offset, prompt, finish)  # type: ignore[arg-type]
