"""What `generate` continues: the configured prompts, or the beginning of a validation document."""

import re

import numpy as np

from mlpmem_jax.console import is_speaker, note
from mlpmem_jax.corpus.tokenizer import TextTokenizer
from mlpmem_jax.corpus.tokens import TokenSplit
from mlpmem_jax.errors import ArtifactError
from mlpmem_jax.pipeline.graph import Artifacts

_WORDS = 8
_SHOWN = 30  # characters of the beginning and the end of a text in a message
_MOST_TOKENS = 64  # where so many words are longer, as in writing without white space
_FIRST_WORDS = re.compile(rf"\s*(?:\S+\s+){{0,{_WORDS - 1}}}\S+")


def prompts_of(run: Artifacts, tokenizer: TextTokenizer) -> list[str]:
    """Returns the texts to continue; logs where they differ from what was typed.

    Raises:
        ArtifactError: `generate.prompts` is not set and there is no validation split.
    """
    config = run.config
    typed = list(config.generate.prompts) or [_beginning(run, tokenizer)]
    prompts = [tokenizer.without_trailing_space(text) for text in typed]
    if not is_speaker():
        return prompts
    if not config.generate.prompts:
        note(
            f"prompt: {prompts[0]!r} (generate.prompts is not set: taken from the validation split)"
        )
    for text, prompt in zip(typed, prompts, strict=True):
        if prompt != text and config.generate.prompts:
            note(
                f"prompt {_shown(text)}: its trailing space is left out, because the tokenizer "
                "makes it part of the next word"
            )
    context = config.decoder.context_tokens
    for prompt, token_T in zip(prompts, tokenizer.encode(prompts), strict=True):
        if len(token_T) >= context:  # The separator is one more.
            note(
                f"warning: prompt {_shown(prompt)}: of its {1 + len(token_T):,} tokens, the "
                f"separator included, the last {context:,} are read "
                f"(decoder.context_tokens={context})"
            )
    return prompts


def _shown(text: str) -> str:
    return repr(text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]}…{text[-_SHOWN:]}")


def _beginning(run: Artifacts, tokenizer: TextTokenizer) -> str:
    """Returns the first words of a validation document, drawn with the sampler's seed."""
    config, artifact = run.config, run.tokens
    if not artifact.is_complete():
        raise ArtifactError(
            f"{artifact.path}: missing; without generate.prompts the prompt is taken from the "
            "validation split. Run `tokenize`, or set generate.prompts or --prompt"
        )
    split = TokenSplit(artifact, "valid")
    long_enough = np.flatnonzero(split.document_words >= 2 * _WORDS)
    seed = config.seed if config.generate.seed is None else config.generate.seed
    drawn = np.random.default_rng(seed).choice(
        long_enough if len(long_enough) else split.num_documents
    )
    start, stop = split.document_offset[drawn : drawn + 2].tolist()
    # Token `start` is the separator.
    text = tokenizer.decode(split.read(start + 1, min(stop, start + 1 + _MOST_TOKENS)).tolist())
    words = _FIRST_WORDS.match(text)
    return words[0].rstrip("\ufffd") if words else ""  # a character may be cut at the end
