"""The text of one completion as its tokens come: whole characters, cut before a stop string."""

from collections.abc import Sequence

from mlpmem_jax.corpus.tokenizer import TextTokenizer
from mlpmem_jax.generation.stream import TextStream


class TextOutput:
    """Turns tokens into text that is certain.

    Attributes:
        stopped: Whether a stop string was written; it and what follows is not part of the text.
    """

    def __init__(self, tokenizer: TextTokenizer, stops: Sequence[str] = ()):
        """Starts an empty text.

        Args:
            tokenizer: Of the model.
            stops: Texts that end it, none of them empty.
        """
        self._stream = TextStream(tokenizer.rust, skip=[tokenizer.separator_id])
        self._stops = tuple(stops)
        self._text = ""
        self._shown = 0
        self.stopped = False

    @property
    def length(self) -> int:
        """Characters so far, those that are held back included."""
        return len(self._text)

    def push(self, token: int) -> str:
        """Adds a token and returns the text that is now certain."""
        self._text += self._stream.push(token)
        return self._released(final=False)

    def close(self) -> str:
        """Ends the text and returns what was held back."""
        self._text += self._stream.close()
        return self._released(final=True)

    def _released(self, *, final: bool) -> str:
        # What was shown cannot begin a stop string: such text is held back.
        found = [
            place for stop in self._stops if (place := self._text.find(stop, self._shown)) >= 0
        ]
        if self.stopped or found:
            end = self._shown if self.stopped else min(found)
            self.stopped = True
        else:
            end = len(self._text) - (0 if final else self._held_back())
        piece = self._text[self._shown : end]
        self._shown = end
        return piece

    def _held_back(self) -> int:
        """Returns how many of the last characters may begin a stop string."""
        longest = max((len(stop) - 1 for stop in self._stops), default=0)
        for size in range(min(longest, len(self._text) - self._shown), 0, -1):
            if any(stop.startswith(self._text[-size:]) for stop in self._stops):
                return size
        return 0
