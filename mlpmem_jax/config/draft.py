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
from mlpmem_jax.config.overrides import KeyPath, key_path, override_value
from mlpmem_jax.config.schema import Config
from mlpmem_jax.config.yaml_text import YamlError, flow, short
from mlpmem_jax.errors import ConfigError

_SURROGATE = re.compile("[\ud800-\udfff]")
_REFUSED = object()  # stands for an entry that a list does not have


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
        keys = key_path(dotted)
        try:
            self.put(keys, override_value(_alternatives_at(keys) or (), raw))
        except YamlError as error:
            self._refuse(keys, raw, f"the value is not YAML: {error}")

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
            entries.append(_plain(section().model_dump()) if section else _REFUSED)
        if not last:
            assert section is not None
            self._descend(entries[index], section, keys, position + 1, value)
            return
        self._put_value(entries, keys, alternatives[0].items, value)
        if entries[index] is _REFUSED:
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
        if not any(alternative.allows(value) for alternative in alternatives):
            self._refuse(keys, value, f"must be {allowed_text(alternatives)}")
            return
        if not _is_writable(value):
            self._refuse(keys, value, "holds what is no UTF-8 text")
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
        if "." in str(wrong[-1]):  # A file's `train.alpha: 0.3`: dots are for overrides.
            dotted = _dotted(keys)
            known = _alternatives_at(key_path(dotted)) is not None
            meant = [dotted] if known else nearest(dotted, sections=False)
            if known:
                reason = f"write it nested: {_nested(keys, value)}"
            elif meant:
                reason = f"unknown key; did you mean {_nested((meant[0],), value)}?"
        elif meant:
            reason = f"unknown key; did you mean {' or '.join(meant)}?"
        if not meant:
            parent = _dotted(wrong[:-1])
            fields = short(", ".join(section.model_fields), 240)
            reason = f"unknown key; {f'{parent} has' if parent else 'the sections are'}: {fields}"
        self.doubtful.update(meant)
        self.mistakes.append(f"{short(dotted)}={short(value)}: {reason}")

    def _refuse(self, keys: KeyPath, value: Any, reason: str) -> None:
        self.doubtful.add(_dotted(keys))
        self.mistakes.append(f"{short(_dotted(keys))}={short(value)}: {reason}")

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
        for message in filter(None, found.pop((), "").split("\n")):  # rules that span sections
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


def _is_writable(value: Any) -> bool:
    """Returns whether texts can be written as UTF-8; bytes that are none come as surrogates."""
    texts = value if isinstance(value, list) else [value]
    return not any(isinstance(text, str) and _SURROGATE.search(text) for text in texts)


def _nested(keys: KeyPath, value: Any) -> str:
    """Returns a key, dotted or not, and its value as a file has them, in one line."""
    for key in reversed(key_path(_dotted(keys))):
        value = [value] if isinstance(key, int) else {key: value}
    return short(flow(value).removeprefix("{").removesuffix("}"), 160)


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
