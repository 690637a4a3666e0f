"""The tokenizer of a GGUF file as a `tokenizer.json`."""

import json
from typing import Any

from mlpmem_jax.config.gguf import Header, read_header
from mlpmem_jax.errors import ConfigError

_CONTROL = 3
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level(use_regex: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def _split(numbers: str) -> list[dict[str, Any]]:
    pattern = {"Regex": f"{_CONTRACTIONS}{numbers}{_REST}"}
    cut = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return [cut, _byte_level(False)]


# How text is cut into words, by what `tokenizer.ggml.pre` says.
_WORDS: dict[str, list[dict[str, Any]]] = {
    "gpt-2": [_byte_level(True)],
    "llama-bpe": _split(r"\p{N}{1,3}"),
    "qwen2": _split(r"\p{N}"),
    "smollm": [{"type": "Digits", "individual_digits": True}, _byte_level(True)],
}


def tokenizer_mistake(header: Header) -> str | None:
    """Says why the tokenizer of a file cannot be read; None: it can."""
    kind = header.metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        return f"its tokenizer is of the kind {kind}, and supported is gpt2 (byte-level BPE)"
    words = header.metadata.get("tokenizer.ggml.pre")
    if words not in _WORDS:
        supported = ", ".join(sorted(_WORDS))
        return f"its tokenizer cuts words as {words} does; supported are {supported}"
    lists = [header.metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "merges")]
    if not all(isinstance(one, list) and all(isinstance(x, str) for x in one) for one in lists):
        return "its tokenizer has no tokens or no merges"
    return None


def special_tokens(header: Header) -> dict[int, str]:
    """Returns the control tokens of a tokenizer that can be read, by id."""
    tokens = header.metadata["tokenizer.ggml.tokens"]
    kinds = header.metadata.get("tokenizer.ggml.token_type") or []
    return {
        number: token
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind == _CONTROL
    }


def tokenizer_json(path: str) -> bytes:
    """Returns the `tokenizer.json` of a GGUF file.

    Raises:
        ConfigError: The file cannot be read, or has a tokenizer of another kind.
    """
    header = read_header(path)
    if (mistake := tokenizer_mistake(header)) is not None:
        raise ConfigError(f"tokenizer.path={path}: {mistake}; name a tokenizer.json")
    words = header.metadata["tokenizer.ggml.pre"]
    tokens, merges = (header.metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "merges"))
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token, **plain, "special": True}
            for number, token in special_tokens(header).items()
        ],
        "normalizer": {"type": "NFC"} if words == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _WORDS[words]},
        "post_processor": None,
        "decoder": _byte_level(True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": words == "llama-bpe",
            "vocab": {token: number for number, token in enumerate(tokens)},
            "merges": merges,
        },
    }
    return json.dumps(described, ensure_ascii=False).encode()
