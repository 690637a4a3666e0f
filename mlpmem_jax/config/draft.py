"""Values on their way to a `Config`: merging, overrides, and the words for mistakes."""

import re
from typing import Any

from pydantic import ValidationError

from mlpmem_jax.config.base import Section
from mlpmem_jax.config.keys import (
    Alternative,
    allowed_text,
    alternatives_of,
    item_section_of,
    nearest,
    section_of,
)
from mlpmem_jax.config.schema import Config
from mlpmem_jax.config.yaml_text import YamlError, parse_yaml, short
from mlpmem_jax.errors import ConfigError

KeyPath = tuple[str | int, ...]


class Draft:
    """A tree of values on its way to a `Config`, with the mistakes met so far."""

    def __init__(self, base: Config | None = None) -> None:
        self.tree: dict[str, Any] = _plain((base or Config()).model_dump())
        self.mistakes: list[str] = []
        self.doubtful: set[str] = set()  # keys whose meant value is unknown

    def override(self, text: str) -> None:
        """Takes one `section.key=value`."""
        dotted, equals, raw = text.partition("=")
        if not equals or not dotted.strip():
            self.mistakes.append(f"{text}: not an override; write section.key=value")
            return
        keys: KeyPath = tuple(
            int(part) if part.isdecimal() else part for part in dotted.strip().split(".")
        )
        kinds = {alternative.kind for alternative in _alternatives_at(keys) or ()}
        try:
            value, repeated = parse_yaml(raw)
        except YamlError as error:
            if "str" not in kinds:
                self._refuse(keys, raw, f"the value is not YAML: {error}")
                return
            value, repeated = raw, []
        if repeated:
            self._refuse(keys, raw, f"key {repeated[0][0]} is given twice")
            return
        if "str" in kinds and not (isinstance(value, str) or (value is None and "null" in kinds)):
            value = raw  # `decoder.name=7` and `workdir=1e3` are text
        self.put(keys, value)

    def put(self, keys: KeyPath, value: Any) -> None:
        """Sets a key or, key by key, a section; notes what is wrong."""
        self._descend(self.tree, Config, keys, 0, value)

    def _descend(
        self, container: Any, section: type[Section], keys: KeyPath, position: int, value: Any
    ) -> None:
        """Sets `keys[position:]` in a section's values."""
        name, last = keys[position], position == len(keys) - 1
        field = section.model_fields.get(str(name))
        if field is None:
            self._unknown(keys[: position + 1], keys, section, value)
            return
        alternatives = alternatives_of(field)
        nested = section_of(alternatives)
        if nested and last:
            self._put_section(keys, alternatives, value)
        elif nested:
            self._descend(container[name], nested, keys, position + 1, value)
        elif last:
            self._put_value(container, keys, alternatives, value)
        elif alternatives[0].kind == "list":
            entries = container[name] = list(container[name])
            self._descend_list(entries, alternatives, keys, position + 1, value)
        else:
            self._refuse(keys, value, f"unknown key; {_dotted(keys[: position + 1])} is a value")

    def _descend_list(
        self,
        entries: list[Any],
        alternatives: tuple[Alternative, ...],
        keys: KeyPath,
        position: int,
        value: Any,
    ) -> None:
        """Sets `keys[position:]` in a list's values, where `keys[position]` is a number."""
        index, last = keys[position], position == len(keys) - 1
        if not isinstance(index, int) or index > len(entries):
            self._refuse(
                keys,
                value,
                f"{_dotted(keys[:position])} is a list of {len(entries)}: "
                f"name an entry by its number, 0 to {len(entries)} (the last adds one)",
            )
            return
        section = item_section_of(alternatives)
        if section is None and not last:
            self._refuse(keys, value, f"unknown key; {_dotted(keys[: position + 1])} is a value")
            return
        if index == len(entries):
            entries.append(_plain(section().model_dump()) if section else None)
        if not last:
            assert section is not None
            self._descend(entries[index], section, keys, position + 1, value)
            return
        self._put_value(entries, keys, alternatives[0].items, value)
        if entries[index] is None:  # refused, and there was nothing before
            entries.pop()

    def _put_section(
        self, keys: KeyPath, alternatives: tuple[Alternative, ...], value: Any
    ) -> None:
        if value is None:  # `decoder:` with nothing below
            return
        if not isinstance(value, dict):
            self._refuse(keys, value, f"must be {allowed_text(alternatives)}")
            return
        for key, part in value.items():
            self.put((*keys, str(key)), part)

    def _put_value(
        self, container: Any, keys: KeyPath, alternatives: tuple[Alternative, ...], value: Any
    ) -> None:
        if isinstance(value, tuple):
            value = list(value)
        entry_section = item_section_of(alternatives) or section_of(alternatives)
        if entry_section:
            self._put_entries(container, keys, alternatives, entry_section, value)
            return
        if not any(_matches(alternative, value) for alternative in alternatives):
            self._refuse(keys, value, f"must be {allowed_text(alternatives)}")
            return
        whole = any(a.kind == "int" and a.has_type_of(value) for a in alternatives)
        if whole and not any(a.kind == "float" for a in alternatives):
            value = int(value)
        container[keys[-1]] = value

    def _put_entries(
        self,
        container: Any,
        keys: KeyPath,
        alternatives: tuple[Alternative, ...],
        section: type[Section],
        value: Any,
    ) -> None:
        """Sets a list of sections, or one of its entries, from their defaults on."""
        if not any(alternative.has_type_of(value) for alternative in alternatives):
            self._refuse(keys, value, f"must be {allowed_text(alternatives)}")
            return
        if isinstance(value, dict):
            container[keys[-1]] = _plain(section().model_dump())
            for key, part in value.items():
                self.put((*keys, str(key)), part)
            return
        container[keys[-1]] = []
        for index, part in enumerate(value):
            self.put((*keys, index), part)

    def _unknown(self, wrong: KeyPath, keys: KeyPath, section: type[Section], value: Any) -> None:
        dotted = _dotted(wrong if isinstance(value, dict) else keys)
        meant = nearest(dotted, sections=isinstance(value, dict))
        self.doubtful.update(meant)
        if meant:
            hint = f"did you mean {' or '.join(meant)}?"
        else:
            parent = _dotted(wrong[:-1])
            hint = f"{parent or 'the sections are'}{' has' if parent else ''}: " + ", ".join(
                section.model_fields
            )
        self.mistakes.append(f"{dotted}={short(value)}: unknown key; {hint}")

    def _refuse(self, keys: KeyPath, value: Any, reason: str) -> None:
        self.doubtful.add(_dotted(keys))
        self.mistakes.append(f"{_dotted(keys)}={short(value)}: {reason}")

    def finish(self) -> Config:
        """Validates; what is wrong falls back to its default so that the rest is checked."""
        for _ in range(100):
            try:
                config = Config.model_validate(self.tree)
            except ValidationError as error:
                if self._note(error):
                    continue
            else:
                if not self.mistakes:
                    return config
            break
        raise ConfigError(list(dict.fromkeys(self.mistakes)))

    def _note(self, error: ValidationError) -> bool:
        """Notes pydantic's findings; returns whether another round can find more."""
        defaults = _plain(Config().model_dump())
        found = _by_key(error)
        for message in found.pop((), "").splitlines():  # rules that span sections
            if not self._is_doubtful(message):
                self.mistakes.append(message)
        for keys, message in found.items():
            allowed = f"must be {allowed_text(_alternatives_at(keys) or ())}"
            self._refuse(keys, _look_up(self.tree, keys), message or allowed)
        for keys in found:
            _restore(self.tree, defaults, keys)
        return bool(found)

    def _is_doubtful(self, mistake: str) -> bool:
        return any(
            re.search(rf"(?<![\w.]){re.escape(path)}(?![\w]|\.\w)", mistake)
            for path in self.doubtful
        )


def _by_key(error: ValidationError) -> dict[KeyPath, str]:
    """Groups pydantic's errors by key: one line for a union, not one a member.

    Returns:
        An own message where a validator of ours gave one, else an empty text.
    """
    found: dict[KeyPath, str] = {}
    for item in error.errors(include_url=False):
        keys = item["loc"]
        while keys and _alternatives_at(keys) is None:
            keys = keys[:-1]
        found.setdefault(keys, "")
        if item["type"] == "value_error":
            found[keys] = str(item["ctx"]["error"])
    return found


def _matches(alternative: Alternative, value: Any) -> bool:
    if not alternative.has_type_of(value):
        return False
    if alternative.kind == "choice":
        return value in alternative.choices
    if alternative.kind == "list":
        return all(any(_matches(item, part) for item in alternative.items) for part in value)
    return True


def _alternatives_at(keys: KeyPath) -> tuple[Alternative, ...] | None:
    """Returns what the key at a path takes, or None where the schema has no such key."""
    section: type[Section] | None = Config
    found: tuple[Alternative, ...] | None = None
    for key in keys:
        if isinstance(key, int):
            if found is None or found[0].kind != "list":
                return None
            found = found[0].items
        else:
            if section is None or key not in section.model_fields:
                return None
            found = alternatives_of(section.model_fields[key])
        section = section_of(found)
    return found


def _look_up(tree: Any, keys: KeyPath) -> Any:
    for key in keys:
        tree = tree[key]
    return tree


def _restore(tree: Any, defaults: Any, keys: KeyPath) -> None:
    """Puts a key back to its default; an entry of a list takes the list with it."""
    for key in keys[:-1]:
        if isinstance(tree[key], list):
            break
        tree, defaults = tree[key], defaults[key]
    else:
        key = keys[-1]
    tree[key] = defaults[key]


def _plain(value: Any) -> Any:
    """Returns nested tuples as lists, as YAML has them."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return value


def _dotted(keys: KeyPath) -> str:
    return ".".join(str(key) for key in keys)
