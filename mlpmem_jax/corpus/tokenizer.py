"""Byte-level BPE trained on the corpus, or any tokenizer.json.

The text of a special token inside a document stays text: only the writer of the token
stream places separators, so that they mark the beginnings of documents and nothing else.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from mlpmem_jax.config.gguf import is_gguf
from mlpmem_jax.config.gguf_tokenizer import tokenizer_json
from mlpmem_jax.errors import ArtifactError, UserError
from mlpmem_jax.failures import first_line, reason_of
from mlpmem_jax.store.manifest import Artifact

TOKENIZER_FILE = "tokenizer.json"
# Vocabulary dims are padded to this by the model, so that a mesh axis may cut them.
_VOCAB_MULTIPLE = 128
# How a space is written in a vocabulary: by byte-level tokenizers, by Metaspace, by others.
_SPACES = "\u0120\u2581 "
# Training cuts words that are longer; where it cannot matter, they are not looked for.
_MOST_WORD_CHARS = 256
_LONG_RUN = re.compile(rf"\S{{{_MOST_WORD_CHARS}}}|\s{{{_MOST_WORD_CHARS}}}")


class TextTokenizer:
    """Text to token ids and back.

    Attributes:
        rust: The tokenizer of the `tokenizers` package.
        separator: The token that starts each document.
        vocab_size: Token ids are below this, V.
    """

    def __init__(self, content: bytes, separator: str, name: str = TOKENIZER_FILE):
        """Reads a tokenizer.

        Args:
            content: What a tokenizer.json holds.
            name: What the messages call it.

        Raises:
            UserError: It is no tokenizer, or has no such token.
        """
        self._content = content
        self._name = name
        self.separator = separator
        self.rust = _read(content, separator, name)
        vocabulary = self.rust.get_vocab(with_added_tokens=True)
        # Ids may have gaps, so the number of entries is not what arrays must hold.
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        found = vocabulary.get(separator)
        if found is None:
            special = [
                token.content
                for token in self.rust.get_added_tokens_decoder().values()
                if token.special
            ]
            raise UserError(
                f"{name}: has no token {separator!r} (tokenizer.separator); choose a token of its "
                "vocabulary"
                + (
                    f", for example one of its special tokens: {', '.join(special[:8])}"
                    * bool(special)
                )
            )
        self.separator_id = int(found)

    @property
    def padded_vocab(self) -> int:
        """The vocabulary rounded up to what the models hold."""
        return -(-self.vocab_size // _VOCAB_MULTIPLE) * _VOCAB_MULTIPLE

    def to_json(self) -> bytes:
        """Returns the tokenizer.json, byte for byte as it was given or trained."""
        return self._content

    def content_digest(self) -> str:
        """Returns a digest of the tokenizer.json."""
        return hashlib.blake2b(self._content, digest_size=8).hexdigest()

    def counts(self) -> dict[str, int]:
        """Returns the numbers that manifests record."""
        return {
            "vocab_size": self.vocab_size,
            "padded_vocab": self.padded_vocab,
            "separator_id": self.separator_id,
        }

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Encodes texts, in parallel, without adding any token.

        Args:
            texts: Any text; that of special tokens is not special.

        Returns:
            uint32 [number of tokens] for each text.
        """
        encodings = self.rust.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(encoding.ids, np.uint32) for encoding in encodings]

    def without_trailing_space(self, text: str) -> str:
        """Returns a prompt without its trailing space, where that would begin the next token.

        Most tokenizers join a space and the word after it: a prompt that ends in a space ends in a
        token that is rare in text, and its continuation is poor. Of several spaces only the last
        is removed, as the others are tokens of their own in whole text too.
        """
        if not text.endswith(" "):
            return text
        joins = any(
            token[0] in _SPACES and token.strip(_SPACES) for token in self.rust.get_vocab() if token
        )
        return text[:-1] if joins else text

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of tokens, separators and other special tokens included."""
        return str(self.rust.decode([int(one) for one in ids], skip_special_tokens=False))


def train_tokenizer(texts: Iterable[str], vocab_size: int, separator: str) -> TextTokenizer:
    """Trains byte-level BPE; the same texts give the same tokenizer.

    Args:
        texts: What to count words in; memory grows with the different words alone.
        vocab_size: Entries at most, the separator included.
        separator: The token that starts each document; its id is 0.
    """
    rust = Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    rust.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[separator],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    rust.train_from_iterator(_without_long_words(texts), trainer)
    return TextTokenizer(rust.to_str(pretty=True).encode(), separator)


def _without_long_words(texts: Iterable[str]) -> Iterator[str]:
    """Cuts what BPE takes for a single word of thousands of letters, as a genome or a ruler.

    Each merge goes through all of a word that has it, so that time grew with the square of its
    length. Other words, and texts without such words, stay as they are.
    """
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in texts:
        if not _LONG_RUN.search(text):
            yield text
            continue
        begin = 0
        for _, (start, stop) in words.pre_tokenize_str(text):
            for cut in range(start + _MOST_WORD_CHARS, stop, _MOST_WORD_CHARS):
                yield text[begin:cut]
                begin = cut
        yield text[begin:]


def read_tokenizer(path: str, separator: str) -> TextTokenizer:
    """Reads the tokenizer.json, or that of the GGUF file, that `tokenizer.path` names.

    Raises:
        UserError: It cannot be read, is no tokenizer, or lacks the separator.
    """
    if is_gguf(path):
        return TextTokenizer(tokenizer_json(path), separator, f"tokenizer.path={path}")
    try:
        content = epath.Path(path).expanduser().read_bytes()
    except OSError as error:
        raise UserError(f"tokenizer.path={path}: cannot be read ({reason_of(error)})") from None
    return TextTokenizer(content, separator, f"tokenizer.path={path}")


def load_tokenizer(artifact: Artifact) -> TextTokenizer:
    """Reads the tokenizer of a run directory.

    Raises:
        ArtifactError: It is missing or damaged.
    """
    manifest = artifact.verify()
    path = artifact.path / TOKENIZER_FILE
    separator = manifest.recipe["tokenizer"]["separator"]
    tokenizer = TextTokenizer(path.read_bytes(), separator, str(path))
    if tokenizer.vocab_size != manifest.counts["vocab_size"]:
        raise ArtifactError(
            f"{path}: {tokenizer.vocab_size} entries, its manifest says "
            f"{manifest.counts['vocab_size']}"
        )
    return tokenizer


def _read(content: bytes, separator: str, name: str) -> Tokenizer:
    try:
        described: dict[str, Any] = json.loads(content)
        for token in described.get("added_tokens") or ():
            if token["content"] == separator:
                # Only special tokens can be told to stay text inside documents.
                token["special"] = True
        if isinstance(described.get("model"), dict):
            described["model"]["dropout"] = None  # Else the same text gives other tokens.
        rust = Tokenizer.from_str(json.dumps(described))
    except Exception as error:
        # Parsing raises bare Exceptions, and any JSON may stand in the file.
        raise UserError(f"{name}: is no tokenizer.json ({first_line(error)})") from None
    rust.no_truncation()
    rust.no_padding()
    rust.encode_special_tokens = True
    return rust
