"""The keys that a pretrained decoder decides, from a `config.json` or the header of a GGUF file.

Read without JAX, before a configuration is checked: rules that span keys see the real shape.
"""

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlpmem_jax.config.families import FAMILIES, Settings, longest_of, shape_of
from mlpmem_jax.config.gguf import is_gguf, read_header
from mlpmem_jax.config.gguf_settings import settings_of
from mlpmem_jax.config.gguf_tokenizer import special_tokens, tokenizer_mistake
from mlpmem_jax.config.hub import local_path
from mlpmem_jax.config.networks import DecoderConfig
from mlpmem_jax.errors import ConfigError

HF_CONFIG, HF_TOKENIZER = "config.json", "tokenizer.json"
# Longer contexts cost memory whether text fills them or not; a configuration may ask for more.
_DEFAULT_CONTEXT = 1024


class _Source(NamedTuple):
    """What a pretrained decoder says about itself.

    Attributes:
        label: What messages begin with.
        settings: Those of a `config.json`.
        tokenizer: Path of its tokenizer; None: there is none that can be read.
        special: Returns special tokens by id; large files are read where they are wanted alone.
    """

    label: str
    settings: Settings
    tokenizer: str | None
    special: Callable[[], dict[int, str]]


def pretrained_keys(path: str) -> dict[str, Any]:
    """Returns the keys of a configuration that a pretrained decoder decides.

    Args:
        path: `decoder.pretrained`: a directory, a GGUF file or an id of the Hub.

    Returns:
        Values by dotted path: the decoder's shape, tokenizer.path and tokenizer.separator. What
        is not told is left out.

    Raises:
        ConfigError: It cannot be read, or is of an architecture or has an option that is not
            supported; all of them are named.
    """
    source = _source(path)
    settings = source.settings
    shape = shape_of(settings)
    longest = longest_of(settings)
    if (window := shape["sliding_window"]) is not None:
        longest = min(longest, window)  # Longer contexts are for those who ask for them.
    # A power of two divides the shards of a datastore, as its windows must.
    shape["context_tokens"] = 1 << (min(longest, _DEFAULT_CONTEXT).bit_length() - 1)
    if settings.wrong:
        raise ConfigError([f"{source.label}: {line}" for line in settings.wrong])
    found = {f"decoder.{key}": value for key, value in shape.items()}
    if source.tokenizer is not None:
        found["tokenizer.path"] = source.tokenizer
        separator = _separator(settings, source.special())
        if separator is not None:
            found["tokenizer.separator"] = separator
    return found


def pretrained_decoder(path: str, **changed: Any) -> DecoderConfig:
    """Returns the section `decoder` that a pretrained decoder decides, some keys changed.

    Raises:
        ConfigError: As `pretrained_keys`.
    """
    values: dict[str, Any] = {}
    for dotted, value in pretrained_keys(path).items():
        section, *parents, key = dotted.split(".")
        if section == "decoder":
            inner = values.setdefault(parents[0], {}) if parents else values
            inner[key] = value
    return DecoderConfig(**values | changed)


def longest_context(path: str) -> int:
    """Returns the longest window that a pretrained decoder reads, in tokens."""
    return longest_of(_source(path).settings)


def missing_tokenizer(path: str) -> str:
    """Says why there is no tokenizer that can be read."""
    where = local_path(path)
    mistake = tokenizer_mistake(read_header(where)) if is_gguf(where) else None
    return mistake or f"has no {HF_TOKENIZER}"


def _source(path: str) -> _Source:
    """Reads what `decoder.pretrained` names.

    Raises:
        ConfigError: It cannot be read, or is of no supported family.
    """
    where = local_path(path)
    source = _gguf(where, path) if is_gguf(where) else _directory(where, path)
    family = source.settings.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        key = "general.architecture" if is_gguf(where) else f"{HF_CONFIG} has model_type"
        raise ConfigError(
            f"decoder.pretrained={path}: {key}={family!r}; supported are "
            + ", ".join(sorted(FAMILIES))
        )
    return source


def _directory(where: str, path: str) -> _Source:
    folder = Path(where).expanduser()
    settings = Settings(_read_json(folder / HF_CONFIG, path))
    tokenizer = folder / HF_TOKENIZER
    if not tokenizer.is_file():
        return _Source(f"decoder.pretrained={path}: {HF_CONFIG}", settings, None, dict)
    special = functools.partial(_added_tokens, tokenizer, path)
    return _Source(f"decoder.pretrained={path}: {HF_CONFIG}", settings, str(tokenizer), special)


def _added_tokens(tokenizer: Path, path: str) -> dict[int, str]:
    added = _read_json(tokenizer, path).get("added_tokens")
    return {
        one["id"]: one["content"]
        for one in (added if isinstance(added, list) else [])
        if isinstance(one, dict)
        and isinstance(one.get("id"), int)
        and isinstance(one.get("content"), str)
    }


def _gguf(where: str, path: str) -> _Source:
    header = read_header(where)
    values, wrong = settings_of(header, where)
    settings = Settings(values)
    settings.wrong += wrong
    supported = tokenizer_mistake(header) is None
    special = functools.partial(special_tokens, header)
    return _Source(f"decoder.pretrained={path}", settings, where if supported else None, special)


def _separator(settings: Settings, names: Mapping[int, str]) -> str | None:
    """Returns the token that documents start with in training: the first that is named."""
    for key in ("bos_token_id", "eos_token_id"):
        number = settings.get(key)
        for one in number if isinstance(number, list) else [number]:
            if isinstance(one, int) and one in names:
                return str(names[one])
    return None


def _read_json(file: Path, path: str) -> dict[str, Any]:
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not JSON"
        raise ConfigError(
            f"decoder.pretrained={path}: {file.name} cannot be read ({reason}); it must be a "
            "Hugging Face directory with config.json, *.safetensors and tokenizer.json, a GGUF "
            "file or an id of the Hub (org/name)"
        ) from None
    if not isinstance(value, dict):
        raise ConfigError(f"decoder.pretrained={path}: {file.name} is not a JSON object")
    return value
