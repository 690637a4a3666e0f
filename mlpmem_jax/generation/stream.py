"""From token ids to text as they come, never a broken character.

A byte-level token may end in the middle of a character: its bytes are held back until the
character is complete.
"""

import codecs
import functools
import re
from collections.abc import Iterable
from typing import TextIO

from tokenizers import Tokenizer, decoders

_REPLACEMENT = "\ufffd"
_METASPACE = "\u2581"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """Returns GPT-2's map between the 256 bytes and printable characters."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    mapping = {chr(byte): byte for byte in printable}
    others = sorted(set(range(256)) - set(printable))
    return mapping | {chr(256 + i): byte for i, byte in enumerate(others)}


class TokenBytes:
    """What single tokens stand for."""

    def __init__(self, tokenizer: Tokenizer):
        """Reads the vocabulary of any tokenizer."""
        self._tokenizer = tokenizer
        self.byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._byte_of = _byte_of_character()
        self._added = {i: t.content for i, t in tokenizer.get_added_tokens_decoder().items()}

    def of(self, token: int) -> bytes:
        """Returns the bytes of a token, nothing for an id without one."""
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return b""
        if not self.byte_level:
            byte = _BYTE_TOKEN.fullmatch(piece)
            return bytes([int(byte[1], 16)]) if byte else piece.replace(_METASPACE, " ").encode()
        if all(character in self._byte_of for character in piece):
            return bytes(self._byte_of[character] for character in piece)
        return piece.encode()

    def text(self, token: int) -> str:
        r"""Returns a token as text; where it is a part of a character, as `bytes:\xe2\x82`."""
        content = self.of(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)


class TextStream:
    """Decodes the tokens of one text, one at a time."""

    def __init__(self, tokenizer: Tokenizer, skip: Iterable[int] = ()):
        """Starts an empty text.

        Args:
            tokenizer: Any tokenizer; byte-level ones are decoded byte by byte.
            skip: Ids that give no text, such as the separator.
        """
        self._tokenizer = tokenizer
        self._skip = frozenset(skip)
        self._token_bytes = TokenBytes(tokenizer)
        self._byte_level = self._token_bytes.byte_level
        self._bytes = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ids: list[int] = []
        self._shown = ""

    def push(self, token: int) -> str:
        """Adds a token and returns the text that is now certain."""
        if token in self._skip:
            return ""
        if self._byte_level:
            return self._bytes.decode(self._token_bytes.of(token))
        # Other decoders (Metaspace, byte fallback) need what came before: decode all again
        # and hold back what may still change.
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids, skip_special_tokens=False)
        return "" if text.endswith(_REPLACEMENT) else self._advance(text)

    def close(self) -> str:
        """Ends the text and returns what was held back, incomplete bytes as U+FFFD."""
        if self._byte_level:
            return self._bytes.decode(b"", final=True)
        return self._advance(self._tokenizer.decode(self._ids, skip_special_tokens=False))

    def _advance(self, text: str) -> str:
        new = text[len(self._shown) :]
        self._shown = text
        return new


class Screen:
    """Shows several texts that grow at the same time, one after the other.

    The first is shown as it grows; the others wait, and what they have so far appears as
    soon as those before them are finished.
    """

    def __init__(self, out: TextIO, titles: list[str]):
        """Starts to show texts.

        Args:
            out: Where to write.
            titles: What to write before each text.
        """
        self._out = out
        self._titles = titles
        self._waiting = [""] * len(titles)
        self._finished = [False] * len(titles)
        self._current = -1
        self._next()

    def _next(self) -> None:
        self._current += 1
        if self._current < len(self._titles):
            if self._current:
                self._write("\n")
            self._write(self._titles[self._current] + self._waiting[self._current])

    def _write(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()

    def show(self, index: int, text: str) -> None:
        """Adds to a text."""
        if index == self._current:
            if text:
                self._write(text)
        else:
            self._waiting[index] += text

    def finish(self, index: int) -> None:
        """Ends a text; those that waited for it are shown."""
        self._finished[index] = True
        while self._current < len(self._titles) and self._finished[self._current]:
            self._write("\n")
            self._next()
