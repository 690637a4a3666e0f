"""The tokenizer of a GGUF file as a `tokenizer.json`."""

import json
from typing import Any

from mlpmem_jax.config.gguf import Header, read_header
from mlpmem_jax.errors import ConfigError

_UNKNOWN, _CONTROL = _SPECIAL = (2, 3)  # types of tokens
_SPACE = "\u2581"
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
    if kind not in _MODELS:
        return f"its tokenizer is of the kind {kind}, and supported are {', '.join(_MODELS)}"
    words = header.metadata.get("tokenizer.ggml.pre")
    if kind == "gpt2" and words not in _WORDS:
        supported = ", ".join(sorted(_WORDS))
        return f"its tokenizer cuts words as {words} does; supported are {supported}"
    for key, entry in _TABLES[kind].items():
        table = header.metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(table, list) or not all(isinstance(one, entry) for one in table):
            return f"its tokenizer has no tokenizer.ggml.{key}"
    return None


def special_tokens(header: Header) -> dict[int, str]:
    """Returns the control tokens of a tokenizer that can be read, by id."""
    tokens = header.metadata["tokenizer.ggml.tokens"]
    kinds = header.metadata.get("tokenizer.ggml.token_type") or []
    return {
        number: token
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=False))
        if kind in _SPECIAL
    }


def tokenizer_json(path: str) -> bytes:
    """Returns the `tokenizer.json` of a GGUF file.

    Raises:
        ConfigError: The file cannot be read, or has a tokenizer of another kind.
    """
    header = read_header(path)
    if (mistake := tokenizer_mistake(header)) is not None:
        raise ConfigError(f"tokenizer.path={path}: {mistake}; name a tokenizer.json")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    described = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": number, "content": token, **plain, "special": True}
            for number, token in special_tokens(header).items()
        ],
        "post_processor": None,
        **_MODELS[header.metadata["tokenizer.ggml.model"]](header.metadata),
    }
    return json.dumps(described, ensure_ascii=False).encode()


def _bpe(tokens: list[str], merges: list[Any], **options: Any) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: number for number, token in enumerate(tokens)},
        "merges": merges,
        **options,
    }


def _byte_level_bpe(metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns the parts of a tokenizer like GPT-2's."""
    words = metadata["tokenizer.ggml.pre"]
    tokens, merges = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "merges"))
    return {
        "normalizer": {"type": "NFC"} if words == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": _WORDS[words]},
        "decoder": _byte_level(True),
        "model": _bpe(tokens, merges, ignore_merges=words == "llama-bpe"),
    }


def _sentencepiece(metadata: dict[str, Any]) -> dict[str, Any]:
    """Returns the parts of a tokenizer like Llama 2's: SentencePiece's BPE, as merges by score."""
    tokens, scores = (metadata[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores"))
    ids = {token: number for number, token in enumerate(tokens)}
    pairs = [
        (score, token[:cut], token[cut:])
        for token, score in zip(tokens, scores, strict=False)
        for cut in range(1, len(token))
        if token[:cut] in ids and token[cut:] in ids
    ]
    pairs.sort(key=lambda pair: (-pair[0], ids[pair[1]], ids[pair[2]]))
    kinds = metadata.get("tokenizer.ggml.token_type") or []
    unknown = tokens[kinds.index(_UNKNOWN)] if _UNKNOWN in kinds else None
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE}
    back = {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}
    first, strip = (
        {"type": "Prepend", "prepend": _SPACE},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    )
    decoders = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *([strip] * prefix)]
    return {
        "normalizer": {"type": "Sequence", "normalizers": [*([first] * prefix), spaces]},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(
            tokens,
            [[left, right] for _, left, right in pairs],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        ),
    }


_MODELS = {"gpt2": _byte_level_bpe, "llama": _sentencepiece}
_TABLES: dict[str, dict[str, type]] = {
    "gpt2": {"tokens": str, "merges": str},
    "llama": {"tokens": str, "scores": float},
}
