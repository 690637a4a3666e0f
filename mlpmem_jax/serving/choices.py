"""One choice of an answer: its text and its log-probabilities, as OpenAI's protocol has them."""

from collections.abc import Iterable, Sequence
from typing import Any

from mlpmem_jax.corpus.tokenizer import TextTokenizer
from mlpmem_jax.generation.batching import Piece
from mlpmem_jax.generation.slots import Drawn
from mlpmem_jax.generation.stream import TextStream, TokenBytes
from mlpmem_jax.serving.requests import Prompt


class Choice:
    """Puts together what one completion yields.

    Attributes:
        num_drawn: Tokens drawn.
        finish: Why it ended; None: it goes on.
    """

    def __init__(
        self,
        index: int,
        prompt: Prompt,
        tokenizer: TextTokenizer,
        token_bytes: TokenBytes,
        *,
        num_logprobs: int | None,
        echo: bool,
    ):
        """Begins with nothing.

        Args:
            index: Its number in the answer.
            prompt: The prompt's tokens.
            tokenizer: Of the model.
            token_bytes: What single tokens stand for.
            num_logprobs: Alternatives to tell with each token; None: no log-probabilities.
            echo: Whether the prompt is part of the text.
        """
        self.index = index
        self.num_drawn = 0
        self.finish: str | None = None
        self._given, self._tokenizer, self._token_bytes = prompt, tokenizer, token_bytes
        self._num_logprobs, self._echo = num_logprobs, echo
        self._begun = False
        self._prompt_length = 0

    def part(self, pieces: Iterable[Piece]) -> dict[str, Any] | None:
        """Returns what pieces add, as an entry of `choices`; None if that is nothing."""
        text, tokens = "", _Tokens(self._token_bytes, self._num_logprobs)
        for piece in pieces:
            if not self._begun:
                self._begun = True
                text += self._prompt(piece.prompt, tokens)
            text += piece.text
            if piece.drawn is not None:
                self.num_drawn += 1
                tokens.add(piece.drawn, self._prompt_length + piece.offset)
            self.finish = piece.finish or self.finish
        logprobs = None if self._num_logprobs is None else tokens.columns
        if not text and not (logprobs and logprobs["tokens"]) and self.finish is None:
            return None
        return {
            "index": self.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": self.finish,
        }

    def _prompt(self, scores: Sequence[Drawn], tokens: "_Tokens") -> str:
        """Returns the prompt's text if it is wanted, and adds its tokens."""
        if not self._echo:
            return ""
        ids, separator = self._given.ids, self._tokenizer.separator_id
        stream, text = TextStream(self._tokenizer.rust, skip=[separator]), ""
        if not self._given.added:
            tokens.add(Drawn(separator, None, ()), 0)
        for place, token in enumerate(ids[1:]):
            if scores:
                tokens.add(scores[place], len(text))
            text += stream.push(token)
        text += stream.close()
        self._prompt_length = len(text)
        return text


class _Tokens:
    """Log-probabilities by column."""

    def __init__(self, token_bytes: TokenBytes, num_top: int | None):
        self.columns: dict[str, list[Any]] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []
        }  # fmt: skip
        self._token_bytes, self._num_top = token_bytes, num_top

    def add(self, drawn: Drawn, offset: int) -> None:
        if self._num_top is None:
            return
        name, top = self._token_bytes.text(drawn.token), None
        if drawn.logprob is not None:
            # Of tokens that look alike the most probable one counts.
            pairs = (*drawn.top[: self._num_top], (drawn.token, drawn.logprob))
            top = {self._token_bytes.text(token): logprob for token, logprob in reversed(pairs)}
        row = (name, drawn.logprob, top, offset)
        for column, value in zip(self.columns.values(), row, strict=True):
            column.append(value)
