"""Values on their way to a `Config`: merging, validation, and the words for mistakes."""

import contextlib
import copy
import re
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from mlpmem_jax.config.checks import cross_section_mistakes
from mlpmem_jax.config.keys import (
    KeyPath,
    allowed_text,
    alternatives,
    dotted_path,
    is_free_text,
    is_section,
    key_path,
    nearest,
    schema_at,
)
from mlpmem_jax.config.schema import Config
from mlpmem_jax.config.yaml_text import YamlError, flow, parse_yaml, short
from mlpmem_jax.errors import ConfigError

# Keys of earlier configurations, when artifacts went by names.
_NAMES = frozenset(
    f"{section}.name"
    for section in (
        "decoder", "memory", "datastore", "retrieval", "targets", "train", "compare",
        "overfitting", "ablate",
    )
) | {"retrieval.exact_name"}  # fmt: skip
_QUOTED = re.compile(r"""'(?:[^']|'')*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)


class Draft:
    """A tree of values on its way to a `Config`, with the mistakes met so far."""

    def __init__(self, base: Config | None = None) -> None:
        self._tree: dict[str, Any] = (base or Config()).model_dump(mode="json")
        self._mistakes: list[str] = []
        self._doubtful: set[str] = set()  # keys whose intended value is unknown

    def note(self, mistake: str) -> None:
        """Adds a mistake."""
        self._mistakes.append(mistake)

    def merge(self, values: Mapping[Any, Any]) -> None:
        """Takes the sections and keys of a file."""
        _merge(self._tree, values)

    def override(self, text: str) -> None:
        """Takes one `section.key=value`."""
        dotted, equals, raw = text.partition("=")
        if not equals or not dotted.strip():
            self.note(f"{text}: not an override; write section.key=value")
            return
        keys = key_path(dotted)
        schema = schema_at(keys)
        try:
            self.put(keys, _typed(schema, raw))
        except YamlError as error:
            if schema is None:
                self._unknown(keys, raw)
            else:
                self._refuse(keys, raw, f"the value is not YAML: {error}")

    def put(self, keys: KeyPath, value: Any) -> None:
        """Sets a key or, key by key, a section."""
        if schema_at(keys) is None:
            self._unknown(keys, value)
            return
        container: Any = self._tree
        for position, key in enumerate(keys):
            if not _has(container, key):
                return  # An earlier value of the wrong type, which is refused.
            if isinstance(key, int) and key > len(container):
                self._unknown(keys, value, keys[:position])
                return
            if isinstance(key, int) and key == len(container):
                container.append({})
            if position < len(keys) - 1:
                if isinstance(key, str):
                    container.setdefault(key, [] if isinstance(keys[position + 1], int) else {})
                # A copy: anchors of YAML may share what is set here.
                container[key] = container = copy.copy(container[key])
        if isinstance(container, dict):
            _merge(container, {keys[-1]: value})
        else:
            container[keys[-1]] = value

    def value(self, *keys: str | int) -> Any:
        """Returns a value that is not checked yet; None where there is none."""
        found: Any = self._tree
        for key in keys:
            found = found.get(key) if isinstance(found, dict) else None
        return found

    def finish(self) -> Config:
        """Returns the configuration.

        A refused value is replaced by its default, so that the rest is checked too.

        Raises:
            ConfigError: With one line for each mistake.
        """
        try:
            config = Config.model_validate(self._tree)
        except ValidationError as error:
            self._note_all(error)
            config = Config.model_validate(self._tree)
        for mistake in cross_section_mistakes(config):
            if not self._is_doubtful(mistake):
                self.note(mistake)
        if self._mistakes:
            raise ConfigError(list(dict.fromkeys(self._mistakes)))
        return config

    def _note_all(self, error: ValidationError) -> None:
        """Notes the findings of pydantic, one for each key, and drops the values."""
        wrong: dict[KeyPath, None] = {}
        reasons: dict[KeyPath, str] = {}  # other than the type
        for item in error.errors(include_url=False):
            keys = item["loc"]
            if item["type"] in ("extra_forbidden", "invalid_key"):
                self._unknown(keys, _look_up(self._tree, keys))
            else:
                while schema_at(keys) is None:  # the member of a union
                    keys = keys[:-1]
            wrong[keys] = None
            if item["type"] == "value_error":  # a validator of ours
                reasons[keys] = str(item["ctx"]["error"])
            elif item["type"] == "string_unicode":
                reasons[keys] = "is not valid UTF-8 text"
        for keys in wrong:
            if schema := schema_at(keys):
                reason = reasons.get(keys, f"must be {allowed_text(schema)}")
                self._refuse(keys, _look_up(self._tree, keys), reason)
        for keys in wrong:
            *parents, last = _named(keys)
            _look_up(self._tree, tuple(parents)).pop(last, None)  # The default takes its place.

    def _unknown(self, keys: KeyPath, value: Any, known: KeyPath | None = None) -> None:
        """Notes a key that the schema does not have, or an entry that a list cannot have yet."""
        known = keys[:-1] if known is None else known
        while (schema := schema_at(known)) is None:
            known = known[:-1]
        dotted, parent = dotted_path(keys), dotted_path(known)
        if "items" in schema:
            entries = _look_up(self._tree, known)
            count = len(entries) if isinstance(entries, list) else 0
            plural = "entry" if count == 1 else "entries"
            reason = f"{parent} is a list of {count} {plural}; {parent}.{count} adds one"
            self._refuse(keys, value, reason)
            return
        if not is_section(schema):
            self._refuse(keys, value, f"unknown key; {parent} is a value")
            return
        in_file = "." in str(keys[len(known)])  # Dots are for overrides.
        if in_file and schema_at(key_path(dotted)) is not None:
            self._refuse(key_path(dotted), value, f"write it nested: {_nested(dotted, value)}")
            return
        if dotted in _NAMES:
            self._refuse(keys, value, "artifacts have no names (docs/artifacts.md); drop the key")
            return
        meant = nearest(dotted, sections=isinstance(value, dict) and not in_file)
        self._doubtful.update(meant)
        if meant:
            words = [_nested(meant[0], value)] if in_file else meant
            reason = f"did you mean {' or '.join(words)}?"
        else:
            names = short(", ".join(schema["properties"]), 240)
            reason = f"{parent} has: {names}" if known else f"the sections are: {names}"
        self.note(f"{short(dotted)}={short(value)}: unknown key; {reason}")

    def _refuse(self, keys: KeyPath, value: Any, reason: str) -> None:
        self._doubtful.add(dotted_path(_named(keys)))
        self.note(f"{short(dotted_path(keys))}={short(value)}: {reason}")

    def _is_doubtful(self, mistake: str) -> bool:
        return any(
            re.search(rf"(?<![\w.]){re.escape(path)}(?!\w)", mistake) for path in self._doubtful
        )


def _typed(schema: Mapping[str, Any] | None, raw: str) -> Any:
    """Returns the value that is typed after `section.key=`.

    Text is taken as typed, up to the end; everything else is YAML. Two texts are YAML too: `null`,
    where a key may be without a value, and one that is quoted as a whole (so `'"null"'` is the
    text null, and a shell's leftover quotes do no harm).

    Raises:
        YamlError: The key requires YAML, and this is none.
    """
    members = alternatives(schema or {})
    kinds = {member.get("type") for member in members}
    takes_text = any(map(is_free_text, members))
    if takes_text and not _QUOTED.fullmatch(raw) and not (raw == "null" and "null" in kinds):
        with contextlib.suppress(YamlError):
            value = parse_yaml(raw)[0] if "number" in kinds else raw
            return value if type(value) in (int, float) else raw
        return raw
    try:
        value, repeated = parse_yaml(raw)
    except YamlError as error:
        hint = "; single quotes keep backslashes as they are, no quotes keep everything"
        raise YamlError(f"{error}{hint if takes_text else ''}") from None
    if repeated:
        raise YamlError(f"key {repeated[0][0]} is given twice")
    return value


def _merge(tree: dict[str, Any], values: Mapping[Any, Any]) -> None:
    """Sets keys; of a section only those that are given."""
    for given, value in values.items():
        key = str(given).encode(errors="backslashreplace").decode()
        old = tree.get(key)
        if isinstance(old, dict) and isinstance(value, Mapping):
            _merge(old, value)
        elif not isinstance(old, dict) or value is not None:  # `decoder:` with nothing below
            tree[key] = value


def _named(keys: KeyPath) -> KeyPath:
    """Returns a key; of an entry, the key of its list."""
    return keys[: next((n for n, key in enumerate(keys) if isinstance(key, int)), len(keys))]


def _has(container: Any, key: str | int) -> bool:
    """Returns whether a value can have an entry (a number) or a key."""
    return isinstance(container, list if isinstance(key, int) else dict)


def _look_up(tree: Any, keys: KeyPath) -> Any:
    """Returns a value, or None where there is none yet."""
    for key in keys:
        known = tree if isinstance(tree, dict) else dict(enumerate(tree or ()))
        tree = known.get(key)
    return tree


def _nested(dotted: str, value: Any) -> str:
    """Returns a dotted key and its value as a file has them, in one line."""
    for key in reversed(key_path(dotted)):
        value = [value] if isinstance(key, int) else {key: value}
    return short(flow(value).removeprefix("{").removesuffix("}"), 160)
