"""What is typed after `section.key=` on a command line, or in a list of overrides.

Text is taken as typed, up to the end; everything else is YAML. Two things are no text of their
own: `null`, where a key may be without a value, and one whole quoted text, which YAML reads
(so `'"null"'` is the text null, and a shell's leftover quotes do no harm).
"""

import re
from typing import Any

from mlpmem_jax.config.keys import Alternative
from mlpmem_jax.config.yaml_text import YamlError, parse_yaml

KeyPath = tuple[str | int, ...]

_QUOTED = re.compile(r"""'(?:[^']|'')*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)


def key_path(dotted: str) -> KeyPath:
    """Returns the parts of a dotted key; numbers count entries of lists."""
    parts = dotted.strip().split(".")
    return tuple(int(part) if re.fullmatch("[0-9]{1,9}", part) else part for part in parts)


def override_value(alternatives: tuple[Alternative, ...], raw: str) -> Any:
    """Returns the value that a text means for a key.

    Args:
        alternatives: What the key takes; empty where there is no such key.
        raw: What was typed.

    Raises:
        YamlError: It is not the YAML that the key needs.
    """
    kinds: set[str] = {alternative.kind for alternative in alternatives}
    if "str" in kinds:
        return _text_value(kinds, raw)
    try:
        value, repeated = parse_yaml(raw)
    except YamlError:
        if alternatives:
            raise
        return raw  # That there is no such key is what has to be said.
    if repeated:
        raise YamlError(f"key {repeated[0][0]} is given twice")
    return value


def _text_value(kinds: set[str], raw: str) -> Any:
    if _QUOTED.fullmatch(raw):
        try:
            return parse_yaml(raw)[0]
        except YamlError as error:
            raise YamlError(
                f"{error}; single quotes keep backslashes as they are, no quotes keep everything"
            ) from None
    if raw == "null" and "null" in kinds:
        return None
    if kinds & {"int", "float"}:
        try:
            value = parse_yaml(raw)[0]
        except YamlError:
            return raw
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
    return raw
